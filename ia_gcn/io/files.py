"""Writing files so that after a crash there is the old file or the new one, never half of one."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Iterator, List, TextIO


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write bytes to, which takes the place of `path` once it is complete.

    It is written beside `path`, flushed to the disk, and renamed. After an error `path` is what it
    was before, and the file beside it is gone; only a process that is killed leaves that behind,
    see `remove_unfinished`. A link stays, and what it points at is replaced. What is no file, such
    as /dev/null or a named pipe, is written to directly.

    Raises:
        OSError: the folder can't be written to, or the disk is full; it names `path`.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
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


@contextmanager
def write_text_atomically(path: str | os.PathLike[str], errors: str = "strict") -> Iterator[TextIO]:
    """`write_atomically` of text, in UTF-8 and with line breaks as they are.

    Args:
        errors: of `str.encode`.
    """
    with write_atomically(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors=errors, newline="")
        yield text
        text.flush()
        text.detach()


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file of lines and flush it to the disk.

    A last line without its end, which a crash has torn, is removed first; so is what was written of
    this one if the disk is full.

    Raises:
        OSError: it can't be written.
    """
    with open(path, "ab+") as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def append_bytes(path: str | os.PathLike[str], content: memoryview) -> int:
    """Add bytes to a temporary file, which is made if needed, and return where they begin.

    Raises:
        OSError: they can't be written.
    """
    try:
        with open(path, "ab") as file:
            start = file.tell()
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return start


def read_lines(path: str | os.PathLike[str]) -> List[str]:
    """The lines that `append_line` has written, without a last one that a crash has torn."""
    content = Path(path).read_bytes()
    return content[: content.rfind(b"\n") + 1].decode().splitlines()


def remove_unfinished(folder: str | os.PathLike[str], name: str = "*") -> None:
    """Remove what a process that was killed had for a while: files .*.*.tmp, folders .scores.*.tmp.

    No other process may be writing there.

    Args:
        name: a pattern; only the files that `write_atomically` made for such a name.
    """
    for path in Path(folder).glob(f".{name}.*.tmp"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name.startswith(".scores."):
            shutil.rmtree(path)


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
