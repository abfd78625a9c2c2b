"""DigitScenes: scenes of real handwritten digits, made by datasets/prepare_digit_scenes.py."""

import os

from .coco import register_multilabel_coco

DIGIT_LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def register_digit_scenes(root: str) -> None:
    """digit_scenes_train and digit_scenes_val."""
    for split in ("train", "val"):
        register_multilabel_coco(
            f"digit_scenes_{split}",
            os.path.join(root, f"digit_scenes/annotations/{split}.json"),
            os.path.join(root, f"digit_scenes/{split}"),
            DIGIT_LABELS,
        )
