"""Print the number of parameters of a config's network, and its operations and time per image.

Parameters are counted by part: backbone; label head; and regions, which are the RPN, the region
heads and the region GCN. The label head's include the matrix A of its label graph, C×C for C
labels, as the published sizes of ML-GCN, IML-GCN and ML-AGCN do: their codes hold it as a
parameter, though it is not trained. Label embeddings are data and do not count.

A multiply-add counts as one, of convolutions and matrix products in evaluation. What a label
head computes from its labels alone is the same for every image and computed once: it has a column
of its own.

Neither weights nor data nor label embeddings are read: the network gets random weights, and an
image of noise, of the config's INPUT.IMAGE_SIZE. It runs on the CPU.

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
from typing import Callable, Dict, Sequence, Tuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from ..analysis import ModelSize, analyze_model
from ..engine import setup_cfg
from .common import add_import_option, make_parser, positive_int, run

RESNETS = ["resnet101", "ml_gcn_1l_R_101", "ml_gcn_R_101", "ia_gcn_R_101"]
TRESNETS = [
    *("asl_tresnet_m", "asl_tresnet_l"),
    *("iml_gcn_1l", "iml_gcn_2l", "ml_agcn_1l", "ml_agcn_2l"),
]
SEMANTIC_GRAPHS = ["ssgrl_R_101", "kggr_R_101"]
GRAPHS = ["add_gcn_R_101", *SEMANTIC_GRAPHS, "salgl_R_101", "tdrg_R_101"]
# What --table has by itself, in the order of the papers' tables.
PAPERS = [
    *(f"COCO/{name}" for name in RESNETS + TRESNETS + GRAPHS),
    *(f"VG500/{name}" for name in TRESNETS + SEMANTIC_GRAPHS),
]


def millions(count: float) -> str:
    return f"{count / 1e6:#.4g}"


def billions(count: float) -> str:
    return f"{count / 1e9:#.4g}"


# What stands above a column, and how to get and write its cells; None for a cell that is empty.
COLUMNS: Dict[str, Tuple[Callable[[ModelSize], float | None], Callable[[float], str]]] = {
    "backbone, M": (lambda size: size.parameters["backbone"], millions),
    "label head, M": (lambda size: size.parameters["label_head"], millions),
    "regions, M": (lambda size: size.parameters.get("regions"), millions),
    "total, M": (lambda size: size.parameters["total"], millions),
    "image": (lambda size: size.image_size, "{0[0]}×{0[1]}".format),
    "GMac per image": (lambda size: size.per_image, billions),
    "GMac once": (lambda size: size.once, billions),
    "s per image": (lambda size: size.seconds, "{:.3g}".format),
}


def cells(size: ModelSize) -> Dict[str, str]:
    """The cells of a model's row, by column; without those that are empty."""
    values = {header: get(size) for header, (get, _) in COLUMNS.items()}
    return {h: COLUMNS[h][1](value) for h, value in values.items() if value is not None}


def describe(size: ModelSize) -> str:
    """A line per column."""
    lines = cells(size).items()
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=("left", "right"))


def markdown(sizes: Dict[str, ModelSize]) -> str:
    """A table of models by name, with the columns that any of them has."""
    rows = {name: cells(size) for name, size in sizes.items()}
    headers = [header for header in COLUMNS if any(header in row for row in rows.values())]
    body = [[name, *(row.get(header, "–") for header in headers)] for name, row in rows.items()]
    align = ["left", *("right" for _ in headers)]
    return tabulate(body, ["", *headers], tablefmt="pipe", disable_numparse=True, colalign=align)


def note(args: argparse.Namespace) -> str:
    """What the numbers are of."""
    lines = [
        "M: millions of parameters; the label head's with its label graph's A, C×C, without label "
        "embeddings.",
        "GMac: 10⁹ multiply-adds of convolutions and matrix products; pooling, ROIAlign and what "
        "is elementwise are not counted. Once: what is independent of the image.",
    ]
    if not args.no_time:
        lines.append(
            f"s: median of {args.rounds} passes of one image, on {args.threads} threads of a CPU."
        )
    return "\n".join(lines)


def analyze(args: argparse.Namespace) -> None:
    """Print the sizes of --config-file, or the table of --table."""
    torch.set_num_threads(args.threads)

    def measure(config_file: str) -> ModelSize:
        # On the CPU from the start: there is nothing to say of a missing GPU.
        cfg = setup_cfg(config_file, ["MODEL.DEVICE", "cpu", *args.opts], imports=args.imports)
        image_size = (args.size, args.size) if args.size else None
        return analyze_model(cfg, image_size=image_size, rounds=0 if args.no_time else args.rounds)

    if args.table is None:
        print(describe(measure(args.config_file)))
    else:
        # Without a terminal, no bar.
        files = tqdm(table_files(args.table).items(), "configs", leave=False, disable=None)
        print(markdown({name: measure(path) for name, path in files}))
    print(f"\n{note(args)}")


def table_files(given: Sequence[str]) -> Dict[str, str]:
    """Config files by the names of their rows: those given, or PAPERS."""
    if given:
        return {path.removesuffix(".yaml"): path for path in given}
    return {name: f"{name}.yaml" for name in PAPERS}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE", help="the network of this config")
    what.add_argument(
        "--table",
        metavar="CONFIG",
        nargs="*",
        help="a Markdown table of these configs (the papers')",
    )
    parser.add_argument(
        "--size",
        type=positive_int,
        metavar="N",
        help="the image's height and width in pixels (INPUT.IMAGE_SIZE)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="passes whose median is the time (5)"
    )
    parser.add_argument("--threads", type=positive_int, default=2, help="of torch (2)")
    parser.add_argument("--no-time", action="store_true", help="count only")
    add_import_option(parser)
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs="*",
        help="config keys and values, for all configs; not right behind --table's",
    )
    # Intermixed, so that options may stand between and behind the keys.
    args = parser.parse_intermixed_args(argv)
    return run("analyze_model", lambda: analyze(args))
