"""Multi-label losses: logits (B, C) and targets (B, C) to a scalar; the criterion over them.

A target is 1 (present), 0 (absent) or -1 (ignored: no gradient).
"""

from __future__ import annotations

import math
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import InputError

MULTI_LABEL_LOSS_REGISTRY = Registry("MULTI_LABEL_LOSS")
MULTI_LABEL_LOSS_REGISTRY.__doc__ = """
Registry for multi-label losses. A registered class is called as `Loss(cfg)`.
"""


def build_multi_label_loss(cfg: CfgNode) -> nn.Module:
    """The loss that MODEL.LOSS.NAME asks for."""
    return MULTI_LABEL_LOSS_REGISTRY.get(cfg.MODEL.LOSS.NAME)(cfg)


class MultiLabelCriterion(nn.Module):
    """The losses of what a label head returns."""

    @configurable
    def __init__(self, *, loss: nn.Module, aux_weights: Dict[str, float] | None = None):
        """
        Args:
            loss: logits (B, C) and targets (B, C) to a scalar.
            aux_weights: of auxiliary logits and losses by name; 1 for those that are not in it.
        """
        super().__init__()
        self.loss = loss
        self.aux_weights = dict(aux_weights or {})

    @classmethod
    def from_config(cls, cfg):
        return {
            "loss": build_multi_label_loss(cfg),
            "aux_weights": dict(map(_parse_weight, cfg.MODEL.LOSS.AUX_WEIGHTS)),
        }

    def forward(
        self, outputs: Dict[str, torch.Tensor], targets: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            outputs: logits (B, C), and aux_logits {name: (B, C)} and aux_losses {name: scalar}
                where there are some.
            targets: (B, C) in {1, 0, -1}.
        Returns:
            loss_multi_label, of the logits, and loss_<name> of each auxiliary output, times its
            weight.
        Raises:
            InputError: a weight is of auxiliary logits or losses that are not there.
        """
        aux_logits = outputs.get("aux_logits", {})
        aux_losses = {name: self.loss(logits, targets) for name, logits in aux_logits.items()}
        aux_losses.update(outputs.get("aux_losses", {}))
        unknown = sorted(set(self.aux_weights) - set(aux_losses))
        if unknown:
            raise InputError(
                "MODEL.LOSS.AUX_WEIGHTS: the label head has no auxiliary logits or losses "
                f"{unknown[0]!r}, but {', '.join(aux_losses) or 'none'}"
            )
        losses = {"loss_multi_label": self.loss(outputs["logits"], targets)}
        for name, loss in aux_losses.items():
            losses[f"loss_{name}"] = self.aux_weights.get(name, 1.0) * loss
        return losses


def _parse_weight(text: str) -> Tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise InputError(f"MODEL.LOSS.AUX_WEIGHTS: {text!r} is not name=weight") from None


def multi_label_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label, mean over labels and images (IA-GCN Eq. 13).

    An ignored entry contributes 0 and stays in the mean's C, so that an image weighs the same
    however many of its labels are ignored, and the gradient of a batch is the mean of its images'.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, -1}.
    Returns:
        scalar of the logits' dtype.
    """
    known = (targets >= 0).to(logits.dtype)
    targets = targets.clamp(min=0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=known)


@MULTI_LABEL_LOSS_REGISTRY.register()
class MultiLabelBCE(nn.Module):
    """See `multi_label_bce`."""

    @configurable
    def __init__(self):
        super().__init__()

    @classmethod
    def from_config(cls, cfg):
        return {}

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return multi_label_bce(logits, targets)


def asymmetric_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    clip: float = 0.05,
    focusing_gradient: bool = False,
) -> torch.Tensor:
    """ASL (Ben-Baruch et al., ICCV 2021): the sum over an image's labels, mean over images.

    With p = σ(logit) and p_m = max(p - m, 0), a label that is present costs
    -(1 - p)^γ+ log p, one that is absent -p_m^γ- log(1 - p_m), an ignored one 0.

    Published learning rates go with the sum over the labels of the whole batch. That over the
    labels is kept; the mean over images makes the gradient of a batch the mean of its images'. The
    constant factor B between the two matters little to Adam, with which ASL is trained.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, -1}.
        gamma_pos, gamma_neg: γ+, γ-, 0 or more.
        clip: m, in [0, 1).
        focusing_gradient: whether the factors (1 - p)^γ+ and p_m^γ- have a gradient.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    present = targets == 1
    log_likelihood = torch.where(present, F.logsigmoid(logits), log_absent(logits, clip))
    # At 0 a power below 1 has no derivative. Where a factor is this small, so is its logarithm.
    tiny = torch.finfo(logits.dtype).tiny
    focus_pos = (-logits).sigmoid().clamp(min=tiny) ** gamma_pos
    focus_neg = (logits.sigmoid() - clip).clamp(min=tiny) ** gamma_neg
    focus = torch.where(present, focus_pos, focus_neg)
    if not focusing_gradient:
        focus = focus.detach()
    return -(focus * log_likelihood).masked_fill(targets < 0, 0).sum(1).mean()


def log_absent(logits: torch.Tensor, clip: float) -> torch.Tensor:
    """log min(σ(-x) + m, 1) of logits x, with m = `clip`."""
    # Added up in log space, where σ(-x) can't come out as 0.
    return torch.logaddexp(F.logsigmoid(-logits), logits.new_full((), clip).log()).clamp(max=0)


@MULTI_LABEL_LOSS_REGISTRY.register()
class AsymmetricLoss(nn.Module):
    """See `asymmetric_loss`."""

    @configurable
    def __init__(self, *, gamma_pos: float, gamma_neg: float, clip: float, focusing_gradient: bool):
        """
        Raises:
            InputError: a number is out of range.
        """
        super().__init__()
        check_asymmetry(gamma_pos, gamma_neg, clip)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.clip = clip
        self.focusing_gradient = focusing_gradient

    @classmethod
    def from_config(cls, cfg):
        loss = cfg.MODEL.LOSS
        return {
            "gamma_pos": loss.GAMMA_POS,
            "gamma_neg": loss.GAMMA_NEG,
            "clip": loss.CLIP,
            "focusing_gradient": loss.FOCUSING_GRADIENT,
        }

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return asymmetric_loss(
            logits,
            targets,
            self.gamma_pos,
            self.gamma_neg,
            self.clip,
            self.focusing_gradient,
        )


def asymmetric_angular_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    gamma_pos: float = 0.0,
    gamma_neg: float = 1.0,
    clip: float = 0.05,
    positive_weight: float = 0.8,
) -> torch.Tensor:
    """AAM (Sovrasov and Sidnev, VISAPP 2023): the sum over an image's labels, mean over images.

    Of logits s · cos θ, where θ is the angle between an image's feature and a label's classifier.
    With p = σ(logit) and q = min(1 - p + m, 1), a label that is present costs -k q^γ+ log p, one
    that is absent -(1 - k) p^γ- log q, an ignored one 0. Unlike ASL, it weighs presence against
    absence, its focusing factor of an absent label is that of p itself, and the factors have a
    gradient.

    That is what OpenVINO's training extensions compute, whose margin is in the probabilities. They
    also divide by s, a constant factor, which makes no difference to Adam.

    Args:
        logits: (B, C) floats, see `LinearHead`.
        targets: (B, C) in {1, 0, -1}.
        gamma_pos, gamma_neg: γ+, γ-, 0 or more.
        clip: m, in [0, 1).
        positive_weight: k, in [0, 1].
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_q = log_absent(logits, clip)
    # At 0 a power below 1 has no derivative. Where p is this small, so is log q.
    p = logits.sigmoid().clamp(min=torch.finfo(logits.dtype).tiny)
    cost_present = positive_weight * (gamma_pos * log_q).exp() * F.logsigmoid(logits)
    cost_absent = (1 - positive_weight) * p**gamma_neg * log_q
    costs = -torch.where(targets == 1, cost_present, cost_absent)
    return costs.masked_fill(targets < 0, 0).sum(1).mean()


