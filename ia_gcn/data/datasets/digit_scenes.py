"""DigitScenes: scenes of real handwritten digits, made by datasets/prepare_digit_scenes.py."""

import glob
import os
from functools import partial
from typing import Dict, List

from .coco import load_multilabel_coco, register_multilabel_coco
from .common import register_multilabel

DIGIT_LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def register_digit_scenes(root: str) -> None:
    """digit_scenes_train and digit_scenes_val, and two parts of train, 5 to 3; and the same of
    digit_scenes_hard, and of each set with knobs in the folder, such as digit_scenes_e0.5_c1.0.

    A network is trained on digit_scenes_train_a, and heads on its features on
    digit_scenes_train_b, whose scenes the network has not seen.
    """
    with_knobs = glob.glob(os.path.join(glob.escape(root), "digit_scenes_e*_c*"))
    for name in ("digit_scenes", "digit_scenes_hard", *map(os.path.basename, sorted(with_knobs))):
        files = {
            split: (
                os.path.join(root, f"{name}/annotations/{split}.json"),
                os.path.join(root, f"{name}/{split}"),
            )
            for split in ("train", "val")
        }
        for split in files:
            register_multilabel_coco(f"{name}_{split}", *files[split], DIGIT_LABELS)
        for part in ("a", "b"):
            load = partial(_load_part, part, *files["train"])
            register_multilabel(f"{name}_train_{part}", load, DIGIT_LABELS)


def _load_part(part: str, json_file: str, image_root: str) -> List[Dict]:
    dicts = load_multilabel_coco(json_file, image_root, DIGIT_LABELS)
    cut = len(dicts) * 5 // 8
    return dicts[:cut] if part == "a" else dicts[cut:]
