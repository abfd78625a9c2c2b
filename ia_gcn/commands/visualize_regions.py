"""Draw the regions, their weights, the scores and the label graph of a trained IA-GCN in images.

Takes the output folder of a run of tools/train_net.py, and of its test set a few images, always
the same ones, or any others. Writes into OUTPUT/regions
  NAME.png     of each image: its regions, the same by their learned weight, the scores of both
               branches and of their fusion, and statistical, individual and fused label graph
  NAME.json    the same in numbers
  regions.png  a sheet with a row per image

Examples:
  of the test set:
    tools/visualize_regions.py output/demo
  of your own images:
    tools/visualize_regions.py output/demo --output seen --images a.jpg b.png
  of another checkpoint (keys and values of the config come before --images):
    tools/visualize_regions.py output/demo MODEL.WEIGHTS output/demo/model_final.pth
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

from detectron2.config import CfgNode
from tqdm import tqdm

from ..checkpoint import load_model
from ..data import MultiLabelDatasetMapper
from ..engine import check_labels
from ..errors import InputError
from ..visualization import (
    describe_recognition,
    draw_recognition,
    draw_region_sheet,
    recognize,
)
from .common import positive_int, run
from .runs import look_at, make_image_parser, read_run, write_json

FOLDER = "regions"
SHEET = "regions"
# A PNG of many more rows is too high for matplotlib.
MAX_SHEET_ROWS = 50


def visualize_regions(
    cfg: CfgNode, records: Sequence[Dict], max_regions: int, output: str | os.PathLike[str]
) -> None:
    """Draw and describe images, and print the files' names.

    Args:
        cfg: of the model, with its MODEL.WEIGHTS.
        records: a data set dict for each image; one without `labels` has no ground truth.
        max_regions: draw no more of them.
        output: the folder to write into.
    Raises:
        InputError: the model can't be used or has no regions, an image can't be read, or would be
            overwritten.
    """
    output = Path(output)
    label_names = check_labels(cfg)
    paths = [output / name for name in unique_names([record["file_name"] for record in records])]
    check_overwrites_none(paths, records)
    model = load_model(cfg, label_names)
    if not model.has_regions:
        raise InputError(
            f"MODEL.META_ARCHITECTURE: {cfg.MODEL.META_ARCHITECTURE} has no region branch"
        )
    mapper = MultiLabelDatasetMapper(cfg, is_train=False)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    # Without a terminal, no bar.
    for path, record in tqdm(list(zip(paths, records)), leave=False, disable=None):
        recognition = look_at(recognize, model, mapper, record)
        described = describe_recognition(recognition, record["file_name"], label_names)
        write_json(f"{path}.json", described)
        draw_recognition(recognition, label_names, cfg.TEST.THRESHOLD, max_regions, f"{path}.png")
        tqdm.write(f"{path}.json\n{path}.png")
        if len(rows) < MAX_SHEET_ROWS:
            rows.append(recognition)
    sheet = str(output / f"{SHEET}.png")
    draw_region_sheet(rows, label_names, cfg.TEST.THRESHOLD, max_regions, sheet)
    print(sheet)


def unique_names(file_names: Iterable[str]) -> List[str]:
    """A name without suffix for each file; a number makes it another than those before it."""
    names = [SHEET]
    for file_name in file_names:
        stem = name = Path(file_name).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names[1:]


def check_overwrites_none(paths: Sequence[Path], records: Sequence[Dict]) -> None:
    """Refuse to write over one of the images.

    Raises:
        InputError: one of the drawings would.
    """
    sources = {os.path.realpath(record["file_name"]) for record in records}
    for path in [*paths, paths[0].parent / SHEET]:
        if os.path.realpath(f"{path}.png") in sources:
            raise InputError(f"--output: {path}.png is one of the images, and would be lost")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_image_parser(__doc__, FOLDER, num_images=4)
    parser.add_argument(
        "--regions", type=positive_int, default=10, metavar="N", help="draw no more of them (10)"
    )
    # Intermixed, so that options may stand between the folder and the keys.
    args = parser.parse_intermixed_args(argv)

    def work() -> None:
        cfg, records = read_run(args)
        output = args.output or os.path.join(args.output_dir, FOLDER)
        visualize_regions(cfg, records, args.regions, output)

    return run("visualize_regions", work)
