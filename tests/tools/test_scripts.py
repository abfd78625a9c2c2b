"""Each script in a process of its own, as a user starts it from another folder."""

import pytest

from tests.helpers.commands import ROOT, run_process

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "datasets")
    for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_all_that_it_prints(script, tmp_path):
    outcome = run_process(ROOT / script, "--help", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.startswith("usage: ")
    assert not list(tmp_path.iterdir())
