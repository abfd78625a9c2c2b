"""Settings of the C library for freed memory, and how much of it there is."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Dict, Iterator

# Where the files of /proc and /sys are.
SYSTEM = Path("/")
# Names and numbers of glibc's malloc.h. The sizes are in bytes.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocations (glibc's mallopt).

    By default glibc returns every large buffer to the kernel, which clears each page again when the
    next one is allocated: a training step on a CPU spends up to a third of its time there. The
    process keeps its peak of memory until it ends. Processes that are forked from it, such as a
    data loader's workers, do the same.

    Returns:
        whether it has an effect. With another C library, nothing changes.
    """
    return _mallopt(SETTINGS)


def share_freed_memory() -> bool:
    """Let the threads of this process share the memory that they free (glibc's mallopt).

    By default each thread that decodes a large image keeps some of its memory for itself, even if
    only one of them decodes at a time. To be called before the threads start.

    Returns:
        whether it has an effect. With another C library, nothing changes.
    """
    return _mallopt({M_ARENA_MAX: 1})


def available_memory() -> int | None:
    """Bytes that this process can still get; None where the system doesn't say.

    That is of its machine, and of its control groups (cgroup v2), such as a container's.
    """
    meminfo = SYSTEM / "proc/meminfo"
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min([1024 * int(lines["MemAvailable"].split()[0]), *_left_by_groups()])


def check_memory(needed: int, what: str) -> None:
    """Refuse what takes more memory than this process can still get.

    Args:
        needed: bytes.
        what: takes it, for the message.
    Raises:
        InputError: it is too much.
    """
    # Here, as the rest of this file can be run without the package.
    from .errors import InputError

    available = available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"{what} needs {needed / 1e9:.0f} GB of memory, and {available / 1e9:.0f} GB are "
            "available"
        )


def _left_by_groups() -> Iterator[int]:
    """Bytes that each control group (v2) with a limit leaves, the process's own and those above."""
    own = SYSTEM / "proc/self/cgroup"
    lines = own.read_text().splitlines() if own.exists() else []
    for path in (line[len("0::/") :] for line in lines if line.startswith("0::/")):
        folder = SYSTEM / "sys/fs/cgroup" / path
        for group in (folder, *folder.parents):
            # Without a limit there is no such file, or it says "max".
            with suppress(OSError, ValueError):
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                content = (group / "memory.stat").read_text().splitlines()
                stat = dict(line.split() for line in content)
                # Pages of files are dropped for what is needed, as MemAvailable takes it.
                files = int(stat["inactive_file"]) + int(stat["active_file"])
                yield max(0, limit - used + files)


def _mallopt(settings: Dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    # macOS and musl have no mallopt; Windows has no CDLL(None).
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, value) for parameter, value in settings.items())
