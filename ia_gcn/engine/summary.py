"""Summaries of a training or an evaluation, printed before and after it."""

from __future__ import annotations

import json
import os
from typing import Dict, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..evaluation.report import metrics_tables
from .logs import LOG_FILE


def model_summary(cfg: CfgNode, model: nn.Module) -> str:
    """Its classes, its backbone and its size."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = f"{total / 1e6:.2f} million parameters"
    if trained < total:
        size += f", {trained / 1e6:.2f} million of them trained"
    return (
        f"{cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.LABEL_HEAD.NAME}, {backbone_name(cfg)}, {size}"
    )


def backbone_name(cfg: CfgNode) -> str:
    """The backbone's usual name, not that of the function that builds it."""
    name = cfg.MODEL.BACKBONE.NAME
    if name == "build_timm_backbone":
        return f"timm's {cfg.MODEL.TIMM.NAME}"
    if name == "build_resnet_backbone":
        return f"ResNet-{cfg.MODEL.RESNETS.DEPTH}"
    return name.removeprefix("build_").removesuffix("_backbone")


def data_summary(sizes: Dict[str, int], num_labels: int) -> str:
    """Data sets with their numbers of images, and the number of labels."""
    parts = [f"{name} ({size:,} images)" for name, size in sizes.items()]
    return f"{', '.join(parts) or 'none'}, {num_labels} labels"


def known_summary(cfg: CfgNode) -> str:
    """How many labels of a test image are known; "" if none is."""
    share = cfg.TEST.KNOWN_LABELS
    return f", {share:.0%} of each image's known, the others measured" if share else ""


def device_summary(model: nn.Module, precision: str) -> str:
    """The device by name, the precision, and how many processes there are."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(device) if torch.cuda.is_available() else f"{device} (no GPU found)"
    processes = comm.get_world_size()
    return f"{name}, {precision}" + (f", {processes} processes" if processes > 1 else "")


def training_summary(trainer) -> str:
    """What is trained on what, and how, as lines; of a `Trainer` before it starts."""
    cfg, solver = trainer.cfg, trainer.cfg.SOLVER
    num_images = len(trainer.data_loader.dataset)
    num_labels = cfg.MODEL.LABEL_HEAD.NUM_LABELS
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / num_images
    return _lines(
        "Training",
        {
            "model": model_summary(cfg, trainer.checkpointer.model),
            "weights": initial_weights(trainer),
            "data": data_summary({", ".join(cfg.DATASETS.TRAIN): num_images}, num_labels),
            "tested on": data_summary(trainer.test_sizes, num_labels) + known_summary(cfg),
            "schedule": (
                f"{solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH} images "
                f"({epochs:.3g} epochs), {solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}, "
                f"seed {trainer.seed}"
            ),
            "device": device_summary(trainer.model, training_precision(trainer.amp_dtype)),
            "output": cfg.OUTPUT_DIR,
        },
    )


def training_precision(amp_dtype: torch.dtype | None) -> str:
    """In the words of TEST.PRECISION; None: no mixed precision."""
    names = {torch.float16: "mixed fp16 and fp32", torch.bfloat16: "mixed bf16 and fp32"}
    return names.get(amp_dtype, "fp32")


def initial_weights(trainer) -> str:
    """Where the weights come from that a training starts with."""
    cfg, checkpointer = trainer.cfg, trainer.checkpointer
    if trainer.start_iter:
        return f"{checkpointer.get_checkpoint_file()}, resumed after iteration {trainer.start_iter}"
    if cfg.MODEL.WEIGHTS:
        text = cfg.MODEL.WEIGHTS
        if checkpointer.missing:
            parts = sorted({name.split(".")[0] for name in checkpointer.missing})
            text += f", random for {len(checkpointer.missing)} tensors of {', '.join(parts)}"
        return text
    if cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        if cfg.MODEL.TIMM.WEIGHTS_FILE:
            return f"{cfg.MODEL.TIMM.WEIGHTS_FILE} for the backbone, else random"
        if cfg.MODEL.TIMM.PRETRAINED:
            return "timm's for the backbone, else random"
    return "random"


def evaluation_summary(cfg: CfgNode, model: nn.Module, weights: str, sizes: Dict[str, int]) -> str:
    """What is evaluated on what, as lines."""
    return _lines(
        "Evaluation",
        {
            "model": model_summary(cfg, model),
            "weights": weights + (" (EMA)" if cfg.TEST.EMA else ""),
            "data": data_summary(sizes, cfg.MODEL.LABEL_HEAD.NUM_LABELS) + known_summary(cfg),
            "device": device_summary(model, cfg.TEST.PRECISION),
            "output": cfg.OUTPUT_DIR,
        },
    )


def results_summary(cfg: CfgNode, with_ema: bool = False) -> str:
    """The tables of an evaluation of DATASETS.TEST, from the files that it wrote.

    Args:
        cfg: with its OUTPUT_DIR.
        with_ema: the EMA of the weights was evaluated, too.
    """
    parts = []
    for title, folder in (("", ""), ("EMA of the weights on ", "ema"))[: 1 + with_ema]:
        for name in cfg.DATASETS.TEST:
            path = os.path.join(cfg.OUTPUT_DIR, folder, "inference", name, "metrics.json")
            with PathManager.open(path) as file:
                metrics = json.load(file)
            parts.append(f"{title}{name}, {metrics['images']:,} images, in percent:")
            parts.append(metrics_tables(metrics, cfg.TEST.TOP_K or None))
    return "\n".join(parts)


def files_summary(cfg: CfgNode, checkpoints: Sequence[str] = ()) -> str:
    """Where things are, as lines.

    Args:
        cfg: of the run.
        checkpoints: a description each.
    """
    folders = [os.path.join(cfg.OUTPUT_DIR, "inference", name) for name in cfg.DATASETS.TEST]
    reports = [os.path.join(folder, "report.html") for folder in folders if cfg.TEST.REPORT]
    rows = {
        "checkpoints": ", ".join(checkpoints),
        "results": ", ".join(folders),
        "report": ", ".join(reports),
        "log": os.path.join(cfg.OUTPUT_DIR, LOG_FILE),
    }
    return _lines("Written", {name: text for name, text in rows.items() if text})


def _lines(title: str, rows: Dict[str, str]) -> str:
    return "\n".join([title, *(f"  {name:<13}{text}" for name, text in rows.items())])
