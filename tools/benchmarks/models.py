"""Recognisers: inference, training steps, and inference once it is optimised."""

from __future__ import annotations

import argparse
import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ia_gcn.engine import Trainer, label_graphs, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.modeling import optimize_for_inference

from .arguments import positive, positive_numbers
from .label_graph import compare_label_graph, fill_sparsely
from .measuring import Table, measure, timed_rows

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO"

# By the name of a row: the config file, and what is set beside it.
RECOGNISERS = {
    "LinearHead": ("resnet101.yaml",),
    "ML-GCN": ("ml_gcn_R_101.yaml",),
    "IA-GCN": ("ia_gcn_R_101.yaml",),
    "IA-GCN, the zoo's RPN head": ("ia_gcn_R_101.yaml", "MODEL.RPN.CONV_DIMS", "[-1]"),
    "IA-GCN, res5 on every region": (
        "ia_gcn_R_101.yaml",
        *("MODEL.REGION_BRANCH.RES5", "True"),
        *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14"),
        *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0"),
    ),
}

BOXES_PER_PICTURE = 7


def compare_inference(args) -> List[Table]:
    """A forward pass in evaluation, of each of RECOGNISERS."""
    return [time_recognisers(args, "Inference", lambda cfg, *run: partial(infer, *run))]


def compare_training(args) -> List[Table]:
    """A training step of each of RECOGNISERS, whose RPNs are trained along."""

    def prepare(cfg, model, batch):
        return partial(train_step, model.train(), Trainer.build_optimizer(cfg, model), batch)

    return [time_recognisers(args, "Training step", prepare)]


def time_recognisers(args, what: str, prepare: Callable) -> Table:
    """The times of what `prepare(cfg, model, batch)` returns for each of RECOGNISERS."""
    calls, regions = {}, {}
    for name in tqdm(RECOGNISERS, "networks", leave=False, disable=None):
        cfg, model, batch = build_recogniser(name, args)
        calls[name] = prepare(cfg, model, batch)
        regions[name] = watch_regions(model)
    rows = timed_rows(measure(calls, args.rounds, what))
    for row in rows:
        counts = regions[row["name"]]
        if counts:
            row["regions"] = [min(counts), max(counts)]
    return Table(heading(what, cfg, args), rows)


def compare_optimized(args) -> List[Table]:
    """A forward pass of networks as they are trained, and after optimize_for_inference."""
    calls, logits, titles = {}, {}, {}
    for network in ("LinearHead", "IA-GCN"):
        cfg, model, batch = build_recogniser(network, args)
        optimized = optimize_for_inference(copy.deepcopy(model))
        for name, form in ((network, model), (f"{network}, optimised", optimized)):
            calls[name] = partial(infer, form, batch)
            logits[name] = infer(form, batch)
        titles[network] = heading(f"Optimised inference of {network}", cfg, args)
    seconds = measure(calls, args.rounds, "Optimised inference")
    return [optimized_table(network, title, seconds, logits) for network, title in titles.items()]


def optimized_table(network: str, title: str, seconds, logits) -> Table:
    names = [network, f"{network}, optimised"]
    rows = timed_rows({name: seconds[name] for name in names})
    for row, name in zip(rows, names):
        row["logit_deviation"] = logits[name].std().item()
    rows[1]["max_difference"] = (logits[names[1]] - logits[names[0]]).abs().max().item()
    return Table(title, rows)


def heading(what: str, cfg: CfgNode, args) -> str:
    return (
        f"{what}: ResNet-{cfg.MODEL.RESNETS.DEPTH}, {args.batch} × {args.size}×{args.size} pixels"
    )


def build_recogniser(name: str, args):
    """The config, the model in evaluation mode, of random weights, and a batch for it."""
    config_file, *opts = RECOGNISERS[name]
    # A row is what its name says, whatever else is set.
    opts = [*args.opts, *opts, "MODEL.DEVICE", "cpu"]
    # So low that the weights stay what they are: their values make no difference to the times.
    opts += ["SOLVER.BASE_LR", "1e-9"]
    cfg = setup_cfg(str(CONFIGS / config_file), opts)
    batch = random_batch(args.batch, args.size, cfg.MODEL.LABEL_HEAD.NUM_LABELS)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    for graph in label_graphs(model):
        fill_sparsely(graph)
    calibrate(model, batch)
    if not infer(model, batch).isfinite().all():
        raise InputError(f"{name}: the logits of a network of random weights are not finite")
    return cfg, model, batch


