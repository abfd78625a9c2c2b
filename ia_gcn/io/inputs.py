"""Opening files of others by name."""

from __future__ import annotations

import errno
import os
from typing import IO, Any


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a named pipe, which would be waited for, and a device, which may have no end.

    Nothing is said of what is missing, a folder, or a name that isn't a file's.

    Raises:
        OSError: it is neither a file nor a folder; names it.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def open_input(path: str | os.PathLike[str], mode: str = "r", **options: Any) -> IO:
    """`PathManager.open` to read, of anything but pipes and devices.

    Raises:
        OSError: it can't be opened; or see `check_regular`.
    """
    # Exported models run without detectron2.
    from detectron2.utils.file_io import PathManager

    check_regular(path)
    return PathManager.open(path, mode, **options)
