"""Draw what a trained model looked at in images for each likely label.

For label heads that have attention, such as CSRA, ML-Decoder and Query2Label. Takes the output
folder of a run of tools/train_net.py, and of its test set a few images, always the same ones, or
any others. Writes into OUTPUT/attention
  attention.png   a row per image: itself, and a map for each of its likely labels
  attention.json  the same in numbers

Examples:
  of the test set:
    tools/visualize_attention.py output/csra
  of your own images:
    tools/visualize_attention.py output/csra --output seen --images a.jpg b.png
  of another checkpoint (keys and values of the config come before --images):
    tools/visualize_attention.py output/csra MODEL.WEIGHTS output/csra/model_final.pth
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Sequence

from detectron2.config import CfgNode
from tqdm import tqdm

from ..checkpoint import load_model
from ..data import MultiLabelDatasetMapper
from ..engine import check_labels
from ..errors import InputError
from ..visualization import attend, describe_attention, draw_attention_sheet
from .common import run
from .runs import look_at, make_image_parser, read_run, write_json

FOLDER = "attention"
# A PNG of many more rows is too high for matplotlib.
MAX_IMAGES = 100


def visualize_attention(
    cfg: CfgNode, records: Sequence[Dict], output: str | os.PathLike[str]
) -> None:
    """Draw and describe what was looked at in images, and print the files' names.

    Args:
        cfg: of the model, with its MODEL.WEIGHTS.
        records: a data set dict for each image; one without `labels` has no ground truth.
        output: the folder to write into.
    Raises:
        InputError: the model can't be used or has no attention, an image can't be read or would be
            overwritten, or there are too many.
    """
    output = Path(output)
    sheet = output / "attention.png"
    if len(records) > MAX_IMAGES:
        raise InputError(f"{len(records)} images: a sheet has room for {MAX_IMAGES}")
    if os.path.realpath(sheet) in {os.path.realpath(record["file_name"]) for record in records}:
        raise InputError(f"--output: {sheet} is one of the images, and would be lost")
    label_names = check_labels(cfg)
    model = load_model(cfg, label_names)
    if not model.has_attention:
        raise InputError(f"MODEL.LABEL_HEAD.NAME: {cfg.MODEL.LABEL_HEAD.NAME} has no attention")
    mapper = MultiLabelDatasetMapper(cfg, is_train=False)
    # Without a terminal, no bar.
    bar = tqdm(records, leave=False, disable=None)
    rows = [look_at(attend, model, mapper, record) for record in bar]
    threshold = cfg.TEST.THRESHOLD
    output.mkdir(parents=True, exist_ok=True)
    described = [
        describe_attention(attended, record["file_name"], label_names, threshold)
        for attended, record in zip(rows, records)
    ]
    write_json(str(sheet.with_suffix(".json")), {"images": described})
    print(sheet.with_suffix(".json"))
    draw_attention_sheet(rows, label_names, threshold, str(sheet))
    print(sheet)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    # Intermixed, so that options may stand between the folder and the keys.
    args = make_image_parser(__doc__, FOLDER, num_images=8).parse_intermixed_args(argv)

    def work() -> None:
        cfg, records = read_run(args)
        visualize_attention(cfg, records, args.output or os.path.join(args.output_dir, FOLDER))

    return run("visualize_attention", work)
