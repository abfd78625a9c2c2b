"""Optimizer and learning-rate schedule, and epochs turned into iterations."""

from __future__ import annotations

import math
from functools import partial
from typing import Type

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_d2_lr_scheduler
from detectron2.solver.build import (
    _generate_optimizer_class_with_gradient_clipping,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler
from torch import nn

from ..errors import InputError

# Of the one-cycle schedule: the rate starts at its peak / 25 and ends at the start / 10⁴, as in
# torch's OneCycleLR.
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START * 1e-4


def iterations_per_epoch(cfg: CfgNode, num_images: int) -> int:
    """An epoch is as many iterations as it takes to see all images; the last one may spill over."""
    return math.ceil(num_images / cfg.SOLVER.IMS_PER_BATCH)


def epochs_to_iterations(cfg: CfgNode, num_images: int) -> None:
    """Convert the epochs of `cfg`, if it has some, to iterations over `num_images` images."""
    per_epoch = iterations_per_epoch(cfg, num_images)
    if cfg.SOLVER.MAX_EPOCHS:
        cfg.SOLVER.MAX_ITER = cfg.SOLVER.MAX_EPOCHS * per_epoch
    if cfg.SOLVER.STEP_EPOCHS:
        steps = (epoch * per_epoch for epoch in cfg.SOLVER.STEP_EPOCHS)
        cfg.SOLVER.STEPS = tuple(step for step in steps if step < cfg.SOLVER.MAX_ITER)
    if cfg.SOLVER.CHECKPOINT_EPOCHS:
        cfg.SOLVER.CHECKPOINT_PERIOD = cfg.SOLVER.CHECKPOINT_EPOCHS * per_epoch
    if cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = cfg.TEST.EVAL_EPOCHS * per_epoch


def add_gradient_clipping(
    cfg: CfgNode, optimizer: Type[torch.optim.Optimizer]
) -> Type[torch.optim.Optimizer]:
    """An optimizer's class with SOLVER.CLIP_GRADIENTS in its step.

    value and norm are detectron2's, of each parameter by itself; full_model limits the norm of all
    gradients together.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer)
    limit = partial(nn.utils.clip_grad_norm_, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    return _generate_optimizer_class_with_gradient_clipping(optimizer, global_clipper=limit)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over all parameters of `model`, the backbone's at their own rate.

    A res5 stage of the regions is the backbone's, too.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    backbone = {
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("backbone.", "roi_heads.res5."))
    }
    params = []
    for group in groups:
        for multiplier, chosen in (
            (solver.BACKBONE_MULTIPLIER, [p for p in group["params"] if p in backbone]),
            (1, [p for p in group["params"] if p not in backbone]),
        ):
            if chosen:
                params.append({**group, "params": chosen, "lr": multiplier * group["lr"]})
    if solver.OPTIMIZER == "SGD":
        sgd = add_gradient_clipping(cfg, torch.optim.SGD)
        return sgd(params, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.OPTIMIZER in ("Adam", "AdamW"):
        adam = add_gradient_clipping(cfg, getattr(torch.optim, solver.OPTIMIZER))
        # By default, torch on a CPU updates the weights one by one, with some ten operations each;
        # on a GPU it updates them together. SGD is not fused: its fused form fails on a weight
        # whose first gradient comes later than the others', as that of a region head may.
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        return adam(params, solver.BASE_LR, fused=on_cpu or None)
    raise InputError(f"SOLVER.OPTIMIZER must be SGD, Adam or AdamW, not {solver.OPTIMIZER!r}")


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """SOLVER.LR_SCHEDULER_NAME: OneCycleLR, or one of detectron2's (step, cosine)."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "OneCycleLR":
        return build_d2_lr_scheduler(cfg, optimizer)
    rise = cfg.SOLVER.ONE_CYCLE_RISE
    if not 0 < rise < 1:
        raise InputError(f"SOLVER.ONE_CYCLE_RISE must be between 0 and 1, not {rise}")
    multiplier = CompositeParamScheduler(
        [CosineParamScheduler(ONE_CYCLE_START, 1), CosineParamScheduler(1, ONE_CYCLE_END)],
        lengths=[rise, 1 - rise],
        interval_scaling=["rescaled", "rescaled"],
    )
    return LRMultiplier(optimizer, multiplier, cfg.SOLVER.MAX_ITER)
