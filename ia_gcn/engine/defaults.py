"""From a config file and command-line options to a config that is ready to run."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from detectron2.config import CfgNode

from ..checkpoint import scored_labels
from ..config import read_config
from ..data import get_label_names, register_custom
from .held_out import check_held_out
from .label_matching import checkpoint_labels, weights_path


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
        config_file: path of a YAML file, see `find_config`; "" for the defaults.
        opts: alternating keys and values.
        eval_only: for an evaluation of the checkpoint alone. The training set is not read, and
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
    # A CSV lists only the labels that occur in it.
    if eval_only and custom.TEST.lower().endswith(".csv") and not custom.LABELS:
        labels = scored_labels(cfg, checkpoint_labels(weights_path(cfg, resume)))
        if labels:
            custom.LABELS, custom.TRAIN = labels, ""
    split = custom.SPLIT
    register_custom(cfg)
    check_held_out(cfg, split, eval_only=eval_only, resume=resume)
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    if names and (custom.TRAIN or custom.TEST or not cfg.MODEL.LABEL_HEAD.NUM_LABELS):
        cfg.MODEL.LABEL_HEAD.NUM_LABELS = len(get_label_names(names))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def make_config(
    config_file: str = "",
    options: Mapping[str, Any] | None = None,
    *,
    eval_only: bool = False,
    imports: Sequence[str] = (),
) -> CfgNode:
    """`setup_cfg` for Python: a frozen config, ready for `Trainer`.

    Args:
        config_file: of the package, such as "DigitScenes/ml_gcn.yaml", or a path of your own.
        options: values by key, for example {"SOLVER.MAX_EPOCHS": 5}. With DATASETS.TRAIN or
            DATASETS.TEST among them, the number of labels is that of these data sets.
        eval_only, imports: see `setup_cfg`.
    Raises:
        InputError: see `setup_cfg`.
    """
    options = dict(options or {})
    if "DATASETS.TRAIN" in options or "DATASETS.TEST" in options:
        options.setdefault("MODEL.LABEL_HEAD.NUM_LABELS", 0)
    opts = [item for pair in options.items() for item in pair]
    cfg = setup_cfg(config_file, opts, eval_only=eval_only, imports=imports)
    cfg.freeze()
    return cfg
