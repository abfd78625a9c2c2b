"""ADD-GCN, with both scores' mean as its trainer takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import torchvision

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, imagenet, import_authors

REPOSITORY = "https://github.com/Yejin0111/ADD-GCN"
REPLACED = ""


def cases(folder: Path) -> Iterator[Case]:
    """On COCO's labels."""
    published = import_authors(folder, "models.add_gcn")

    class Mean(published.ADD_GCN):
        def forward(self, images):
            highest, graph = super().forward(images)
            return (highest + graph) / 2

    yield Case(
        name="ResNet-101, 224",
        network=Mean(torchvision.models.resnet101(), 80),
        labels=sorted(COCO_LABELS),
        prepare=imagenet,
        checkpoint=lambda state: {"epoch": 50, "model_name": "ADD_GCN", "state_dict": state},
        size=224,
    )
