"""Losses that treat present and absent labels differently: ASL, AAM, and ASL for partial labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable

from ...errors import InputError
from .base import MULTI_LABEL_LOSS_REGISTRY, UNKNOWN, MultiLabelLoss, at_least_float32


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
        targets: (B, C) in {1, 0}; entries below 0 are ignored.
        gamma_pos, gamma_neg: γ+, γ-, 0 or more.
        clip: m, in [0, 1).
        focusing_gradient: whether the factors (1 - p)^γ+ and p_m^γ- have a gradient.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    costs = asymmetric_costs(
        logits, targets == 1, gamma_pos, gamma_neg, clip, focusing_gradient=focusing_gradient
    )
    return costs.masked_fill(targets < 0, 0).sum(1).mean()


def asymmetric_costs(
    logits: torch.Tensor,
    present: torch.Tensor,
    gamma_pos: float,
    gamma_neg: float | torch.Tensor,
    clip: float,
    *,
    focusing_gradient: bool = False,
) -> torch.Tensor:
    """What each label costs in `asymmetric_loss`, (B, C).

    Args:
        logits: (B, C) floats.
        present: (B, C) bool; the others are absent.
        gamma_neg: one for all labels that are absent, or (B, C).
        gamma_pos, clip, focusing_gradient: see `asymmetric_loss`.
    """
    logits = at_least_float32(logits)
    log_likelihood = torch.where(present, F.logsigmoid(logits), log_absent(logits, clip))
    # At 0 a power below 1 has no derivative. Where a factor is this small, so is its logarithm.
    tiny = torch.finfo(logits.dtype).tiny
    focus_pos = (-logits).sigmoid().clamp(min=tiny) ** gamma_pos
    focus_neg = (logits.sigmoid() - clip).clamp(min=tiny) ** gamma_neg
    focus = torch.where(present, focus_pos, focus_neg)
    if not focusing_gradient:
        focus = focus.detach()
    return -focus * log_likelihood


def log_absent(logits: torch.Tensor, clip: float) -> torch.Tensor:
    """log min(σ(-x) + m, 1) of logits x, with m = `clip`."""
    # Added up in log space, where σ(-x) can't come out as 0.
    return torch.logaddexp(F.logsigmoid(-logits), logits.new_full((), clip).log()).clamp(max=0)


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
        targets: (B, C) in {1, 0}; entries below 0 are ignored.
        gamma_pos, gamma_neg: γ+, γ-, 0 or more.
        clip: m, in [0, 1).
        positive_weight: k, in [0, 1].
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    log_q = log_absent(logits, clip)
    # At 0 a power below 1 has no derivative. Where p is this small, so is log q.
    p = logits.sigmoid().clamp(min=torch.finfo(logits.dtype).tiny)
    cost_present = positive_weight * (gamma_pos * log_q).exp() * F.logsigmoid(logits)
    cost_absent = (1 - positive_weight) * p**gamma_neg * log_q
    costs = -torch.where(targets == 1, cost_present, cost_absent)
    return costs.masked_fill(targets < 0, 0).sum(1).mean()


def selective_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    frequent: torch.Tensor,
    top_k: int = 5,
    gamma_pos: float = 0.0,
    gamma_neg: float = 1.0,
    gamma_unknown: float = 4.0,
    clip: float = 0.0,
) -> torch.Tensor:
    """Class-aware selective loss with P-ASL: the sum over an image's labels, mean over images.

    Ben-Baruch et al., Multi-label Classification with Partial Annotations using Class-aware
    Selective Loss, CVPR 2022. An unknown label is ignored where it may well be there: it is
    frequent, or it is one of the image's likeliest. All other unknown labels are absent ones, with
    a focusing exponent of their own, by which they count less. Without a gradient of the factors.

    The authors' code ignores the B · K likeliest of a whole batch; here they are K of each image,
    so that the loss of an image does not depend on the others.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, UNKNOWN}; lower ones are ignored.
        frequent: (C,) bool, labels that are ignored wherever they are unknown.
        top_k: K, 0 or more.
        gamma_pos, gamma_neg, clip: see `asymmetric_loss`, of labels that are known.
        gamma_unknown: γu, 0 or more.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    unknown = targets == UNKNOWN
    likely = torch.zeros_like(unknown)
    likeliest = logits.detach().masked_fill(~unknown, -math.inf)
    likely.scatter_(1, likeliest.topk(min(top_k, logits.shape[1]), dim=1).indices, True)
    gammas = torch.full_like(logits, gamma_neg).masked_fill(unknown, gamma_unknown)
    costs = asymmetric_costs(logits, targets == 1, gamma_pos, gammas, clip)
    ignored = (targets < UNKNOWN) | unknown & (frequent | likely)
    return costs.masked_fill(ignored, 0).sum(1).mean()


