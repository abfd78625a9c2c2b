"""SALGL, with random label embeddings and counts; the options of its command are its defaults."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, imagenet, import_authors

REPOSITORY = "https://github.com/jasonseu/SALGL"
REPLACED = "`.cuda()`"

# What its command line has by default, and what else it can have.
DEFAULTS = {
    "backbone": "resnet101",
    "num_classes": 80,
    "num_scenes": 4,
    "num_steps": 3,
    "img_size": 224,
    **dict.fromkeys(("pos", "outmess", "normalize", "ignore_self", "soft", "distributed"), False),
}
OTHERS = dict.fromkeys(("pos", "outmess", "normalize", "ignore_self", "soft"), True)
OTHER_OPTS = [
    *("MODEL.SALGL.NORMALIZE", True, "MODEL.SALGL.SOFT_SCENES", True),
    *("MODEL.SALGL.SELF_EDGES", False),
]


def cases(folder: Path) -> Iterator[Case]:
    """On COCO's labels: with the options' defaults, and with all of them the other way."""
    torch.Tensor.cuda = lambda self: self
    published = import_authors(folder, "models.salgl")

    class Logits(published.SALGL):
        def forward(self, images):
            return super().forward(images)["logits"]

    with tempfile.TemporaryDirectory() as files:
        embeddings = f"{files}/bert.npy"
        np.save(embeddings, np.random.default_rng(0).standard_normal((80, 768)))
        for name, options, opts in (("", {}, []), (", all options", OTHERS, OTHER_OPTS)):
            cfg = Namespace(**{**DEFAULTS, **options}, embed_type="bert", embed_path=embeddings)
            backbone = published.create_backbone("resnet101", False)[0]
            network = Logits(backbone, 2048, cfg)
            counts = torch.randint(0, 50, (4, 80, 80), generator=torch.Generator().manual_seed(0))
            network.comatrix.copy_(counts + counts.mT)
            network.comatrix.diagonal(dim1=1, dim2=2).add_(200)
            yield Case(
                name=f"ResNet-101, 224{name}",
                network=network,
                labels=COCO_LABELS,
                prepare=imagenet,
                # As the EMA of the weights is saved.
                checkpoint=lambda state: {f"module.{name}": x for name, x in state.items()},
                arguments={"opts": opts},
                size=224,
            )
