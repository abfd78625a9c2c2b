"""Reading .pth files and state dicts of others, of tensors only."""

from __future__ import annotations

import os
import pickletools
import re
import warnings
import zipfile
from typing import Any, BinaryIO, Dict, Iterator

import torch

from ..errors import InputError
from .inputs import check_regular

# How torch names what it does not read.
REFUSED = re.compile(r"GLOBAL ([\w.]+)")

# Bytes of a tensor that the file holds a part of, repeated: it takes no memory until it is copied.
MAX_EXPANDED = 2**28

# Integers of more than 32 bits are numbers of elements and seeds: there are few. Of many, a file
# could make keys of the same hash, and a dict of them takes a time that grows with their square.
MAX_LARGE_INTEGERS = 1000


def read_pth(path: str, shown: str) -> Any:
    """Read a .pth file of tensors, numbers, strings and containers.

    Args:
        path: a local file.
        shown: what a message starts with.
    Raises:
        InputError: the file can't be read, or contains anything else, which is named; pickled code
            is never executed.
    """
    try:
        check_regular(path)
        _check_size(path)
        for pickled in _pickles(path):
            _check_integers(pickled)
        with warnings.catch_warnings():
            # Of old formats and of kinds of tensors, which are refused below.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_storages(content, os.path.getsize(path))
        # A pickle can give other attributes to a class that extends dict, also `items`.
        return dict(dict.items(content)) if isinstance(content, dict) else content
    except OSError as error:
        raise InputError(f"{shown}: {error.strerror or error}") from None
    except Exception as error:  # of a damaged file torch's unpickler raises nearly anything
        raise InputError(
            f"{shown}: not a .pth file of tensors only; nothing else is read: {_reason(error)}"
        ) from None


def plain_state_dict(state: Any, shown: str) -> Dict[str, torch.Tensor]:
    """A state dict, after a check that it is one, of tensors of numbers with values.

    Raises:
        InputError: it is something else, or a name is no text; or a tensor is meta, sparse,
            quantised, complex, nested, or larger than what the file holds of it.
    """
    if not isinstance(state, dict):
        raise InputError(f"{shown}: it holds no state dict")
    tensors = dict(dict.items(state))
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise InputError(f"{shown}: it holds no state dict: {_shorten(name)} is no name")
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{shown}: it holds no state dict: {_shorten(name)} is no tensor of numbers"
            )
        kind = _unusual(tensor)
        if kind:
            raise InputError(f"{shown}: {_shorten(name)} is a tensor that can't be used: {kind}")
    return tensors


def _unusual(tensor: torch.Tensor) -> str:
    """What a tensor is that a model can't have; "" for a usual one."""
    if tensor.is_meta:
        return "meta, without values"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.is_complex():
        return f"complex ({tensor.dtype})"
    size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > max(stored, MAX_EXPANDED):
        return f"{size} bytes of which the file holds {stored}"
    return ""


def _check_storages(content: Any, most: int) -> None:
    """torch 2.6 takes a tensor's size from the pickle, and reads beyond the file's bytes."""
    sizes: Dict[int, int] = {}
    left, seen = [content], set()
    while left:
        value = left.pop()
        # A pickle can have a list that contains itself.
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += dict.values(value)
        elif isinstance(value, (list, tuple)):
            left += value
        elif isinstance(value, torch.Tensor) and _has_storage(value):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    if sum(sizes.values()) > most:
        raise ValueError("its tensors are larger than the file")


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _check_size(path: str) -> None:
    """torch.save compresses nothing: what claims to be larger than the file is damaged."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        size = sum(entry.file_size for entry in file.infolist())
    if size > os.path.getsize(path):
        raise ValueError(f"its parts are of {size} bytes, more than the file")


def _pickles(path: str) -> Iterator[BinaryIO]:
    """The pickles that torch runs, one after the other."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl"):
                    with archive.open(entry) as file:
                        yield file
    else:
        with open(path, "rb") as file:
            # torch before 1.6: a magic number, a version, the system, the content, and the names of
            # the storages, which follow.
            for _ in range(5):
                yield file


def _check_integers(pickled: BinaryIO) -> None:
    left = MAX_LARGE_INTEGERS
    instructions = pickletools.genops(pickled)
    while True:
        try:
            _, argument, _ = next(instructions)
        # It ends, or is damaged: torch's machine comes no further than here, and says so.
        except Exception:
            return
        if isinstance(argument, int) and abs(argument) >= 2**32:
            left -= 1
        if left < 0:
            raise ValueError(f"it has more than {MAX_LARGE_INTEGERS} integers of over 32 bits")


def _reason(error: Exception) -> str:
    """What torch says of a file, without its advice to read it with weights_only=False."""
    text = str(error)
    refused = REFUSED.search(text)
    if refused:
        return f"it asks for {refused[1]}"
    text = text.split("WeightsUnpickler error: ")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if "weights_only" not in line] or [type(error).__name__]
    return _shorten(lines[0])


def _shorten(value: Any) -> str:
    """A name or message of a file's author as a part of one line."""
    text = value if isinstance(value, str) else repr(value)
    return text[:200] if text.isprintable() else ascii(text[:200])
