"""DigitScenes: scenes of real handwritten digits, made by datasets/prepare_digit_scenes.py."""

import os
from functools import partial
from typing import Dict, List

from .coco import load_multilabel_coco, register_multilabel_coco
from .common import register_multilabel

DIGIT_LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def register_digit_scenes(root: str) -> None:
    """digit_scenes_train and digit_scenes_val, and two parts of train, 5 to 3.

    A network is trained on digit_scenes_train_a, and what is put upon it on digit_scenes_train_b,
    whose scenes it has not seen.
    """
    for split in ("train", "val"):
        register_multilabel_coco(f"digit_scenes_{split}", *_files(root, split), DIGIT_LABELS)
    for part in ("a", "b"):
        register_multilabel(
            f"digit_scenes_train_{part}", partial(_load_part, root, part), DIGIT_LABELS
        )


def _files(root: str, split: str):
    return (
        os.path.join(root, f"digit_scenes/annotations/{split}.json"),
        os.path.join(root, f"digit_scenes/{split}"),
    )


def _load_part(root: str, part: str) -> List[Dict]:
    dicts = load_multilabel_coco(*_files(root, "train"), DIGIT_LABELS)
    cut = len(dicts) * 5 // 8
    return dicts[:cut] if part == "a" else dicts[cut:]
