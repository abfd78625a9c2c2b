"""tools/torture.py code: it finds nothing, and would find something."""

import contextlib
import pickle
import sys

import pytest

from tests.helpers.commands import ROOT, load_script

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow


@pytest.fixture
def torture(monkeypatch):
    """The module, which finds its own under tools/."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return load_script("tools/torture.py")


def test_files_that_could_carry_code_do_no_harm(torture, tmp_path, capsys):
    status = torture.main(["code", "--trials", "20", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "0 findings" in out
    assert len((tmp_path / "code.jsonl").read_text().splitlines()) == 20 * 7


def test_a_reader_that_runs_code_is_found(torture, tmp_path, capsys, monkeypatch):
    code_files = sys.modules["tortures.code_files"]

    def read(path):
        with open(path, "rb") as file, contextlib.suppress(Exception):
            pickle.load(file)

    kind = code_files.KINDS["pickle"]._replace(read=read)
    monkeypatch.setitem(code_files.KINDS, "pickle", kind)
    options = ["--kinds", "pickle", "--trials", "40", "--seed", "1"]
    status = torture.main(["code", *options, "--output", str(tmp_path)])
    assert status == 1
    assert "ran code" in capsys.readouterr().out
