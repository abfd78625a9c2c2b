"""Parameters, multiply-adds and time of a config's model: without weights, data or embeddings."""

from __future__ import annotations

import timeit
from functools import partial
from statistics import median
from typing import Dict, List, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoint import build_model
from ..errors import InputError

# With smaller images, batch norms have too few values.
MIN_SIZE = 64

# Settings that are always used.
FIXED = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.WEIGHTS", ""),
    *("MODEL.TIMM.PRETRAINED", "False"),
    *("MODEL.TIMM.WEIGHTS_FILE", ""),
    # The batch norms of a frozen stage would have no parameters.
    *("MODEL.BACKBONE.FREEZE_AT", "0"),
]

# The parts of a model, by what the names of its parameters start with.
PARTS = {
    "backbone": ("backbone.",),
    "label_head": ("label_head.",),
    "regions": ("proposal_generator.", "roi_heads.", "region_gcn."),
}


class ModelSize(NamedTuple):
    """The size of a model, and its operations and time per image."""

    image_size: Tuple[int, int]
    """Height and width of the image, in pixels."""
    parameters: Dict[str, int]
    """See `count_parameters`."""
    per_image: int
    """Multiply-adds of an image, see `count_multiply_adds`."""
    once: int
    """Multiply-adds that are independent of the image."""
    seconds: float | None
    """Of an image, see `time_forward`; None where it was not measured."""


def analyze_model(
    cfg: CfgNode, *, image_size: Tuple[int, int] | None = None, rounds: int = 5
) -> ModelSize:
    """Build a config's model with random weights, run it on an image of noise, and measure it.

    It runs on the CPU. Neither weights nor data nor label embeddings are read.

    Args:
        cfg: the config.
        image_size: height and width in pixels; None: INPUT.IMAGE_SIZE.
        rounds: passes whose median is the time; 0: measure no time.
    Raises:
        InputError: the image is too small, or see `build_model`.
    """
    height, width = image_size or cfg.INPUT.IMAGE_SIZE
    if min(height, width) < MIN_SIZE:
        raise InputError(
            f"INPUT.IMAGE_SIZE {height}×{width} (--size): batch norms need {MIN_SIZE} or more"
        )
    cfg = without_weights(cfg)
    torch.manual_seed(0)
    # What a view of a parameter is given to, the counter would want the gradient of.
    model = build_model(cfg).requires_grad_(False)
    image = random_image(height, width, cfg.MODEL.REGION_BRANCH.NUM_REGIONS)
    prepare(model, image)
    per_image, once = count_multiply_adds(model, image)
    seconds = time_forward(model, image, rounds) if rounds else None
    return ModelSize((height, width), count_parameters(model), per_image, once, seconds)


def without_weights(cfg: CfgNode) -> CfgNode:
    """A copy of a config that reads no weights, trains all of the model and is for the CPU."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(FIXED)
    return cfg


def count_parameters(model: nn.Module) -> Dict[str, int]:
    """Parameters of a recogniser by part, and in total.

    The matrix A of a label graph, C×C for C labels, counts as the label head's, as in the published
    sizes of ML-GCN, IML-GCN and ML-AGCN: their codes hold it as a parameter, though it is not
    trained. Label embeddings are data and do not count.

    Returns:
        backbone; label_head; regions, where there are such: of the RPN, the region heads and the
        region GCN; and total, which may have some beside them.
    """
    counts = {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        for part, prefixes in PARTS.items()
    }
    counts["total"] = sum(p.numel() for p in model.parameters())
    if model.label_graph is not None and model.label_graph.has_statistics:
        for part in ("label_head", "total"):
            counts[part] += model.label_graph.lcm.numel()
    if not model.has_regions:
        del counts["regions"]
    return counts


def random_image(height: int, width: int, num_regions: int) -> List[Dict]:
    """A batch of one image of noise, with `num_regions` proposals for a model without an RPN."""
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([width, height, width, height]) / 2
    corners = half * torch.rand(num_regions, 4, generator=generator)
    proposals = Instances((height, width), objectness_logits=torch.zeros(num_regions))
    # From somewhere in the upper left quarter to somewhere in the lower right one.
    proposals.proposal_boxes = Boxes(corners + half * torch.tensor([0, 0, 1, 1]))
    image = (256 * torch.rand(3, height, width, generator=generator)).to(torch.uint8)
    return [{"image": image, "proposals": proposals}]


@torch.no_grad()
def prepare(model: nn.Module, image: List[Dict]) -> None:
    """Fill the label graph, fit the batch norms to the image, and go to evaluation mode.

    With the norms of random weights, activations overflow, and an RPN finds no regions in them. The
    norms also get the image's reflection: those of pooled features need two images.
    """
    graph = model.label_graph
    if graph is not None:
        counts = None, None
        if graph.has_statistics:
            counts = torch.ones_like(graph.label_counts), torch.ones_like(graph.pair_counts)
        graph.fill(*counts, graph.embeddings)
    for module in model.eval().modules():
        if isinstance(module, _BatchNorm):
            module.train().momentum = 1.0
    reflection = {**image[0], "image": image[0]["image"].flip(2)}
    model([*image, reflection])
    model.eval()


@torch.no_grad()
def count_multiply_adds(model: nn.Module, image: List[Dict]) -> Tuple[int, int]:
    """Those of an image, and those that are independent of it and computed once.

    A multiply-add counts as one, of convolutions and matrix products in evaluation; pooling,
    ROIAlign and what is elementwise are not counted. The model's classifiers are fixed afterwards.
    """
    counts = []
    for call in (model.fix_classifiers, partial(model, image)):
        with FlopCounterMode(display=False) as counter:
            call()
        # It counts a multiplication and an addition.
        counts.append(counter.get_total_flops() // 2)
    once, per_image = counts
    return per_image, once


@torch.no_grad()
def time_forward(model: nn.Module, image: List[Dict], rounds: int) -> float:
    """Median seconds of `rounds` passes, after one that isn't counted."""
    return median(timeit.repeat(lambda: model(image), number=1, repeat=rounds + 1)[1:])
