"""What commands do with the folder that a training leaves behind."""

from __future__ import annotations

import argparse
import json
import os
from typing import Callable, Dict, List, Sequence, Tuple

from detectron2.config import CfgNode
from torch import nn

from ..data import get_test_dicts
from ..data.dataset_mapper import read_image
from ..engine import setup_cfg
from ..errors import InputError
from ..io.files import write_text_atomically
from ..visualization import sample_items
from .common import add_import_option, make_parser, positive_int


def make_image_parser(doc: str, folder: str, num_images: int) -> argparse.ArgumentParser:
    """The parser of a command that draws images of a run, see `read_run`.

    Args:
        doc: of the command's module.
        folder: where it writes, in the run's folder.
        num_images: of the test set, if no others are asked for.
    """
    parser = make_parser(doc)
    parser.add_argument("output_dir", metavar="OUTPUT", help="OUTPUT_DIR of the run")
    parser.add_argument("--output", metavar="DIR", help=f"write there and not to OUTPUT/{folder}")
    parser.add_argument(
        "--num-images",
        type=positive_int,
        default=num_images,
        metavar="N",
        help=f"of the test set ({num_images})",
    )
    parser.add_argument("--images", nargs="+", metavar="FILE", help="these instead")
    add_import_option(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    return parser


def read_run(args: argparse.Namespace) -> Tuple[CfgNode, List[Dict]]:
    """The config of a run, and a data set dict for each image that was asked for.

    Args:
        args: of `make_image_parser`.
    Raises:
        InputError: see `run_config` and `sample_records`.
    """
    cfg = run_config(args.output_dir, args.opts, args.imports)
    if args.images:
        return cfg, [{"file_name": file_name} for file_name in args.images]
    return cfg, sample_records(cfg, args.num_images)


def look_at(show: Callable, model: nn.Module, mapper: Callable[[Dict], Dict], record: Dict):
    """What `attend` or `recognize` returns of the image of a data set dict.

    Args:
        show: one of the two.
        model: in evaluation mode.
        mapper: of the test view.
        record: without `labels`, there is no ground truth.
    """
    view = mapper({"labels": [], **record})
    return show(
        model,
        view,
        read_image(record["file_name"]),
        name=os.path.basename(record["file_name"]),
        targets=view["labels"] if "labels" in record else None,
    )


def sample_records(cfg: CfgNode, count: int) -> List[Dict]:
    """Some of the first test set, always the same ones, which are in its predictions.png too.

    Raises:
        InputError: there is no test set.
    """
    if not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty; --images takes images without a data set")
    records = get_test_dicts(cfg, cfg.DATASETS.TEST[0])
    # The order in which an evaluation's predictions.npz has them.
    return sample_items(sorted(records, key=lambda record: record["image_id"]), count)


def write_json(path: str, content: Dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    with write_text_atomically(path) as file:
        file.write(text + "\n")


def run_config(output_dir: str, opts: Sequence[str], imports: Sequence[str] = ()) -> CfgNode:
    """The config of a run, with its best checkpoint, else its last one, as MODEL.WEIGHTS.

    Raises:
        InputError: there is no config or no checkpoint in the folder, or see `setup_cfg`.
    """
    names = ("model_best.pth", "model_final.pth")
    found = [path for name in names if os.path.exists(path := os.path.join(output_dir, name))]
    # A run's own MODEL.WEIGHTS is where its training began.
    weights = ["MODEL.WEIGHTS", found[0] if found else ""]
    config_file = os.path.join(output_dir, "config.yaml")
    cfg = setup_cfg(config_file, [*weights, *opts], imports=imports)
    if not cfg.MODEL.WEIGHTS:
        raise InputError(
            f"{output_dir} has no {' and no '.join(names)}; MODEL.WEIGHTS takes another checkpoint"
        )
    return cfg
