"""How the cost of IA-GCN grows."""

from __future__ import annotations

import argparse
import inspect
import math
from functools import partial
from typing import Callable, Dict, Iterator, List, NamedTuple

import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.modeling import ImageFeatures

from .arguments import positive, positive_numbers
from .label_graph import fill_sparsely
from .measuring import Table, measure, measure_memory, timed_rows
from .models import STEPS, prepare_step
from .networks import CONFIGS, RESNETS, random_boxes

NUM_LABELS = 80
NUM_REGIONS = 40
STRIDE = 32


class Heads(NamedTuple):
    """IA-GCN without backbone and RPN, and what these would give it."""

    model: nn.Module
    """An InstanceAwareRecognizer."""
    features: torch.Tensor
    """res5, (B, D, H, W), with a gradient, as it comes from a backbone that is trained."""
    proposals: List[Instances]
    targets: torch.Tensor
    """(B, C)"""
    optimizer: torch.optim.Optimizer


def build_heads(num_labels: int, num_regions: int, batch: int, size: int, opts) -> Heads:
    """Heads of random weights in evaluation mode, for images of `size` by `size` pixels."""
    opts = [
        *opts,
        *("MODEL.DEVICE", "cpu", "MODEL.LABEL_HEAD.NUM_LABELS", str(num_labels)),
        *("MODEL.REGION_BRANCH.NUM_REGIONS", str(num_regions)),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        *("SOLVER.BASE_LR", "1e-9"),
    ]
    cfg = setup_cfg(str(CONFIGS / "ia_gcn_R_101.yaml"), opts)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    channels = model.backbone.output_shape()["res5"].channels
    # It takes memory, and nothing here runs it.
    model.backbone = None
    if model.label_graph is not None:
        fill_sparsely(model.label_graph)
    cells = math.ceil(size / STRIDE)
    generator = torch.Generator().manual_seed(0)
    proposals = [
        Instances((size, size), proposal_boxes=random_boxes(num_regions, size, generator))
        for _ in range(batch)
    ]
    return Heads(
        model,
        torch.randn(batch, channels, cells, cells).relu().requires_grad_(),
        proposals,
        (torch.rand(batch, num_labels) < 0.04).float(),
        Trainer.build_optimizer(cfg, model),
    )


def infer_heads(heads: Heads) -> torch.Tensor:
    """Logits, (B, C)."""
    with torch.no_grad():
        return run_heads(heads)[0]


def train_heads(heads: Heads) -> None:
    """Forward, backward and optimizer."""
    with EventStorage():
        logits, losses = run_heads(heads)
    losses.update(heads.model.criterion({"logits": logits}, heads.targets))
    loss = sum(losses.values())
    if not loss.isfinite():
        raise FloatingPointError("the loss of a training step is not finite")
    loss.backward()
    heads.optimizer.step()
    heads.optimizer.zero_grad()
    heads.features.grad = None


def run_heads(heads: Heads):
    """ŷ_f (B, C) and the ROI heads' losses, as InstanceAwareRecognizer.forward has them."""
    model, maps = heads.model, {"res5": heads.features}
    regions, valid = model.roi_heads.region_features(maps, heads.proposals)
    features = ImageFeatures(maps, {"res5": None}, regions=regions, valid=valid)
    outputs, losses = model.apply_heads(features, heads.targets)
    return outputs["logits"], losses


HEAD_STEPS = {"Inference": infer_heads, "Training step": train_heads}


def prepare_heads(what: str, *settings) -> Callable:
    """One of HEAD_STEPS as a function of nothing; settings are those of `build_heads`."""
    heads = build_heads(*settings)
    heads.model.train(HEAD_STEPS[what] is train_heads)
    return partial(HEAD_STEPS[what], heads)


