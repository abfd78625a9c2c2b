"""One training at a time in an output folder."""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Set

from detectron2.utils import comm

from ..errors import InputError
from ..io.files import remove_unfinished

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

# Folders that this process has locked. A lock of POSIX is a process's: it gets the same one twice,
# and loses it when either file is closed.
_LOCKED: Set[str] = set()


@contextmanager
def sole_training(output_dir: str) -> Iterator[None]:
    """Keep other trainings out of OUTPUT_DIR, which is made if needed.

    The main process holds a lock on a file `.lock` in it, which ends with the process, however that
    ends. Files that a killed training had not finished writing are removed. A block inside of
    another one does nothing more.

    Raises:
        InputError: in all processes: a training is running there, or the folder can't be written
            to.
    """
    folder = os.path.realpath(output_dir)
    handle, problem = None, ""
    if comm.is_main_process() and folder not in _LOCKED:
        try:
            handle = _lock(output_dir)
        except OSError as error:
            problem = f"OUTPUT_DIR: {output_dir}: {error.strerror}"
        except InputError as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise InputError(problem)
    if handle is None:
        yield
        return
    _LOCKED.add(folder)
    try:
        root = Path(output_dir)
        for part in (root, *root.glob("inference/*"), *root.glob("ema/inference/*")):
            remove_unfinished(part)
        yield
    finally:
        _LOCKED.remove(folder)
        os.close(handle)


def _lock(folder: str) -> int:
    """The descriptor of the lock's file, which holds the lock until it is closed."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(os.path.join(folder, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl:
            # Unlike flock's, it is not inherited by a loader's worker that outlives a killed run.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            raise InputError(
                f"OUTPUT_DIR: a training is running in {folder} ({holder or 'unknown process'})"
            ) from None
        logger.warning(f"OUTPUT_DIR: {folder} can't be locked against other trainings: {error}")
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle
