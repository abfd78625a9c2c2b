"""What the screen gets, and what log.txt gets."""

import errno
import logging

import pytest

from ia_gcn.engine import setup_logging, setup_run
from tests.helpers.commands import own_log_handlers

OURS = logging.getLogger("ia_gcn.engine.trainer")
DETECTRON2 = logging.getLogger("detectron2.engine.defaults")
FVCORE = logging.getLogger("fvcore.common.checkpoint")


@pytest.fixture(autouse=True)
def _own_handlers():
    with own_log_handlers():
        yield


def say_everything():
    OURS.debug("our dump")
    OURS.info("our message")
    OURS.warning("our warning")
    DETECTRON2.info("their message")
    DETECTRON2.warning("\x1b[5m\x1b[31mtheir warning\x1b[0m")
    FVCORE.warning("tensors that were not found")
    try:
        raise ValueError("broken")
    except ValueError:
        DETECTRON2.exception("Exception during training:")


EVERYTHING = (
    *("our dump", "our message", "our warning", "their message", "their warning"),
    *("tensors that were not found", "Exception during training", "ValueError: broken"),
)


def test_the_screen_gets_what_matters_and_the_file_everything(tmp_path, capsys):
    setup_logging(str(tmp_path))
    say_everything()
    expected = ["our message", "warning: our warning", "warning: their warning"]
    out, err = capsys.readouterr()
    assert (out.splitlines(), err) == (expected, "")
    text = (tmp_path / "log.txt").read_text()
    assert all(message in text for message in EVERYTHING)
    assert "\x1b" not in text


def test_verbose_brings_the_rest_to_the_screen(tmp_path, capsys):
    setup_logging(str(tmp_path), verbose=True)
    say_everything()
    out = capsys.readouterr().out
    assert all(message in out for message in EVERYTHING)


def test_a_second_run_in_a_process_has_its_own_file(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        setup_logging(str(tmp_path / name))
        OURS.info(f"run {name}")
    assert capsys.readouterr().out.splitlines() == ["run a", "run b"]
    for name in ("a", "b"):
        lines = (tmp_path / name / "log.txt").read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].endswith(f"run {name}")


def test_another_process_writes_to_a_file_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ia_gcn.engine.logs.comm.get_rank", lambda: 1)
    monkeypatch.setattr("ia_gcn.engine.logs.comm.is_main_process", lambda: False)
    setup_logging(str(tmp_path))
    say_everything()
    assert capsys.readouterr().out == ""
    assert "our message" in (tmp_path / "log.txt.rank1").read_text()
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("verbose", [False, True])
def test_environment_and_config_are_in_the_log(make_cfg, tmp_path, capsys, verbose):
    cfg = make_cfg("run")
    setup_run(cfg, verbose=verbose)
    text = (tmp_path / "run/log.txt").read_text()
    assert "PyTorch" in text
    assert cfg.dump() in text
    assert "\x1b" not in text
    assert (tmp_path / "run/config.yaml").read_text() == cfg.dump()
    out, err = capsys.readouterr()
    assert (cfg.dump() in out) == verbose
    assert err == ""


class FullDisk:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass


def test_a_full_disk_is_not_reported_for_every_message(tmp_path, capsys):
    setup_logging(str(tmp_path))
    (file,) = [h for h in logging.getLogger("ia_gcn").handlers if hasattr(h, "baseFilename")]
    before = file.setStream(FullDisk())
    OURS.info("our message")
    file.setStream(before)
    assert capsys.readouterr() == ("our message\n", "")
