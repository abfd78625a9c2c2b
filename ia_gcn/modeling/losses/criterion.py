"""The criterion: the losses of what a label head returns."""

from __future__ import annotations

from typing import Dict, FrozenSet, Tuple

import torch
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from .base import build_multi_label_loss


class MultiLabelCriterion(nn.Module):
    """The losses of what a label head returns."""

    @configurable
    def __init__(self, *, loss: nn.Module, aux_weights: Dict[str, float] | None = None):
        """
        Args:
            loss: logits (B, C) and targets (B, C) to a scalar, see `MultiLabelLoss`.
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

    @property
    def needs(self) -> FrozenSet[str]:
        """What the loss asks the training for, see `MultiLabelLoss`."""
        return getattr(self.loss, "needs", frozenset())

    def forward(
        self,
        outputs: Dict[str, torch.Tensor],
        targets: torch.Tensor,
        images: torch.Tensor | None = None,
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            outputs: logits (B, C), and aux_logits {name: (B, C)} and aux_losses {name: scalar}
                where there are some.
            targets: (B, C), see `MultiLabelLoss`.
            images: (B,) int64, places in the training set; for a loss that needs them.
        Returns:
            loss_multi_label, of the logits, and loss_<name> of each auxiliary output, times its
            weight.
        Raises:
            InputError: a weight is of auxiliary logits or losses that are not there.
            RuntimeError: the loss needs label counts, and has none.
        """
        if "label_counts" in self.needs and not self.loss.is_filled:
            raise RuntimeError(
                f"{type(self.loss).__name__} has no label counts: call ia_gcn.engine.fill_loss, as "
                "Trainer does"
            )
        context = {"images": images} if "images" in self.needs else {}
        aux_logits = outputs.get("aux_logits", {})
        aux_losses = {
            name: self.loss(logits, targets, **context) for name, logits in aux_logits.items()
        }
        aux_losses.update(outputs.get("aux_losses", {}))
        unknown = sorted(set(self.aux_weights) - set(aux_losses))
        if unknown:
            raise InputError(
                "MODEL.LOSS.AUX_WEIGHTS: the label head has no auxiliary logits or losses "
                f"{unknown[0]!r}, but {', '.join(aux_losses) or 'none'}"
            )
        losses = {"loss_multi_label": self.loss(outputs["logits"], targets, **context)}
        for name, loss in aux_losses.items():
            losses[f"loss_{name}"] = self.aux_weights.get(name, 1.0) * loss
        return losses


def _parse_weight(text: str) -> Tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise InputError(f"MODEL.LOSS.AUX_WEIGHTS: {text!r} is not name=weight") from None
