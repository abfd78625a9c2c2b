"""From the names of a source's head to those of ours, with its labels in another order."""

from __future__ import annotations

from typing import Dict, Iterable, NamedTuple, Sequence, Tuple

import torch

from ..errors import InputError

HEAD = "label_head."


class Place(NamedTuple):
    """Where a source's tensor goes."""

    name: str
    """In the head."""
    label_dims: Tuple[int, ...] = ()
    """Its dimensions that are over the labels."""
    ndim: int | None = None
    """How many dimensions it has here, if it has more in the source, or fewer, whose size is 1."""


def convert_head(
    state_dict: Dict[str, torch.Tensor], places: Dict[str, Place], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """The tensors that have a place, under the names of a model.

    Args:
        state_dict: of the source; it may have more.
        places: by the source's names.
        order: the places in the source of the C labels of the model.
    """
    converted = {}
    for source, place in places.items():
        if source not in state_dict:
            continue
        tensor = state_dict[source]
        for dim in place.label_dims:
            tensor = tensor.index_select(dim, torch.as_tensor(order))
        while place.ndim is not None and tensor.ndim < place.ndim:
            tensor = tensor[..., None]
        while place.ndim is not None and tensor.ndim > place.ndim and tensor.shape[-1] == 1:
            tensor = tensor[..., 0]
        converted[f"{HEAD}{place.name}"] = tensor
    return converted


def layer(
    source: str, name: str, label_dims: Tuple[int, ...] = (), ndim: int | None = None
) -> Dict[str, Place]:
    """Places of a layer's weight and bias; the bias is over the labels if the weight's rows are."""
    bias_dims = (0,) if 0 in label_dims else ()
    return {
        f"{source}.weight": Place(f"{name}.weight", label_dims, ndim),
        f"{source}.bias": Place(f"{name}.bias", bias_dims),
    }


def batch_norm(source: str, name: str) -> Dict[str, Place]:
    """Places of the tensors of a batch norm."""
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{source}.{tensor}": Place(f"{name}.{tensor}") for tensor in tensors}


def check_source(
    state_dict: Dict[str, torch.Tensor], places: Iterable[str], system: str, labels: str
) -> int:
    """C, the number of labels of a source that has the tensors of a system.

    Args:
        places: names that it must have.
        system: its name, for the message.
        labels: the tensor whose first dimension is C.
    Raises:
        InputError: a tensor is not there, or has not a row for each of C labels.
    """
    missing = [name for name in places if name not in state_dict]
    if missing:
        raise InputError(f"it has no {missing[0]}, which {system}'s checkpoints have")
    if not state_dict[labels].ndim:
        raise InputError(f"{labels} is a number")
    return len(state_dict[labels])
