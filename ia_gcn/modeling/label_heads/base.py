"""The contract of label heads: from feature maps to one logit per label.

B, C, D and d are the numbers of images, labels, feature channels and embedding dimensions.
"""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

from ...errors import InputError
from ..label_graph import LabelGraph
from ..pooling import GlobalPooling, masked_mean

LABEL_HEAD_REGISTRY = Registry("LABEL_HEAD")
LABEL_HEAD_REGISTRY.__doc__ = """
Registry for label heads, see `LabelHead`. A registered class is called as
`Head(cfg, input_shape)`, input_shape {name: ShapeSpec} of the backbone's feature maps.
"""

# Inputs that a recogniser can give to a head beside the feature maps.
CONTEXT = frozenset({"label_embeddings", "label_graph", "label_states", "presence"})


class LabelHead(nn.Module):
    """A module from feature maps to logits. Called as

        outputs = head(features, masks, **context)

    with
        features: {name: (B, D, H, W)}, at least those of `in_features`;
        masks: {name: (B, 1, H, W) bool, or None where every cell shows its image}. Cells that a
            mask excludes must not enter a max, mean, sum or softmax;
        context: by keyword, those of `needs` and of `uses` that the recogniser has:
            presence: (B, C) in [0, 1], how likely the image's regions find each label;
            label_states: (B, C) in {1, 0, -1 = unknown}, labels that are known of the image;
            label_graph: the recogniser's `LabelGraph`;
            label_embeddings: (C, d) float32, without statistics of the labels;
    it returns a dict of
        logits: (B, C);
        aux_logits: optional, {name: (B, C)}: trained, with no effect in evaluation;
        attention: optional, (B, C, H, W): what each label looked at.
    Nothing in it may depend on the other images of the batch.

    Attributes:
        in_features: names of the feature maps that it reads.
        uses: names of CONTEXT that it can use.
        needs: names of CONTEXT that it requires.
        any_labels: whether it scores labels that it was not trained on, given their embeddings: no
            other tensor of it depends on the labels.
    """

    in_features: Tuple[str, ...]
    uses: FrozenSet[str] = frozenset()
    needs: FrozenSet[str] = frozenset()
    any_labels: bool = False

    def image_features(
        self, features: Dict[str, torch.Tensor], masks: Dict[str, torch.Tensor | None]
    ) -> torch.Tensor:
        """One vector per image, (B, D), from which label embeddings can be computed.

        Here the mean of the last feature map.
        """
        name = self.in_features[-1]
        return masked_mean(features[name], masks[name])

    def fix_classifiers(self, label_graph: LabelGraph | None) -> None:
        """Compute what is independent of the image once, for a model that is only evaluated.

        Kept until `train(True)` or until other weights are loaded. Here there is nothing to do.
        """


def build_label_head(cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> LabelHead:
    """The head that MODEL.LABEL_HEAD.NAME asks for.

    Args:
        cfg: the config.
        input_shape: of the backbone's feature maps.
    Raises:
        InputError: MODEL.LABEL_HEAD.NUM_LABELS is not set, or the head is no `LabelHead`, reads a
            feature map that the backbone lacks, or asks for an unknown context.
    """
    if cfg.MODEL.LABEL_HEAD.NUM_LABELS < 1:
        raise InputError(
            "MODEL.LABEL_HEAD.NUM_LABELS is not set; ia_gcn.engine.setup_cfg takes it from the "
            "data set"
        )
    name = cfg.MODEL.LABEL_HEAD.NAME
    head_class = LABEL_HEAD_REGISTRY.get(name)
    parts = ("uses", "needs", "fix_classifiers")
    lacking = [part for part in parts if not hasattr(head_class, part)]
    if lacking:
        raise InputError(
            f"MODEL.LABEL_HEAD.NAME: {name} has no {', '.join(lacking)}; a label head derives from "
            "ia_gcn.modeling.LabelHead and maps feature maps to a dict with logits"
        )
    unknown = sorted((head_class.uses | head_class.needs) - CONTEXT)
    if unknown:
        raise InputError(
            f"MODEL.LABEL_HEAD.NAME: {name} asks for {', '.join(unknown)}; there is "
            f"{', '.join(sorted(CONTEXT))}"
        )
    head = head_class(cfg, input_shape)
    _check_in_features(f"MODEL.LABEL_HEAD.NAME: {name} reads", head.in_features, input_shape)
    return head


def head_in_features(cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> Tuple[str, ...]:
    """The feature maps of MODEL.LABEL_HEAD.IN_FEATURES; where it is empty, the deepest one.

    Raises:
        InputError: the backbone has no such map.
    """
    names = tuple(cfg.MODEL.LABEL_HEAD.IN_FEATURES)
    if not names and cfg.MODEL.GLOBAL_POOLING.IN_FEATURE:
        names = (cfg.MODEL.GLOBAL_POOLING.IN_FEATURE,)
    if not names:
        names = (max(input_shape, key=lambda name: input_shape[name].stride),)
    _check_in_features("MODEL.LABEL_HEAD.IN_FEATURES:", names, input_shape)
    return names


def one_in_feature(cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> str:
    """`head_in_features` for a head that reads one map.

    Raises:
        InputError: there are several, or see `head_in_features`.
    """
    names = head_in_features(cfg, input_shape)
    if len(names) > 1:
        raise InputError(
            f"MODEL.LABEL_HEAD.IN_FEATURES: {cfg.MODEL.LABEL_HEAD.NAME} reads one feature map, not "
            + ", ".join(names)
        )
    return names[0]


def _check_in_features(what: str, names: Sequence[str], input_shape: Dict[str, ShapeSpec]) -> None:
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise InputError(f"{what} {', '.join(missing)}; the backbone has {', '.join(input_shape)}")


class PooledHead(LabelHead):
    """A head that sees x (B, D), its feature map pooled over the cells that show the image."""

    def __init__(self, *, in_feature: str, pooling: nn.Module):
        """
        Args:
            in_feature: name of the feature map.
            pooling: (B, D, H, W) and its mask to (B, D).
        """
        super().__init__()
        self.in_features = (in_feature,)
        self.pooling = pooling

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> Dict[str, Any]:
        """in_feature, feature_dim (D), pooling and num_labels (C)."""
        in_feature = one_in_feature(cfg, input_shape)
        pooling = cfg.MODEL.GLOBAL_POOLING
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "pooling": GlobalPooling(pooling.NAME, pooling.GEM_POWER),
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
        }

    def image_features(self, features, masks) -> torch.Tensor:
        """x, (B, D)."""
        (name,) = self.in_features
        return self.pooling(features[name], masks[name])
