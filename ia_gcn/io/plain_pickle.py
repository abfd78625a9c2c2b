"""Reading pickles of plain data without executing code in them.

A pickle is a program for a machine with a stack. Python's own machine, in C, calls what the program
names, trusts its sizes, and lets it set the state of whatever it has made; numpy's classes take
pointers from such states. Here the machine in Python runs, reduced to the instructions that plain
data needs, and nothing of numpy is called but by functions of ours, which check all they get.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
from typing import Any, BinaryIO, Dict, Tuple

import numpy as np

from ..errors import InputError

# Others hold pointers, or are not of numbers. By the names that numpy pickles them with.
DTYPES = {
    name: np.dtype(name)
    for name in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}

# Containers inside each other.
MAX_DEPTH = 50

# Integers beyond this fit into no array and no tensor.
MAX_INTEGER = 2**64

# Python's hash of an integer is the integer up to here; above, any number of integers can have the
# same one, and a dict of them takes a time that grows with their square.
MAX_KEY = 2**60

# What is read may be larger than its file, as the file can name a thing more than once.
MAX_GROWTH = 16
MIN_SIZE = 2**20

INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "EMPTY_LIST", "APPEND"),
    *("APPENDS", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS"),
)


def load_plain_pickle(file: BinaryIO, name: str) -> Any:
    """Numbers, strings, containers and numpy arrays from a pickle; anything else is refused.

    Containers are lists, tuples, and dicts whose keys are strings, bytes or integers. Arrays are
    of booleans, integers or real numbers; they may be read-only.

    Args:
        file: open for reading bytes, with `seek`; Python 2's pickles are read as well.
        name: of the file, for the message.
    Raises:
        InputError: it is no pickle, is damaged, or needs any other class or function, which is
            named; or what is in it is nested too deeply, or much larger than the file.
    """
    try:
        machine = _Machine(_Source(file))
        value = machine.load()
        machine.spend(_weigh(value, {}))
        return value
    # A damaged or hostile pickle can make the machine raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{name}: not a pickle of numbers and arrays alone, and nothing else is read: {reason}"
        ) from None


class _Source:
    """A file for the machine: no more is asked of it than it has left."""

    def __init__(self, file: BinaryIO):
        start = file.tell()
        self.size = self.left = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        self.file = file

    def read(self, n: int) -> bytes:
        if not 0 <= n <= self.left:
            raise pickle.UnpicklingError("it ends early")
        self.left -= n
        return self.file.read(n)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


class _Instructions(dict):
    def __missing__(self, opcode: int):
        raise pickle.UnpicklingError(f"it has the instruction {opcode:#04x}")


class _Unfinished:
    """What a pickle gives its state only later: a dtype or an array."""

    place: int | None = None
    """Where it is in the memo."""


class _DType(_Unfinished):
    def __init__(self, name: str, *options: Any):
        self.name = name


class _Array(_Unfinished):
    pass


class _Memo(Dict[int, Any]):
    def __setitem__(self, place: int, value: Any) -> None:
        super().__setitem__(place, value)
        if isinstance(value, _Unfinished):
            value.place = place


# The machine's methods by what a pickle calls them. numpy 2 and 1 have two names for a module.
KNOWN = {
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "no_bytes",
    ("builtins", "bytes"): "no_bytes",
    ("collections", "OrderedDict"): "ordered_dict",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{
        (f"numpy.{core}.{module}", name): method
        for core in ("core", "_core")
        for module, name, method in (
            ("multiarray", "_reconstruct", "new_array"),
            ("multiarray", "scalar", "scalar"),
            ("numeric", "_frombuffer", "array"),
        )
    },
}


# Python's own is extended by others too, such as joblib.
class _Machine(pickle._Unpickler):
    def __init__(self, source: _Source):
        super().__init__(source, encoding="latin1")
        self.memo = _Memo()
        self.budget = MAX_GROWTH * source.size + MIN_SIZE

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return getattr(self, KNOWN[module, name])

    def spend(self, size: int) -> None:
        """Of the bytes that may be made of this file."""
        self.budget -= size
        if self.budget < 0:
            raise pickle.UnpicklingError("it is of far more data than it has bytes")

    # What a pickle may call.

    ndarray, dtype = _Array, _DType

    def encode(self, text: str, encoding: str = "latin1") -> bytes:
        """How protocols below 3 write bytes."""
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"bytes in {encoding}")
        self.spend(len(text))
        return text.encode("latin1")

    def no_bytes(self) -> bytes:
        """How protocols below 3 write those of an empty array."""
        return b""

    def ordered_dict(self, pairs: Any = ()) -> collections.OrderedDict:
        result = collections.OrderedDict()
        for key, value in pairs:
            _set_item(result, key, value)
        return result

    def new_array(self, kind: Any, shape: Any, code: Any) -> _Array:
        if kind is not _Array:
            raise pickle.UnpicklingError("an array of another class than numpy.ndarray")
        return _Array()

    def array(
        self, data: Any, dtype: Any, shape: Any, order: str = "C", axes: Any = None
    ) -> np.ndarray:
        """An array on the bytes that are there; arguments as numpy's own `_frombuffer`."""
        if type(data) is str:
            data = self.encode(data)
        if not isinstance(dtype, np.dtype) or type(data) is not bytes:
            raise pickle.UnpicklingError("an array of something else than plain numbers")
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array whose shape is no tuple of sizes")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(data)} bytes")
        self.spend(len(data))
        if dtype.kind == "b" and data.strip(b"\0\1"):
            raise pickle.UnpicklingError("an array of booleans with other bytes than 0 and 1")
        if order == "K" and axes is not None:
            return np.ndarray(shape, dtype, data).transpose(axes)
        return np.ndarray(shape, dtype, data, order="F" if order == "F" else "C")

    def scalar(self, dtype: Any, data: Any) -> np.generic:
        return self.array(data, dtype, ())[()]

    # The instructions that differ from Python's.

    dispatch = _Instructions(
        {
            opcode[0]: pickle._Unpickler.dispatch[opcode[0]]
            for opcode in (getattr(pickle, name) for name in INSTRUCTIONS)
        }
    )
    # Python's own makes room for as many bytes as it says before they are there.
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8

    def load_mark(self) -> None:
        if len(self.metastack) > MAX_DEPTH:
            raise pickle.UnpicklingError("containers in each other, too deeply")
        super().load_mark()

    dispatch[pickle.MARK[0]] = load_mark

    def load_build(self) -> None:
        state, unfinished = self.stack.pop(), self.stack[-1]
        if isinstance(unfinished, _Array):
            _, shape, dtype, is_fortran, data = state
            value = self.array(data, dtype, shape, "F" if is_fortran else "C")
        elif isinstance(unfinished, _DType):
            if unfinished.name not in DTYPES:
                raise pickle.UnpicklingError(f"an array of {unfinished.name}")
            value = DTYPES[unfinished.name]
            if state[1] == ">":
                value = value.newbyteorder(">")
        else:
            raise pickle.UnpicklingError("a state of something else than an array")
        self.stack[-1] = value
        if unfinished.place is not None:
            self.memo[unfinished.place] = value

    dispatch[pickle.BUILD[0]] = load_build

    def load_append(self) -> None:
        value = self.stack.pop()
        _list(self.stack[-1]).append(value)

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        values = self.pop_mark()
        _list(self.stack[-1]).extend(values)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_item(self.stack[-1], key, value)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in _pairs(items):
            _set_item(self.stack[-1], key, value)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        result: Dict[Any, Any] = {}
        for key, value in _pairs(self.pop_mark()):
            _set_item(result, key, value)
        self.append(result)

    dispatch[pickle.DICT[0]] = load_dict


