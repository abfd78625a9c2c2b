"""ML-Decoder on TResNets, as its authors build it."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Dict, Iterator, List

import numpy as np
import torch
from torch import nn

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, from_0_to_1, import_authors
from ._inplace_abn import module as inplace_abn

REPOSITORY = "https://github.com/Alibaba-MIIL/ML_Decoder"
REPLACED = (
    "inplace_abn, by torch's batch norm; nn.TransformerDecoder's loop over one layer, which asks "
    "the layer for a self-attention"
)

# The name, number of labels and groups, and image size of the published models; 0: not given.
PUBLISHED = [
    ("tresnet_m", 80, 0, 224),
    ("tresnet_l", 80, 0, 448),
    ("tresnet_m", 9605, 200, 224),
]


def cases(folder: Path) -> Iterator[Case]:
    """The published sizes, and the zero-shot model, with a shared classifier."""
    models = import_authors(folder, "src_files.models", {"inplace_abn": inplace_abn()})
    for name, count, groups, size in PUBLISHED:
        labels = COCO_LABELS if count == 80 else names(count)
        yield Case(
            name=f"{name}, {count} labels" + f" in {groups} groups" * bool(groups),
            network=build(models, name, count, groups),
            labels=labels,
            prepare=from_0_to_1,
            checkpoint=checkpoint(labels),
            size=size,
        )

    labels = names(81)
    network = build(models, "tresnet_m", 925, 925, zsl=1)
    words = torch.randn(len(labels), 300, generator=torch.Generator().manual_seed(3))
    # A buffer, so that it gets the network's dtype.
    del network.head.decoder.query_embed
    network.head.decoder.register_buffer("query_embed", words, persistent=False)
    with tempfile.TemporaryDirectory() as temporary:
        embeddings = f"{temporary}/words.npy"
        np.save(embeddings, words.numpy())
        yield Case(
            name="tresnet_m, zero-shot, 81 labels",
            network=network,
            labels=labels,
            prepare=from_0_to_1,
            checkpoint=checkpoint(labels),
            arguments={"embeddings": embeddings},
            size=224,
        )


def build(models, name: str, num_labels: int, groups: int, zsl: int = 0) -> nn.Module:
    """A network with random weights."""
    args = Namespace(
        model_name=name,
        model_path=None,
        num_classes=num_labels,
        use_ml_decoder=1,
        num_of_groups=groups or -1,
        decoder_embedding=768,
        zsl=zsl,
    )
    network = models.create_model(args)
    (layer,) = network.head.decoder.layers
    network.head.decoder.forward = layer.forward
    return network


def checkpoint(labels: List[str]):
    """As their published files are."""
    idx_to_class: Dict[int, str] = dict(enumerate(labels))
    return lambda state: {"model": state, "idx_to_class": idx_to_class}


def names(count: int) -> List[str]:
    return [f"label {i}" for i in range(count)]
