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
    was before, and the file beside it is gone; only a process that is killed leaves that behind,
    see `remove_unfinished`.

    Raises:
        OSError: the folder can't be written to, or the disk is full; it names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        failed = _failed_write(error)
        if failed is None:
            raise
        raise OSError(failed.errno, failed.strerror, os.fspath(path)) from error
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what `write_atomically` left in a folder when a process was killed.

    No other process may be writing there.
    """
    for path in Path(folder).glob(".*.*.tmp"):
        path.unlink()


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder if needed and try to write there, before long work whose result it is to hold.

    Raises:
        OSError: it can't be made or written to.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of files to the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _failed_write(error: BaseException | None) -> OSError | None:
    """The error of a write to an open file, which names no file, behind that of a library.

    torch.save raises a RuntimeError about positions in the file instead.
    """
    while error is not None:
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            return error
        error = error.__context__
    return None
