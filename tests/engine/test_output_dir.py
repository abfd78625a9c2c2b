"""An OUTPUT_DIR that can't be used is one line that names the key."""

import errno
import os
import tempfile

import pytest

from ia_gcn.config import read_config
from ia_gcn.engine import setup_run


@pytest.fixture
def refusal(error_line):
    """A function that starts a run in a folder, and returns the one line that refuses it."""

    def start(folder):
        return error_line(lambda: setup_run(read_config("", ["OUTPUT_DIR", str(folder)])))

    return start


def test_under_a_file(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert refusal(folder).startswith(f"OUTPUT_DIR {folder}: ")
    assert (tmp_path / "file").read_text() == ""


def test_read_only(refusal, tmp_path, monkeypatch):
    """As a file system that is mounted so; the permissions of a folder don't bind root."""

    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert refusal(tmp_path) == f"OUTPUT_DIR {tmp_path}: Read-only file system"


@pytest.mark.parametrize("folder", ["", " ", "a\0b"])
def test_no_path(refusal, folder):
    assert refusal(folder) == f"OUTPUT_DIR must be the path of a folder, not {folder!r}"