def _list(value: Any) -> list:
    if type(value) is not list:
        raise pickle.UnpicklingError("an item of something else than a list")
    return value


def _pairs(items: list) -> Any:
    return zip(items[::2], items[1::2])


def _set_item(target: Any, key: Any, value: Any) -> None:
    if type(target) not in (dict, collections.OrderedDict):
        raise pickle.UnpicklingError("an item of something else than a dict")
    if isinstance(key, (int, np.integer)):
        usable = -MAX_KEY < key < MAX_KEY
    else:
        usable = type(key) in (str, bytes)
    if not usable:
        raise pickle.UnpicklingError(f"a key of a dict of the class {type(key).__name__}")
    target[key] = value


def _weigh(value: Any, known: Dict[int, int | None], depth: int = 0) -> int:
    """How many bytes and objects a value is of, with each as often as it is named.

    A list of ten times the same list, and so on for some levels, is small until somebody looks at
    all of it.

    Args:
        known: what containers weigh by their id; None for those around the value.
        depth: how many these are.
    Raises:
        UnpicklingError: it is not plain, is nested too deeply, or contains itself.
    """
    kind = type(value)
    if value is None or kind in (bool, float) or isinstance(value, np.generic):
        return 1
    if kind is int:
        if not -MAX_INTEGER < value < MAX_INTEGER:
            raise pickle.UnpicklingError("an integer of more than 64 bits")
        return 1
    if kind is bytes:
        return len(value)
    if kind is str:
        value.encode()  # half of a character is an error
        return len(value)
    if kind is np.ndarray:
        return value.nbytes
    parts: Tuple = ()
    if kind in (dict, collections.OrderedDict):
        parts = (*value.keys(), *value.values())
    elif kind in (list, tuple):
        parts = tuple(value)
    else:
        raise pickle.UnpicklingError(f"something unfinished: {kind.__name__}")
    weight = known.get(id(value), 0)
    if weight is None or depth >= MAX_DEPTH:
        raise pickle.UnpicklingError("containers in each other, too deeply")
    if not weight:
        known[id(value)] = None
        weight = 1 + sum(_weigh(part, known, depth + 1) for part in parts)
        known[id(value)] = weight
    return weight
