"""From a config file and command-line options to a config that is ready to run."""

from __future__ import annotations

import logging
from typing import Sequence

import torch
from detectron2.config import CfgNode

from ..config import read_config
from ..data import get_label_names, register_custom
from .label_matching import checkpoint_labels, weights_path

logger = logging.getLogger(__name__)


def setup_cfg(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    eval_only: bool = False,
    resume: bool = False,
    imports: Sequence[str] = (),
) -> CfgNode:
    """Read a config, register DATASETS.CUSTOM, and fill in what follows from data and machine.

    MODEL.LABEL_HEAD.NUM_LABELS becomes the number of the data set's labels where it is 0 or the
    data is custom; MODEL.DEVICE becomes cpu where there is no CUDA.

    Args:
        config_file: path of a YAML file; "" for the defaults.
        opts: alternating keys and values.
        eval_only: for an evaluation of the checkpoint alone. The training set is not looked at, and
            a CSV for DATASETS.CUSTOM.TEST has the checkpoint's labels, unless
            DATASETS.CUSTOM.LABELS is given.
        resume: whether that checkpoint is the last one in OUTPUT_DIR, see `weights_path`.
        imports: modules to import first, of which the config keeps the names as IMPORTS.
    Returns:
        the config, not frozen.
    Raises:
        InputError: a file, key or value that can't be used.
    """
    cfg = read_config(config_file, opts, imports)
    custom = cfg.DATASETS.CUSTOM
    # A CSV doesn't say which labels there might be besides those that it names.
    if eval_only and custom.TEST.lower().endswith(".csv") and not custom.LABELS:
        labels = checkpoint_labels(weights_path(cfg, resume))
        if labels:
            custom.LABELS, custom.TRAIN = labels, ""
    register_custom(cfg)
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    if names and (custom.TRAIN or custom.TEST or not cfg.MODEL.LABEL_HEAD.NUM_LABELS):
        cfg.MODEL.LABEL_HEAD.NUM_LABELS = len(get_label_names(names))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA here: MODEL.DEVICE is cpu.")
        cfg.MODEL.DEVICE = "cpu"
    return cfg
