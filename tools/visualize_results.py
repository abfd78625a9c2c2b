#!/usr/bin/env python3
"""Draw what a run of tools/train_net.py left in its output folder.

Writes
  OUTPUT/training_curve.png             loss and mAP over the iterations, where it was a training
  OUTPUT/inference/NAME/predictions.png a sheet of images of each data set that was evaluated,
                                        with the labels found, wrongly found and missed

Example:
  tools/visualize_results.py output/demo
"""

import argparse
import os
import sys

import numpy as np

from ia_gcn.data import get_multilabel_dicts
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.visualization import draw_prediction_sheet, plot_training_curve, read_training_log


def visualize(output_dir: str, num_images: int) -> None:
    cfg = setup_cfg(os.path.join(output_dir, "config.yaml"))
    log = os.path.join(output_dir, "metrics.json")
    if os.path.exists(log):
        path = os.path.join(output_dir, "training_curve.png")
        plot_training_curve(read_training_log(log), path)
        print(path)
    for name in cfg.DATASETS.TEST:
        folder = os.path.join(output_dir, "inference", name)
        if not os.path.exists(os.path.join(folder, "predictions.npz")):
            continue
        with np.load(os.path.join(folder, "predictions.npz")) as predictions:
            predictions = dict(predictions)
        images = sample_images(name, predictions, num_images)
        path = os.path.join(folder, "predictions.png")
        draw_prediction_sheet(images, predictions["label_names"].tolist(), cfg.TEST.THRESHOLD, path)
        print(path)


def sample_images(dataset_name: str, predictions, count: int):
    """Some of a data set's images with their scores, always the same ones."""
    files = {
        record["image_id"]: record["file_name"] for record in get_multilabel_dicts([dataset_name])
    }
    image_ids = predictions["image_ids"].tolist()
    chosen = np.random.default_rng(0).permutation(len(image_ids))[:count]
    return [
        {
            "file_name": files[image_ids[i]],
            "scores": predictions["scores"][i],
            "targets": predictions["targets"][i],
        }
        for i in chosen
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", help="OUTPUT_DIR of the run")
    parser.add_argument("--num-images", type=int, default=24, help="per sheet (default 24)")
    args = parser.parse_args()
    try:
        visualize(args.output_dir, args.num_images)
    except InputError as error:
        print(f"visualize_results: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