class AsymmetricFocusing(MultiLabelLoss):
    """What the losses of this file have in common: exponents for both kinds of labels, and a shift.

    Attributes:
        gamma_pos, gamma_neg: γ+ and γ-.
        clip: m.
    """

    def __init__(self, gamma_pos: float, gamma_neg: float, clip: float):
        """
        Raises:
            InputError: a number is out of range.
        """
        super().__init__()
        for key, gamma in (("GAMMA_POS", gamma_pos), ("GAMMA_NEG", gamma_neg)):
            if not 0 <= gamma < math.inf:
                raise InputError(f"MODEL.LOSS.{key} must be 0 or more, got {gamma}")
        if not 0 <= clip < 1:
            raise InputError(f"MODEL.LOSS.CLIP must be in [0, 1), got {clip}")
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.clip = clip

    @classmethod
    def from_config(cls, cfg):
        loss = cfg.MODEL.LOSS
        return {"gamma_pos": loss.GAMMA_POS, "gamma_neg": loss.GAMMA_NEG, "clip": loss.CLIP}


@MULTI_LABEL_LOSS_REGISTRY.register()
class AsymmetricLoss(AsymmetricFocusing):
    """See `asymmetric_loss`."""

    @configurable
    def __init__(self, *, focusing_gradient: bool, **focusing: float):
        super().__init__(**focusing)
        self.focusing_gradient = focusing_gradient

    @classmethod
    def from_config(cls, cfg):
        return {
            **super().from_config(cfg),
            "focusing_gradient": cfg.MODEL.LOSS.FOCUSING_GRADIENT,
        }

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        numbers = self.gamma_pos, self.gamma_neg, self.clip
        return asymmetric_loss(logits, targets, *numbers, self.focusing_gradient)


@MULTI_LABEL_LOSS_REGISTRY.register()
class AsymmetricAngularLoss(AsymmetricFocusing):
    """See `asymmetric_angular_loss`."""

    @configurable
    def __init__(self, *, positive_weight: float, **focusing: float):
        super().__init__(**focusing)
        self.positive_weight = positive_weight

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "positive_weight": cfg.MODEL.LOSS.POSITIVE_WEIGHT}

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        numbers = self.gamma_pos, self.gamma_neg, self.clip
        return asymmetric_angular_loss(logits, targets, *numbers, self.positive_weight)


@MULTI_LABEL_LOSS_REGISTRY.register()
class SelectiveLoss(AsymmetricFocusing):
    """See `selective_loss`.

    A label is frequent if the share of images that have it, of those where it is known, is above
    the threshold. The paper estimates that share by the mean probability of a temporary model,
    trained on the known labels alone: MODEL.LOSS.LABEL_COUNTS takes its predictions.
    """

    needs = frozenset({"label_counts"})

    @configurable
    def __init__(
        self,
        *,
        num_labels: int,
        gamma_unknown: float,
        top_k: int,
        prior_threshold: float,
        **focusing: float,
    ):
        """
        Args:
            num_labels: C.
            gamma_unknown: γu.
            top_k: K.
            prior_threshold: η, in [0, 1].
        """
        super().__init__(**focusing)
        self.gamma_unknown = gamma_unknown
        self.top_k = top_k
        self.prior_threshold = prior_threshold
        self.register_buffer("frequent", torch.zeros(num_labels, dtype=torch.bool), False)

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.LOSS.SELECTIVE
        return {
            **super().from_config(cfg),
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "gamma_unknown": keys.GAMMA_UNKNOWN,
            "top_k": keys.TOP_K,
            "prior_threshold": keys.PRIOR_THRESHOLD,
        }

    def fill(self, num_images: int, present: torch.Tensor, absent: torch.Tensor) -> None:
        super().fill(num_images, present, absent)
        self.frequent.copy_(present > self.prior_threshold * (present + absent))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return selective_loss(
            logits,
            targets,
            self.frequent,
            self.top_k,
            self.gamma_pos,
            self.gamma_neg,
            self.gamma_unknown,
            self.clip,
        )
