"""A limit on the model that a checkpoint's config asks for."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch.overrides import TorchFunctionMode

from ..errors import InputError

# A model may be of more bytes than its file: half precision becomes single. What is made on the way
# counts as well.
MAX_GROWTH = 4
MIN_SIZE = 2**26

# Of a tensor and its module, beside its numbers.
OVERHEAD = 2**12

# What makes a tensor of a size that is given; modules make theirs by them.
FACTORIES = {
    *(torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand),
    *(torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros),
}


class Allowance(TorchFunctionMode):
    """While it is entered, no more tensors are made than the weights in a file can fill.

    The size of a tensor is found before it is made.

    Raises:
        InputError: naming the file.
    """

    def __init__(self, path: str):
        """
        Args:
            path: of a checkpoint; of one that can't be found there is no limit.
        """
        super().__init__()
        self.path = path
        self.total = self.left = _limit(path)

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("out") is None:
            options = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory")}
            self.left -= OVERHEAD + func(*args, **{**options, "device": "meta"}).nbytes
            if self.left < 0:
                raise InputError(
                    f"MODEL.WEIGHTS: the config asks for a model of more than {self.total >> 20} "
                    f"MiB, for which {self.path} is too small"
                )
        return func(*args, **kwargs)


def _limit(path: str) -> float:
    """In bytes."""
    try:
        return MAX_GROWTH * os.path.getsize(PathManager.get_local_path(path)) + MIN_SIZE
    # What reads the file says what is wrong with it.
    except Exception:
        return math.inf
