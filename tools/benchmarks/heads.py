"""All label heads on the same feature maps."""

from __future__ import annotations

import argparse
import inspect
import math
from functools import partial
from typing import Callable, Dict, Iterator, List, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from timm.layers.ml_decoder import MLDecoder
from tqdm import tqdm

from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.modeling import ImageFeatures, LabelHead, MultiLabelRecognizer, build_label_head
from ia_gcn.modeling.losses import MultiLabelCriterion
from ia_gcn.modeling.recognizer import build_label_graph, ignore_known

from .arguments import positive, positive_numbers
from .label_graph import fill_sparsely
from .measuring import Table, measure, measure_memory, timed_rows
from .networks import CONFIGS

# Of ResNet-101 and of TResNet-M alike.
SHAPES = {"res4": ShapeSpec(channels=1024, stride=16), "res5": ShapeSpec(channels=2048, stride=32)}

TIMM = "timm's MLDecoder"

# By the name of a row, in configs/COCO; what the others are compared with comes first.
HEADS = {
    "ML-Decoder": "ml_decoder_tresnet_m.yaml",
    TIMM: "ml_decoder_tresnet_m.yaml",
    "LinearHead": "resnet101.yaml",
    "ML-GCN": "ml_gcn_R_101.yaml",
    "ML-AGCN": "ml_agcn_2l.yaml",
    "CSRA": "csra_R_101.yaml",
    "SRN": "srn_R_101.yaml",
    "RNN-Attention": "rnn_attention_R_101.yaml",
    "CNN-RNN": "cnn_rnn_R_101.yaml",
    "ADD-GCN": "add_gcn_R_101.yaml",
    "TDRG": "tdrg_R_101.yaml",
    "SALGL": "salgl_R_101.yaml",
    "SSGRL": "ssgrl_R_101.yaml",
    "KGGR": "kggr_R_101.yaml",
    "C-Tran": "c_tran_R_101.yaml",
    "Query2Label": "query2label_R_101.yaml",
}


class Problem(NamedTuple):
    model: MultiLabelRecognizer
    """Without a backbone."""
    features: ImageFeatures
    """Of B images; with a gradient, as they come from a backbone that is trained."""
    targets: torch.Tensor
    """(B, C) in {0, 1}"""
    optimizer: torch.optim.Optimizer


class TimmHead(LabelHead):
    """timm's MLDecoder with its defaults.

    Its decoder's one layer stands for torch's loop over layers, which asks a layer for a
    self-attention that timm's has not.
    """

    in_features = ("res5",)

    def __init__(self, num_labels: int):
        super().__init__()
        self.decoder = MLDecoder(num_labels, initial_num_features=SHAPES["res5"].channels)
        self.decoder.decoder.forward = self.decoder.decoder.layers[0].forward

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        return {"logits": self.decoder(features["res5"])}


def build_problem(name: str, num_labels: int, batch: int, size: int, opts: List[str]) -> Problem:
    """The head of a row, with random weights and statistics of the labels, in evaluation mode.

    Args:
        name: of HEADS.
        batch: images.
        size: their height and width in pixels.
        opts: config keys and values.
    """
    opts = [*opts, "MODEL.DEVICE", "cpu", "MODEL.LABEL_HEAD.NUM_LABELS", str(num_labels)]
    cfg = setup_cfg(str(CONFIGS / HEADS[name]), [*opts, "SOLVER.BASE_LR", "1e-9"])
    torch.manual_seed(0)
    head = TimmHead(num_labels) if name == TIMM else build_label_head(cfg, SHAPES)
    model = build_recogniser(cfg, head)
    targets = (torch.rand(batch, num_labels) < 0.04).float()
    states = None
    if model.takes_known_labels:
        states = targets.masked_fill(torch.rand(batch, num_labels) < 0.5, -1)
    maps = {feature: random_map(SHAPES[feature], batch, size) for feature in head.in_features}
    features = ImageFeatures(maps, dict.fromkeys(maps), states)
    return Problem(model, features, targets, Trainer.build_optimizer(cfg, model))


