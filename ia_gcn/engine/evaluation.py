"""The evaluation of a checkpoint, whatever the order of its labels."""

from __future__ import annotations

import logging
from typing import Dict

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..checkpoint import load_model, scored_labels
from ..data import get_label_names, get_test_dicts
from ..errors import InputError
from ..inference import SelectLabels, optimize_for_inference, set_precision
from .label_matching import checkpoint_labels, match_labels, training_counts, weights_path
from .output_lock import evaluation_in
from .summary import evaluation_summary, files_summary, results_summary
from .trainer import Trainer

logger = logging.getLogger(__name__)


def evaluate_checkpoint(cfg: CfgNode, resume: bool = False) -> Dict:
    """Evaluate MODEL.WEIGHTS on DATASETS.TEST; the results are also in OUTPUT_DIR/inference.

    The model has the checkpoint's labels, or those of TEST.LABELS. With
    DATASETS.MATCH_LABELS_BY_NAME, its outputs are selected by the label names of the data set.

    Args:
        cfg: of `setup_cfg` with eval_only.
        resume: evaluate the last checkpoint in OUTPUT_DIR, where there is one.
    Returns:
        {"multi_label": {measure: percent}}, of several data sets one such by the name of each;
        empty on all but the main process.
    Raises:
        InputError: the checkpoint or a data set can't be used, or their labels do not go together.
    """
    if not cfg.DATASETS.TEST:
        raise InputError("--eval-only: DATASETS.TEST is empty")
    path = weights_path(cfg, resume)
    label_names = get_label_names(cfg.DATASETS.TEST)
    trained = scored_labels(cfg, checkpoint_labels(path))
    chosen = match_labels(label_names, trained, cfg.DATASETS.MATCH_LABELS_BY_NAME, path)
    trained = trained or label_names
    model = load_model(_with_num_labels(cfg, len(trained)), trained, path=path, ema=cfg.TEST.EMA)
    logger.debug(f"Model:\n{model}")
    cfg = _with_num_labels(cfg, len(label_names))
    cfg.defrost()
    # Of the last checkpoint, `resume` knows the path.
    cfg.MODEL.WEIGHTS = path
    cfg.freeze()
    if comm.is_main_process():
        sizes = {name: len(get_test_dicts(cfg, name)) for name in cfg.DATASETS.TEST}
        logger.info(evaluation_summary(cfg, model, path, sizes))
    if cfg.TEST.OPTIMIZE_MODEL:
        model = optimize_for_inference(model, cfg.INPUT.IMAGE_SIZE)
    set_precision(model, cfg.TEST.PRECISION)
    if label_names != trained:
        model = SelectLabels(model, chosen)
    label_counts = training_counts(path, label_names)
    if cfg.TEST.FREQUENCY_GROUPS and label_counts is None:
        logger.warning(
            f"TEST.FREQUENCY_GROUPS: MODEL.WEIGHTS {path} does not say how many training images "
            "have each label: frequent, middle and rare are thirds by the test images instead"
        )
    with evaluation_in(cfg.OUTPUT_DIR):
        results = Trainer.test(cfg, model, Trainer.build_evaluators(cfg, label_counts))
    if comm.is_main_process():
        logger.info(results_summary(cfg))
        logger.info(files_summary(cfg))
    return results


def _with_num_labels(cfg: CfgNode, num_labels: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = num_labels
    cfg.freeze()
    return cfg
