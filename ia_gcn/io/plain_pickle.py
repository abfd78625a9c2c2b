"""Reading pickles of plain data without executing code in them."""

from __future__ import annotations

import collections
import pickle
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError

_rebuild_array = np.zeros(0).__reduce__()[0]
_rebuild_scalar = np.float64(0).__reduce__()[0]
_rebuild_from_buffer = np.zeros(1).__reduce_ex__(5)[0]


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocols below 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


# numpy 2 and numpy 1 call the same module by two names.
ALLOWED = {
    ("_codecs", "encode"): _encode_latin1,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _rebuild_array),
            ("multiarray", "scalar", _rebuild_scalar),
            ("numeric", "_frombuffer", _rebuild_from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def load_plain_pickle(file: BinaryIO, name: str) -> Any:
    """Numbers, strings, containers and numpy arrays from a pickle; anything else is refused.

    Args:
        file: open for reading bytes; Python 2's pickles are read as well.
        name: of the file, for the message.
    Raises:
        InputError: it is no pickle, is damaged, or needs any other class or function, which is
            named.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    # A damaged or hostile pickle can make the unpickler raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: not a pickle of numbers and arrays alone, and nothing else is read: {reason}"
        ) from None