@MULTI_LABEL_LOSS_REGISTRY.register()
class AsymmetricAngularLoss(nn.Module):
    """See `asymmetric_angular_loss`."""

    @configurable
    def __init__(self, *, gamma_pos: float, gamma_neg: float, clip: float, positive_weight: float):
        """
        Raises:
            InputError: a number is out of range.
        """
        super().__init__()
        check_asymmetry(gamma_pos, gamma_neg, clip)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.clip = clip
        self.positive_weight = positive_weight

    @classmethod
    def from_config(cls, cfg):
        loss = cfg.MODEL.LOSS
        return {
            "gamma_pos": loss.GAMMA_POS,
            "gamma_neg": loss.GAMMA_NEG,
            "clip": loss.CLIP,
            "positive_weight": loss.POSITIVE_WEIGHT,
        }

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return asymmetric_angular_loss(
            logits, targets, self.gamma_pos, self.gamma_neg, self.clip, self.positive_weight
        )


def check_asymmetry(gamma_pos: float, gamma_neg: float, clip: float) -> None:
    """
    Raises:
        InputError: a number is out of range.
    """
    for key, gamma in (("GAMMA_POS", gamma_pos), ("GAMMA_NEG", gamma_neg)):
        if not 0 <= gamma < math.inf:
            raise InputError(f"MODEL.LOSS.{key} must be 0 or more, got {gamma}")
    if not 0 <= clip < 1:
        raise InputError(f"MODEL.LOSS.CLIP must be in [0, 1), got {clip}")
