"""Matching the tensors of a file with those of a model."""

from __future__ import annotations

from collections import Counter
from typing import Dict, Iterable, List, NamedTuple, Sequence

import torch

from ..errors import InputError

# How many names a message lists.
MAX_LISTED = 5

# Of a batch norm: how many batches it saw. Old files and frozen norms have none, and with a
# momentum, as all networks here have, it has no effect.
COUNTER = ".num_batches_tracked"


class Match(NamedTuple):
    """Which tensors of a file and of a model were matched."""

    taken: Dict[str, torch.Tensor]
    """Those of the file that have a place in the model, as the model has them: name and dtype."""
    unmatched: List[str]
    """Names in the file without a place in the model."""
    misshaped: List[str]
    """Names, each with its shape in the file and in the model."""
    missing: List[str]
    """Names in the model that the file lacks."""


def match_tensors(tensors: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> Match:
    """Match tensors by name and shape.

    Args:
        tensors: of the file, under the model's names.
        expected: of the model, or the part of it that is to be filled.
    """
    match = Match({}, [], [], [])
    for name, tensor in tensors.items():
        place = expected.get(name)
        if place is None:
            if not name.endswith(COUNTER):
                match.unmatched.append(name)
        elif tensor.shape != place.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(place.shape)} in the model"
            match.misshaped.append(f"{name} {shapes}")
        else:
            # A view would be saved with its whole base tensor.
            match.taken[name] = tensor.to(place.dtype).clone(memory_format=torch.contiguous_format)
    for name in expected:
        if name in tensors:
            continue
        if not name.endswith(COUNTER):
            match.missing.append(name)
        elif name.replace(COUNTER, ".running_mean") in match.taken:
            match.taken[name] = torch.zeros((), dtype=torch.int64)
    return match


def without_dimension(tensors: Dict[str, torch.Tensor], size: int) -> Dict[str, torch.Tensor]:
    """Leave out tensors with a dimension of `size`, the number of labels.

    The backbone and the RPN know no labels and are kept.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(("backbone.", "proposal_generator.")) or size not in tensor.shape
    }


def check_match(match: Match, shown: str) -> None:
    """Raise an error unless all tensors match.

    Args:
        shown: the file, for the message.
    Raises:
        InputError: a tensor is unmatched, misshaped or missing; names some of each.
    """
    wrong = {
        "without a place in the model": match.unmatched,
        "of another shape": match.misshaped,
        "of the model that it lacks": match.missing,
    }
    parts = [f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names]
    if parts:
        raise InputError(f"{shown}: tensors do not match: {'; '.join(parts)}")


def describe_names(title: str, names: Sequence[str]) -> str:
    """A line with their number, and one for each group of them: backbone.res2 (30)."""
    groups = Counter(".".join(name.split(".")[:2]) for name in names)
    lines = [f"  {group} ({count})" for group, count in groups.items()]
    return "\n".join([f"{title}: {len(names)} tensors", *lines])


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_LISTED]) + (" ..." if len(names) > MAX_LISTED else "")
