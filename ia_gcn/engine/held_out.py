"""DATASETS.CUSTOM.HOLD_OUT: no checkpoint is evaluated on images that it was trained on."""

from __future__ import annotations

import csv
import io
import logging
import os
import posixpath
from typing import Dict

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from ..io.files import write_atomically
from ..io.plain_yaml import load_plain_yaml
from .label_matching import checkpoint_content, weights_path

logger = logging.getLogger(__name__)


def check_held_out(cfg: CfgNode, split: str, *, eval_only: bool, resume: bool) -> None:
    """Refuse to evaluate a checkpoint on images that it was trained on.

    The config that a checkpoint carries says which images were held out in its training. Weights
    that a new training starts from only get a warning, and only where they are of the same file.

    Args:
        cfg: with the data sets of DATASETS.CUSTOM registered.
        split: DATASETS.CUSTOM.SPLIT as the config file had it, which is that of a training's
            config.yaml.
        eval_only, resume: of `setup_cfg`.
    Raises:
        InputError: other images were held out in the training.
    """
    custom = cfg.DATASETS.CUSTOM
    if not custom.SPLIT:
        return
    if split not in ("", custom.SPLIT):
        raise InputError(
            f"DATASETS.CUSTOM.TRAIN: {custom.TRAIN} has changed since the config was written: "
            "other images would be held out"
        )
    path = weights_path(cfg, resume)
    if not path or (not eval_only and not os.path.isfile(path)):
        return
    trained = _custom_keys(path)
    if trained.get("SPLIT") == custom.SPLIT:
        return
    if eval_only or path != cfg.MODEL.WEIGHTS:
        raise InputError(
            f"DATASETS.CUSTOM.HOLD_OUT {custom.HOLD_OUT}: MODEL.WEIGHTS {path} may have been "
            f"trained on the images that are held out of {custom.TRAIN}: set HOLD_OUT, "
            "HOLD_OUT_SEED and the file as in its training, or images of your own choice in "
            "DATASETS.CUSTOM.TEST"
        )
    if trained.get("TRAIN") == custom.TRAIN:
        logger.warning(
            f"MODEL.WEIGHTS {path} was trained on other images of {custom.TRAIN}: it may have seen "
            "some of the images that are held out now, so the measures will be too high."
        )


def _custom_keys(path: str) -> Dict:
    """DATASETS.CUSTOM of the config in a checkpoint; nothing where it carries none."""
    config = checkpoint_content(path).get("config")
    try:
        keys = load_plain_yaml(config, path)["DATASETS"]["CUSTOM"]
    except (KeyError, InputError, TypeError):
        return {}
    return keys if isinstance(keys, dict) else {}


def write_split(cfg: CfgNode) -> None:
    """Write split.csv into OUTPUT_DIR: a line `file,part` per image, part custom_train or
    custom_test. Does nothing where nothing is held out."""
    custom = cfg.DATASETS.CUSTOM
    if not custom.SPLIT:
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "part"])
    numbers = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        root, dicts = MetadataCatalog.get(name).image_root, DatasetCatalog.get(name)
        files = [posixpath.relpath(d["file_name"], root or ".") for d in dicts]
        writer.writerows((file, name) for file in files)
        numbers[name] = len(files)
    path = os.path.join(cfg.OUTPUT_DIR, "split.csv")
    PathManager.mkdirs(cfg.OUTPUT_DIR)
    with write_atomically(path) as file:
        file.write(text.getvalue().encode())
    logger.info(
        f"Held out {numbers['custom_test']} of {sum(numbers.values())} images of {custom.TRAIN} "
        f"for evaluation (DATASETS.CUSTOM.HOLD_OUT {custom.HOLD_OUT}); {path} lists them"
    )
