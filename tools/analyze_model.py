#!/usr/bin/env python3
"""Say how large the network of a config is, and what an image costs it.

Parameters are counted by part: backbone; label head; and regions, which are the RPN, the region
heads and the region GCN. The label head's include the matrix A of its label graph, C×C for C
labels, as the published sizes of ML-GCN, IML-GCN and ML-AGCN do: their codes hold it as a
parameter, though it is not trained. Label embeddings are data and don't count.

A multiply-add counts as one, of convolutions and matrix products in evaluation. What a label head
makes of its labels alone is the same for every image and computed once: it stands by itself.

Neither weights nor data nor label embeddings are read: the network gets random weights, and a
image of noise. It runs on the CPU.

Examples:
  a config:
    tools/analyze_model.py --config-file configs/COCO/ml_agcn_2l.yaml
  a table of the papers' networks, of sizes and multiply-adds alone:
    tools/analyze_model.py --table --no-time
  a table of your own, all of its networks with 1000 labels:
    tools/analyze_model.py MODEL.LABEL_HEAD.NUM_LABELS 1000 \\
        --table configs/COCO/ml_gcn_R_101.yaml configs/COCO/ia_gcn_R_101.yaml
"""

from __future__ import annotations

import argparse
import sys
import timeit
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"

RESNETS = ["resnet101", "ml_gcn_1l_R_101", "ml_gcn_R_101", "ia_gcn_R_101"]
TRESNETS = [
    *("asl_tresnet_m", "asl_tresnet_l"),
    *("iml_gcn_1l", "iml_gcn_2l", "ml_agcn_1l", "ml_agcn_2l"),
]
# What --table has by itself, in the order of the papers' tables.
PAPERS = [
    *(f"COCO/{name}" for name in RESNETS + TRESNETS),
    *(f"VG500/{name}" for name in TRESNETS),
]

# What is so whatever else is set.
FIXED = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.WEIGHTS", ""),
    *("MODEL.TIMM.PRETRAINED", "False"),
    *("MODEL.TIMM.WEIGHTS_FILE", ""),
    # The batch norms of a frozen stage would have no parameters.
    *("MODEL.BACKBONE.FREEZE_AT", "0"),
]

# The parts of a model, by the names of its modules.
PARTS = {
    "backbone": ("backbone",),
    "label_head": ("label_head", "label_graph"),
    "regions": ("proposal_generator", "roi_heads", "region_gcn"),
}

# By the key of a row: what stands above its column, and in its cells.
COLUMNS: Dict[str, Tuple[str, Callable[[float], str]]] = {
    "backbone": ("backbone, M", lambda count: f"{count / 1e6:#.4g}"),
    "label_head": ("label head, M", lambda count: f"{count / 1e6:#.4g}"),
    "regions": ("regions, M", lambda count: f"{count / 1e6:#.4g}"),
    "total": ("total, M", lambda count: f"{count / 1e6:#.4g}"),
    "per_image": ("GMac per image", lambda count: f"{count / 1e9:#.4g}"),
    "once": ("GMac once", lambda count: f"{count / 1e9:#.4g}"),
    "seconds": ("s per image", lambda seconds: f"{seconds:.3g}"),
}


def analyze(config_file: str, args: argparse.Namespace) -> Dict[str, float]:
    """A row: the keys of COLUMNS, but for `regions` where there are none, and `seconds`."""
    cfg = load_config(config_file, args.opts)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    row = count_parameters(model)
    image = random_image(args.size, cfg)
    prepare(model, image)
    row["per_image"], row["once"] = count_multiply_adds(model, image)
    if not args.no_time:
        row["seconds"] = time_forward(model, image, args.rounds)
    return row


def load_config(config_file: str, opts: Sequence[str]) -> CfgNode:
    # On the CPU from the start: there is nothing to say of a missing GPU.
    cfg = setup_cfg(config_file, ["MODEL.DEVICE", "cpu", *opts])
    cfg.merge_from_list(FIXED)
    return cfg


def count_parameters(model: nn.Module) -> Dict[str, int]:
    """Parameters of each of PARTS, and in `total`, which may have some beside them."""
    counts = {
        part: sum(num_parameters(getattr(model, name, None)) for name in names)
        for part, names in PARTS.items()
    }
    if not hasattr(model, "roi_heads"):
        del counts["regions"]
    return {**counts, "total": num_parameters(model)}


def num_parameters(module: nn.Module | None) -> int:
    """Parameters, and the elements of the A of each label graph; 0 of None."""
    if module is None:
        return 0
    matrices = [graph.lcm for graph in module.modules() if hasattr(graph, "lcm")]
    return sum(tensor.numel() for tensor in [*module.parameters(), *matrices])