def random_batch(batch: int, size: int, num_labels: int) -> List[Dict]:
    """What `MultiLabelRecognizer` takes: pictures of noise, with labels and boxes."""
    generator = torch.Generator().manual_seed(0)
    uniform = partial(torch.rand, generator=generator)
    inputs = []
    for _ in range(batch):
        sides = size * (0.1 + 0.4 * uniform(BOXES_PER_PICTURE, 2))
        corners = (size - sides) * uniform(BOXES_PER_PICTURE, 2)
        boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        inputs.append(
            {
                "image": (256 * uniform(3, size, size)).to(torch.uint8),
                "labels": (uniform(num_labels) < 0.04).float(),
                "instances": Instances((size, size), gt_boxes=boxes),
            }
        )
    return inputs


@torch.no_grad()
def calibrate(model: nn.Module, batch: List[Dict]) -> None:
    """Make a network of random weights behave like a trained one, and put it in evaluation mode.

    As it starts out, its activations overflow, and rounding errors grow 10⁴-fold on their way
    through a hundred layers; a trained block changes little of what it is added to.
    """
    for module in model.eval().modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.2)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(batch)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum


def watch_regions(model: nn.Module) -> set:
    """A set into which goes how many proposals any image gets from now on."""
    counts = set()
    if hasattr(model, "proposal_generator"):
        model.proposal_generator.register_forward_hook(
            lambda module, inputs, outputs: counts.update(map(len, outputs[0]))
        )
    return counts


@torch.no_grad()
def infer(model: nn.Module, batch: List[Dict]) -> torch.Tensor:
    """Logits, (B, C)."""
    return torch.stack([output["logits"] for output in model(batch)])


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: List[Dict]) -> None:
    with EventStorage():
        loss = sum(model(batch).values())
    if not loss.isfinite():
        raise FloatingPointError("the loss of a training step is not finite")
    loss.backward()
    optimizer.step()
    # Now rather than before the next step: that is another network's.
    optimizer.zero_grad()


COMPARISONS = {
    "inference": compare_inference,
    "training": compare_training,
    "optimized": compare_optimized,
    "label-graph": compare_label_graph,
}


def run_model(args) -> Iterator[Table]:
    """Time recognisers and the label graph, on pictures, weights and label statistics of chance.

    inference    a forward pass: linear head, ML-GCN, IA-GCN and two dearer ways to its regions
    training     a training step of the same, forward, backward and optimizer
    optimized    a forward pass before and after ia_gcn.modeling.optimize_for_inference
    label-graph  IA-GCN's label graph alone, as it is computed here and as its paper writes it,
                 forward and backward: time, and memory of each in a process of its own
    """
    names = args.only.split(",")
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: must be of {', '.join(COMPARISONS)}")
    if args.size < 64:
        raise InputError(f"--size {args.size}: batch norms need 64 or more")
    for name in names:
        yield from COMPARISONS[name](args)


def add_model(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "model",
        help="recognisers and label graphs",
        description=inspect.getdoc(run_model),
        epilog=MODEL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_model)
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=",".join(COMPARISONS),
        help="comparisons to run (default all)",
    )
    parser.add_argument("--batch", type=positive, default=4, help="pictures in a batch (default 4)")
    parser.add_argument(
        "--size", type=positive, default=448, help="their height and width in pixels (default 448)"
    )
    parser.add_argument(
        "--labels",
        metavar="C,...",
        type=positive_numbers,
        default=[80, 500, 9605],
        help="of label-graph: the numbers of labels (default 80,500,9605)",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="config keys and values, for all networks"
    )


MODEL_EXAMPLES = """
Examples:
  the times of a forward pass, on 8 threads:
    tools/benchmark.py model --only inference --threads 8
  one picture at a time, with a smaller network:
    tools/benchmark.py model --batch 1 MODEL.RESNETS.DEPTH 50
  the label graph with 2000 labels:
    tools/benchmark.py model --only label-graph --labels 2000
"""
