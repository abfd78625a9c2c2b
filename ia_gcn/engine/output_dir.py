"""The folder of a run."""

from __future__ import annotations

from ..errors import InputError
from ..io.files import check_writable


def make_output_dir(folder: str) -> None:
    """Make OUTPUT_DIR if needed.

    Raises:
        InputError: it can't be made or written to.
    """
    try:
        check_writable(folder)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {folder}: {error.strerror or error}") from None