def random_image(size: int, cfg: CfgNode) -> List[Dict]:
    """A batch of one image of noise, size×size, with N proposals for a model without an RPN."""
    generator = torch.Generator().manual_seed(0)
    num_regions = cfg.MODEL.REGION_BRANCH.NUM_REGIONS
    corners = size / 2 * torch.rand(num_regions, 4, generator=generator)
    proposals = Instances((size, size), objectness_logits=torch.zeros(num_regions))
    proposals.proposal_boxes = Boxes(corners + corners.new_tensor([0, 0, size / 2, size / 2]))
    image = (256 * torch.rand(3, size, size, generator=generator)).to(torch.uint8)
    return [{"image": image, "proposals": proposals}]


@torch.no_grad()
def prepare(model: nn.Module, image: List[Dict]) -> None:
    """Fill the label graphs, fit the batch norms to the image, and go to evaluation mode.

    As random weights start out, activations overflow, and an RPN finds no regions in them.
    """
    graph = model.label_graph
    if graph is not None:
        counts = torch.ones_like(graph.label_counts), torch.ones_like(graph.pair_counts)
        graph.fill(*counts, graph.embeddings)
    for module in model.eval().modules():
        if isinstance(module, _BatchNorm):
            module.train().momentum = 1.0
    model(image)
    model.eval()


@torch.no_grad()
def count_multiply_adds(model: nn.Module, image: List[Dict]) -> Tuple[int, int]:
    """Those of an image, and those that came once, before the first one."""
    totals = []
    for call in (model.fix_classifiers, partial(model, image)):
        with FlopCounterMode(display=False) as counter:
            call()
        # It counts a multiplication and an addition.
        totals.append(counter.get_total_flops() // 2)
    once, per_image = totals
    return per_image, once


@torch.no_grad()
def time_forward(model: nn.Module, image: List[Dict], rounds: int) -> float:
    """Median seconds of `rounds` passes, after one that isn't counted."""
    return median(timeit.repeat(lambda: model(image), number=1, repeat=rounds + 1)[1:])


def describe(row: Dict[str, float]) -> str:
    """A line per column."""
    cells = [(header, cell(row[key])) for key, (header, cell) in COLUMNS.items() if key in row]
    return tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=("left", "right"))


def markdown(rows: Dict[str, Dict[str, float]]) -> str:
    """A table of rows by name, with the columns that any of them has."""
    columns = {
        key: column for key, column in COLUMNS.items() if any(key in row for row in rows.values())
    }
    cells = [
        [name, *(cell(row[key]) if key in row else "–" for key, (_, cell) in columns.items())]
        for name, row in rows.items()
    ]
    headers = ["", *(header for header, _ in columns.values())]
    align = ["left", *("right" for _ in columns)]
    return tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def note(args: argparse.Namespace) -> str:
    """What the numbers are of."""
    lines = [
        "M: millions of parameters; the label head's with its label graph's A, C×C, without label "
        "embeddings.",
        f"GMac: 10⁹ multiply-adds of convolutions and matrix products, {args.size}×{args.size} "
        "pixels; pooling, ROIAlign and what is elementwise are not counted. Once: what does not "
        "depend on the image.",
    ]
    if not args.no_time:
        lines.append(
            f"s: median of {args.rounds} passes of one image, on {args.threads} threads of a CPU."
        )
    return "\n".join(lines)


def report(args: argparse.Namespace) -> None:
    """Print the row of --config-file, or the table of --table."""
    if args.size < 64:
        raise InputError(f"--size {args.size}: batch norms need 64 or more")
    torch.set_num_threads(args.threads)
    if args.table is None:
        print(describe(analyze(args.config_file, args)))
    else:
        # Without a terminal, no bar.
        files = tqdm(table_files(args.table).items(), "configs", leave=False, disable=None)
        print(markdown({name: analyze(path, args) for name, path in files}))
    print(f"\n{note(args)}")


def table_files(given: Sequence[str]) -> Dict[str, str]:
    """Config files by the names of their rows: those given, or PAPERS."""
    if given:
        return {path.removesuffix(".yaml"): path for path in given}
    return {name: str(CONFIGS / f"{name}.yaml") for name in PAPERS}


def positive(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE", help="the network of this config")
    what.add_argument(
        "--table",
        metavar="CONFIG",
        nargs="*",
        help="a Markdown table of these configs (the papers')",
    )
    parser.add_argument(
        "--size", type=positive, default=448, help="the image's height and width (448)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="passes whose median is the time (5)"
    )
    parser.add_argument("--threads", type=positive, default=2, help="of torch (2)")
    parser.add_argument("--no-time", action="store_true", help="count only")
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs="*",
        help="config keys and values, for all configs; not right behind --table's",
    )
    # Intermixed, so that options may stand between and behind the keys.
    args = parser.parse_intermixed_args()
    try:
        report(args)
    except (InputError, OSError) as error:
        print(f"analyze_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
