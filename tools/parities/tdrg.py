"""TDRG: with attention to the batch, as it is published, and to the image."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import torch
import torchvision
from torch import nn

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, imagenet, import_authors

REPOSITORY = "https://github.com/iCVTEAM/TDRG"
REPLACED = "`.cuda()`; of `image`, the order of the encoder's dimensions"


def cases(folder: Path) -> Iterator[Case]:
    """On COCO's labels."""
    torch.Tensor.cuda = lambda self: self
    published = import_authors(folder, "models.TDRG")

    class Fused(published.TDRG):
        """All its outputs, by our names; the weights are those of its trainer."""

        def forward(self, images):
            structure, graph, activation = super().forward(images)
            return {
                "logits": 0.7 * structure + 0.3 * graph,
                "structure": structure,
                "graph": graph,
                "activation": activation,
            }

    for attends_to in ("batch", "image"):
        network = Fused(torchvision.models.resnet101(), 80)
        if attends_to == "image":
            put_batch_first(network)
        yield Case(
            name=f"ResNet-101, 224, attention to the {attends_to}",
            network=network,
            labels=sorted(COCO_LABELS),
            prepare=imagenet,
            checkpoint=lambda state: {"epoch": 50, "model_name": "TDRG", "state_dict": state},
            arguments={"opts": ["MODEL.TDRG.ATTENTION", attends_to]},
            size=224,
        )


def put_batch_first(network: nn.Module) -> None:
    """Let the cells of an image attend to each other; the mask, of no padding, has no effect."""
    for layer in network.transformer.encoder.layers:
        attention = layer.self_attn
        attention.batch_first = True
        layer.self_attn.forward = without_mask(attention.forward)


def without_mask(forward):
    def attend(query, key, value, attn_mask=None, key_padding_mask=None):
        return forward(query, key, value)

    return attend
