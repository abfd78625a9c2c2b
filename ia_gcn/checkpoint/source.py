"""Reading other projects' checkpoints without executing pickled code."""

from __future__ import annotations

from typing import Any, Dict

import numpy as np
import torch

from ..errors import InputError
from ..io.inputs import open_input
from ..io.plain_pickle import load_plain_pickle
from ..io.pth import plain_state_dict, read_pth


def read_source(path: str, shown: str) -> Dict[str, Any]:
    """The content of a file: of a .pkl numbers, strings, containers and numpy arrays; of any other,
    which is a .pth whatever its name, the same with tensors in place of the arrays.

    Args:
        path: a local file.
        shown: what a message starts with.
    Raises:
        InputError: it can't be read, contains anything else, or is no dict.
    """
    content = (read_pickle if path.endswith(".pkl") else read_pth)(path, shown)
    if not isinstance(content, dict):
        raise InputError(f"{shown} holds no state dict")
    return content


def read_pickle(path: str, shown: str) -> Any:
    """What `load_plain_pickle` makes of a file.

    Raises:
        InputError: as its; or the file can't be read.
    """
    try:
        with open_input(path, "rb") as file:
            return load_plain_pickle(file, shown)
    except OSError as error:
        raise InputError(f"{shown}: {error.strerror or error}") from None


def state_dict_of(content: Dict[str, Any], shown: str) -> Dict[str, torch.Tensor]:
    """The state dict in a checkpoint: itself, or under `model` or `state_dict`, or both in turn.

    The prefix `module.` of DataParallel is removed.

    Raises:
        InputError: something in it is not a tensor, or an array of numbers, by a name.
    """
    state_dict = content
    for _ in range(2):
        inner = dict.get(state_dict, "model", dict.get(state_dict, "state_dict"))
        state_dict = inner if isinstance(inner, dict) else state_dict
    if not state_dict:
        raise InputError(f"{shown} holds no state dict")
    state_dict = plain_state_dict(
        {name: _from_numpy(value) for name, value in dict.items(state_dict)}, shown
    )
    wrapped = all(name.startswith("module.") for name in state_dict)
    return {
        name.removeprefix("module.") if wrapped else name: tensor
        for name, tensor in state_dict.items()
    }


def _from_numpy(value: Any) -> Any:
    """An array as a tensor, if torch has its dtype; anything else as it is."""
    try:
        return torch.tensor(value) if isinstance(value, np.ndarray) else value
    except (TypeError, ValueError):
        return value