def build_recogniser(cfg: CfgNode, head: LabelHead) -> MultiLabelRecognizer:
    context = (head.uses | head.needs) & MultiLabelRecognizer.available_context(cfg)
    label_graph = build_label_graph(cfg, context)
    if "label_graph" in context:
        fill_sparsely(label_graph)
    model = MultiLabelRecognizer(
        backbone=None,
        label_head=head,
        label_graph=label_graph,
        criterion=MultiLabelCriterion(cfg),
        num_labels=cfg.MODEL.LABEL_HEAD.NUM_LABELS,
        context=context,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    return model.eval()


def random_map(shape: ShapeSpec, batch: int, size: int) -> torch.Tensor:
    """(B, D, H, W) >= 0."""
    cells = math.ceil(size / shape.stride)
    return torch.randn(batch, shape.channels, cells, cells).relu().requires_grad_()


@torch.no_grad()
def infer(problem: Problem) -> torch.Tensor:
    """Logits, (B, C)."""
    outputs, _ = problem.model.apply_heads(problem.features)
    return outputs["logits"]


def train_step(problem: Problem) -> None:
    """Forward, backward and optimizer."""
    model, features = problem.model, problem.features
    targets = ignore_known(problem.targets, features.label_states)
    with EventStorage():
        outputs, losses = model.apply_heads(features, targets)
        loss = sum({**model.criterion(outputs, targets), **losses}.values())
    if not loss.isfinite():
        raise FloatingPointError("the loss of a training step is not finite")
    loss.backward()
    problem.optimizer.step()
    problem.optimizer.zero_grad()
    for feature_map in features.maps.values():
        feature_map.grad = None


STEPS = {"Inference": infer, "Training step": train_step}


def prepare_step(what: str, *settings) -> Callable:
    """One of STEPS as a function of nothing; settings are those of `build_problem`."""
    problem = build_problem(*settings)
    if STEPS[what] is train_step:
        problem.model.train()
    else:
        problem.model.fix_classifiers()
    return partial(STEPS[what], problem)


# ----------------------------------------------------------------------------------- command line


def run_heads(args) -> Iterator[Table]:
    """Time all label heads on the same feature maps, with random weights and label statistics.

    The maps have the shapes of ResNet-101's and of TResNet-M's, which are the same: 1024 and 2048
    channels at strides 16 and 32. The heads are those of configs/COCO, with other numbers of
    labels. A training step is forward, backward and optimizer, down to the gradient of the maps.
    """
    names = args.only.split(",") if args.only else list(HEADS)
    unknown = [name for name in names if name not in HEADS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: must be of {', '.join(HEADS)}")
    if args.size < 64:
        raise InputError(f"--size {args.size}: must be 64 or more")
    for num_labels in args.labels:
        for what in STEPS:
            yield time_heads(args, what, names, num_labels)


def time_heads(args, what: str, names: List[str], num_labels: int) -> Table:
    """One of STEPS of each head: the times here, the memory in a process each."""
    calls, memory = {}, {}
    for name in tqdm(names, f"{num_labels} labels", leave=False, disable=None):
        settings = (what, name, num_labels, args.batch, args.size, args.opts)
        memory[name] = measure_memory(args.threads, prepare_step, *settings, seconds=args.limit)
        if "not_run" not in memory[name]:
            calls[name] = prepare_step(*settings)
    title = f"{what}: {num_labels} labels, {args.batch} × {args.size}×{args.size} pixels"
    return Table(title, timed_rows(measure(calls, args.rounds, what), memory))


def add_heads(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "heads",
        help="all label heads on the same feature maps",
        description=inspect.getdoc(run_heads),
        epilog=HEADS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_heads)
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"heads to measure: of {', '.join(HEADS)} (default all)"
    )
    parser.add_argument(
        "--labels",
        metavar="C,...",
        type=positive_numbers,
        default=[80, 500, 9605],
        help="numbers of labels (default 80,500,9605)",
    )
    parser.add_argument("--batch", type=positive, default=8, help="images in a batch (default 8)")
    parser.add_argument(
        "--size", type=positive, default=448, help="their height and width in pixels (default 448)"
    )
    parser.add_argument(
        "--limit",
        metavar="SECONDS",
        type=positive,
        default=120,
        help="for the two steps of which the memory is measured; what takes longer is not run "
        "(default 120)",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")


HEADS_EXAMPLES = """
Examples:
  ML-Decoder beside timm's:
    tools/benchmark.py heads --only "ML-Decoder,timm's MLDecoder"
  one image at a time:
    tools/benchmark.py heads --labels 80 --batch 1
"""
