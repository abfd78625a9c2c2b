"""Draw what a run of tools/train_net.py left in its output folder.

Writes
  OUTPUT/training_curve.png             loss and mAP over the iterations, where it was a training
  OUTPUT/inference/NAME/predictions.png a sheet of images of each data set that was evaluated,
                                        with the labels found, wrongly found and missed

Example:
  tools/visualize_results.py output/demo
"""

from __future__ import annotations

import os
from typing import Dict, List, Sequence

from ..data import get_multilabel_dicts
from ..engine import setup_cfg
from ..errors import InputError
from ..evaluation import Predictions, read_predictions
from ..visualization import (
    draw_prediction_sheet,
    plot_training_curve,
    read_training_log,
    sample_items,
)
from .common import add_import_option, make_parser, positive_int, run


def visualize_results(output_dir: str, num_images: int = 24, imports: Sequence[str] = ()) -> None:
    """Draw what a run left and print the files' names.

    Args:
        output_dir: OUTPUT_DIR of the run.
        num_images: no more of them on a sheet.
        imports: modules of a user's own that the run's config names.
    Raises:
        InputError: the folder holds no config, or a file in it can't be read.
    """
    cfg = setup_cfg(os.path.join(output_dir, "config.yaml"), imports=imports)
    log = os.path.join(output_dir, "metrics.json")
    if os.path.exists(log):
        path = os.path.join(output_dir, "training_curve.png")
        plot_training_curve(read_training_log(log), path)
        print(path)
    for name in cfg.DATASETS.TEST:
        folder = os.path.join(output_dir, "inference", name)
        source = os.path.join(folder, "predictions.npz")
        if not os.path.exists(source):
            continue
        predictions = read_predictions(source)
        try:
            images = sample_items(find_images(name, predictions), num_images)
        except KeyError as error:
            raise InputError(f"{source}: {name} has no image {error}") from None
        path = os.path.join(folder, "predictions.png")
        draw_prediction_sheet(images, predictions.label_names, cfg.TEST.THRESHOLD, path)
        print(path)


def find_images(dataset_name: str, predictions: Predictions) -> List[Dict]:
    """The images of a data set's predictions, as `draw_prediction_sheet` takes them.

    Raises:
        KeyError: the data set has no image of an id.
    """
    files = {
        record["image_id"]: record["file_name"] for record in get_multilabel_dicts([dataset_name])
    }
    columns = (predictions.image_ids.tolist(), predictions.scores, predictions.targets)
    return [
        {"file_name": files[image_id], "scores": scores, "targets": targets}
        for image_id, scores, targets in zip(*columns)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--num-images", type=positive_int, default=24, metavar="N", help="per sheet (24)"
    )
    add_import_option(parser)
    args = parser.parse_args(argv)
    return run("visualize_results", lambda: visualize_results(**vars(args)))
