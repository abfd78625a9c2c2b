"""What commands do with the folder that a training leaves behind."""

from __future__ import annotations

import json
import os
from typing import Dict, List, Sequence

from detectron2.config import CfgNode

from ..data import get_test_dicts
from ..engine import setup_cfg
from ..errors import InputError
from ..io.files import write_text_atomically
from ..visualization import sample_items


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
