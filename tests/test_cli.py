"""The command ia-gcn, and the package as it is installed."""

import shutil
import subprocess
import sys

import pytest

import ia_gcn_cli
from tests.helpers.commands import ROOT, own_log_handlers, run_process

# Of ia_gcn.commands, what is no command.
NO_COMMANDS = {"__init__", "common", "runs"}


def test_the_help_has_a_line_for_every_command_and_loads_nothing_heavy():
    code = (
        "import sys, ia_gcn_cli; status = ia_gcn_cli.main(['--help']);"
        "loaded = {'ia_gcn', 'torch', 'detectron2', 'numpy', 'timm'} & set(sys.modules);"
        "assert not loaded, loaded; sys.exit(status)"
    )
    outcome = run_process("-c", code)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for name, command in ia_gcn_cli.COMMANDS.items():
        assert f"  {name} " in outcome.stdout
        assert command.description in outcome.stdout


def test_every_module_of_commands_is_a_command():
    modules = {path.stem for path in (ROOT / "ia_gcn/commands").glob("*.py")} - NO_COMMANDS
    assert modules <= {command.module for command in ia_gcn_cli.COMMANDS.values()}


def test_an_unknown_command_is_refused(capsys):
    assert ia_gcn_cli.main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "ia-gcn: no command 'trian'; ia-gcn --help lists them\n"


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_command_is_called_by_its_name(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ia-gcn"])
    with pytest.raises(SystemExit) as end:
        ia_gcn_cli.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ia-gcn {name} ")


def test_evaluate_is_train_with_eval_only(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ia-gcn"])
    with own_log_handlers():
        status = ia_gcn_cli.main(["evaluate", "--config-file", "DigitScenes/ml_gcn.yaml"])
    assert status == 1
    assert capsys.readouterr().err.startswith("train: MODEL.WEIGHTS is empty")


@pytest.mark.slow
def test_an_installed_package_has_the_command_and_the_configs(tmp_path):
    """Not editable, and used from another folder."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("ia_gcn", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ia_gcn_cli.py"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target")
    pip = [sys.executable, "-m", "pip", "install", *options, str(target), str(source)]
    subprocess.run(pip, check=True, cwd=tmp_path)
    shutil.rmtree(source)

    names = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    found = target / "ia_gcn/configs"
    assert {path.relative_to(found) for path in found.rglob("*.yaml")} == names
    command = (target / "bin/ia-gcn", "evaluate", "--config-file", "DigitScenes/ml_gcn.yaml")
    outcome = run_process(*command, cwd=tmp_path, PYTHONPATH=target)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("train: MODEL.WEIGHTS is empty")
