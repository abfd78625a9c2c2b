"""Recognisers of configs/DigitScenes with random weights, as if they were trained."""

from __future__ import annotations

import os
from typing import Dict, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.data.datasets import DIGIT_LABELS
from ia_gcn.engine import Trainer, setup_cfg

from .commands import ROOT

CONFIGS = sorted(
    path.stem
    for path in (ROOT / "configs/DigitScenes").glob("*.yaml")
    if not path.name.startswith("Base-")
)
# Options of their networks that take little time and space.
NARROW = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RPN.CONV_DIMS": [8],
}
SMALL = {"MODEL.DEVICE": "cpu", "MODEL.LABEL_EMBEDDINGS.DIM": 12, **NARROW}
IMAGE_SIZE = 96


def build_model(config: str, *opts) -> Tuple[CfgNode, nn.Module]:
    """The config and the narrow model, on the CPU, of a config's name.

    The label graph has random statistics; the batch norms have seen noise, and the RPN's boxes are
    of many sizes.
    """
    flat = [item for pair in SMALL.items() for item in pair]
    cfg = setup_cfg(str(ROOT / f"configs/DigitScenes/{config}.yaml"), [*flat, *opts])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    if model.label_graph is not None:
        presence = torch.rand(100, len(DIGIT_LABELS)).lt(0.3).long()
        pair_counts = presence.T @ presence
        embeddings = torch.randn_like(model.label_graph.embeddings)
        model.label_graph.fill(pair_counts.diag(), pair_counts, embeddings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rpn_head" in name and name.endswith("weight"):
                parameter.mul_(30)
        norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.train().momentum = 1.0
        model(make_samples(8, seed=1))
        for norm in norms:
            norm.eval().momentum = 0.1
    return cfg, model


def make_samples(count: int, seed: int = 0) -> List[Dict]:
    """Images of noise with random labels and a box each, as the mapper makes them."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = (3, IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE)
    boxes = Boxes(torch.tensor([[8.0, 8.0, 50.0, 60.0]]))
    return [
        {
            "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            "labels": torch.randint(0, 2, (len(DIGIT_LABELS),), generator=generator).float(),
            "file_name": f"{i}.png",
            "instances": Instances(size, gt_boxes=boxes),
        }
        for i in range(count)
    ]


def save_model(folder, cfg: CfgNode, model: nn.Module) -> str:
    """The path of its checkpoint, a new file model.pth in the folder."""
    checkpointer = MultiLabelCheckpointer(
        model, str(folder), label_names=list(DIGIT_LABELS), config=cfg.dump()
    )
    checkpointer.save("model")
    return os.path.join(folder, "model.pth")
