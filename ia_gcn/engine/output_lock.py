"""One training at a time in an output folder, and evaluations that it leaves alone."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from contextlib import contextmanager, suppress
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

# Bytes of the file that are locked: by a training, and by evaluations, as many as there are.
TRAINING, EVALUATIONS = 0, 1

# Seconds that a job waits for the lock if torchrun may have started it again: a file server keeps
# the locks of a machine that is gone for the time of a lease, which is 90 s for NFS 4 on Linux.
LEASE = 120

# Folders that this process has locked. A lock of POSIX is a process's: it gets the same one twice,
# and loses it when either file is closed.
_LOCKED: Set[str] = set()


@contextmanager
def sole_training(output_dir: str) -> Iterator[None]:
    """Keep other trainings out of OUTPUT_DIR, which is made if needed.

    The main process holds a lock on a file `.lock` in it, which ends with the process, however that
    ends. Files that a killed process had not finished writing are removed, unless an evaluation
    is running there. A block inside of another one does nothing more.

    Where torchrun starts failed jobs again (--max-restarts), it waits up to LEASE seconds for one
    that is still there.

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
        # Where there are no locks, nobody knows whether an evaluation is running.
        with suppress(OSError):
            if _take(handle, EVALUATIONS):
                _clean_up(Path(output_dir))
                _give_back(handle, EVALUATIONS)
        yield
    finally:
        _LOCKED.remove(folder)
        os.close(handle)


@contextmanager
def evaluation_in(output_dir: str) -> Iterator[None]:
    """Have trainings that start in OUTPUT_DIR meanwhile leave unfinished files alone.

    In the process of a training there, and where there are no locks, it does nothing.
    """
    if not fcntl or os.path.realpath(output_dir) in _LOCKED:
        yield
        return
    handle = _open(output_dir)
    try:
        with suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_SH, 1, EVALUATIONS)
        yield
    finally:
        os.close(handle)


def _clean_up(root: Path) -> None:
    for folder in (root, *root.glob("inference/*"), *root.glob("ema/inference/*")):
        remove_unfinished(folder)


def _open(folder: str) -> int:
    os.makedirs(folder, exist_ok=True)
    return os.open(os.path.join(folder, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)


def _lock(folder: str) -> int:
    """The descriptor of the lock's file, which holds the lock until it is closed."""
    handle = _open(folder)
    may_be_restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    end = time.monotonic() + LEASE * may_be_restarted
    try:
        while not _take(handle, TRAINING):
            if time.monotonic() >= end:
                holder = os.pread(handle, 1000, 0).decode(errors="replace").strip()
                os.close(handle)
                raise InputError(
                    f"OUTPUT_DIR: a training is running in {folder} ({holder or 'unknown process'})"
                )
            time.sleep(1)
    except OSError as error:
        logger.warning(f"OUTPUT_DIR: {folder} can't be locked against other trainings: {error}")
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def _take(handle: int, byte: int) -> bool:
    """Lock a byte of the file for this process alone; False if others have locked it.

    Raises:
        OSError: there are no locks.
    """
    try:
        if fcntl:
            # Unlike flock's, it is not inherited by a loader's worker that outlives a killed run.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _give_back(handle: int, byte: int) -> None:
    if fcntl:
        fcntl.lockf(handle, fcntl.LOCK_UN, 1, byte)