def grow(args, title: str, unit: str, values: List[int], prepare: Callable, settings: Callable):
    """A table of the step that prepare(*settings(value)) returns, for each of the values."""
    calls, memory = {}, {}
    for value in tqdm(values, title, leave=False, disable=None):
        name = f"{value:,} {unit}"
        memory[name] = measure_memory(args.threads, prepare, *settings(value))
        if "not_run" not in memory[name]:
            calls[name] = prepare(*settings(value))
    rows = timed_rows(measure(calls, args.rounds, title), memory)
    by_name = {row["name"]: row for row in rows}
    add_exponents({value: by_name[f"{value:,} {unit}"] for value in values})
    return Table(title, rows)


def add_exponents(rows: Dict[int, Dict]) -> None:
    """To each row after the first its `exponent`, p if the median grew as value^p from the last."""
    timed = [(value, row) for value, row in rows.items() if "median_s" in row]
    for (smaller, before), (larger, row) in zip(timed, timed[1:]):
        ratio = row["median_s"] / before["median_s"]
        row["exponent"] = math.log(ratio) / math.log(larger / smaller)


def grow_labels(args, what: str) -> Table:
    title = f"{what} of IA-GCN's heads: {NUM_REGIONS} regions, {args.batch} images"
    return grow(
        args,
        title,
        "labels",
        args.labels,
        prepare_heads,
        lambda value: (what, value, NUM_REGIONS, args.batch, args.size, args.opts),
    )


def grow_regions(args, what: str) -> Table:
    title = f"{what} of IA-GCN's heads: {NUM_LABELS} labels, {args.batch} images"
    return grow(
        args,
        title,
        "regions",
        args.regions,
        prepare_heads,
        lambda value: (what, NUM_LABELS, value, args.batch, args.size, args.opts),
    )


def grow_batch(args, what: str) -> Table:
    return grow(
        args,
        f"{what} of IA-GCN: {args.size}×{args.size} pixels",
        "images",
        args.batches,
        prepare_step,
        lambda value: (what, RESNETS["IA-GCN"], value, args.size, args.opts),
    )


# ----------------------------------------------------------------------------------- command line

VARIABLES = {"labels": grow_labels, "regions": grow_regions, "batch": grow_batch}


def run_scaling(args) -> Iterator[Table]:
    """Time IA-GCN's inference and training step for growing numbers of

    labels   C, of the heads alone: what follows backbone and RPN
    regions  N of an image, of the heads alone
    batch    images, of the whole network

    the others being as they are in configs/COCO/ia_gcn_R_101.yaml. The memory of each is measured
    in a process of its own. The growth exponent is p where, from the row above, the time grew as
    the p-th power of the number.
    """
    names = args.only.split(",")
    unknown = [name for name in names if name not in VARIABLES]
    if unknown:
        raise InputError(f"--only {unknown[0]}: must be of {', '.join(VARIABLES)}")
    if args.size < 64:
        raise InputError(f"--size {args.size}: batch norms need 64 or more")
    for name in names:
        for what in STEPS:
            yield VARIABLES[name](args, what)


def add_scaling(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "scaling",
        help="how IA-GCN's cost grows with labels, regions and batch",
        description=inspect.getdoc(run_scaling),
        epilog=SCALING_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_scaling)
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=",".join(VARIABLES),
        help="what grows (default all)",
    )
    for option, metavar, default in (
        ("--labels", "C,...", [80, 320, 1280, 5120]),
        ("--regions", "N,...", [10, 40, 160, 640]),
        ("--batches", "B,...", [1, 2, 4, 8]),
    ):
        text = ",".join(map(str, default))
        parser.add_argument(
            option,
            metavar=metavar,
            type=positive_numbers,
            default=default,
            help=f"numbers to measure (default {text})",
        )
    parser.add_argument(
        "--batch", type=positive, default=4, help="images for labels and regions (default 4)"
    )
    parser.add_argument(
        "--size", type=positive, default=448, help="their height and width in pixels (default 448)"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")


SCALING_EXAMPLES = """
Examples:
  the heads with 80 to 9605 labels:
    tools/benchmark.py scaling --only labels --labels 80,500,2000,9605
  with the other reading of the paper's Eq. 10:
    tools/benchmark.py scaling --only labels,regions MODEL.REGION_GCN.READING regions
"""
