"""Writing files so that after a crash there is the old file or the new one, never half of one."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Iterator


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write bytes to, which takes the place of `path` once it is complete.

    It is written beside `path`, flushed to the disk, and renamed. After an error `path` is what it
    was before, and the file beside it is gone.

    Raises:
        OSError: the folder can't be written to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder if needed and try to write there, before long work whose result it is to hold.

    Raises:
        OSError: it can't be made or written to.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
