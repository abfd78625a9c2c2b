"""The plain recogniser: which of C labels are in an image."""

from __future__ import annotations

from typing import Dict, List, Sequence, Union

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import nn

from ..errors import InputError
from .label_heads import build_label_head
from .losses import build_multi_label_loss
from .pooling import GlobalPooling, valid_cells


@META_ARCH_REGISTRY.register()
class MultiLabelRecognizer(nn.Module):
    """Backbone → feature x of the whole image → label head → one logit per label."""

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_feature: str,
        pooling: nn.Module,
        label_head: nn.Module,
        loss: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: a detectron2 Backbone.
            in_feature: which of its feature maps is pooled to x.
            pooling: feature map (B, D, H, W) and valid cells to x (B, D).
            label_head: x to logits (B, C).
            loss: logits (B, C) and targets (B, C) in {1, 0, -1} to a scalar.
            pixel_mean, pixel_std: of each channel, in INPUT.FORMAT's order and the image's units.
        """
        super().__init__()
        self.backbone = backbone
        self.in_feature = in_feature
        self.stride = backbone.output_shape()[in_feature].stride
        self.pooling = pooling
        self.label_head = label_head
        self.loss = loss
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        backbone = build_backbone(cfg)
        in_feature = cfg.MODEL.GLOBAL_POOLING.IN_FEATURE
        if in_feature not in backbone.output_shape():
            raise InputError(
                f"MODEL.GLOBAL_POOLING.IN_FEATURE {in_feature}: the backbone has "
                + ", ".join(backbone.output_shape())
            )
        feature_dim = backbone.output_shape()[in_feature].channels
        return {
            "backbone": backbone,
            "in_feature": in_feature,
            "pooling": GlobalPooling(
                cfg.MODEL.GLOBAL_POOLING.NAME, cfg.MODEL.GLOBAL_POOLING.GEM_POWER
            ),
            "label_head": build_label_head(cfg, feature_dim),
            "loss": build_multi_label_loss(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: List[Dict]
    ) -> Union[Dict[str, torch.Tensor], List[Dict[str, torch.Tensor]]]:
        """
        Args:
            batched_inputs: one dict per image, as `MultiLabelDatasetMapper` makes them:
                image: (3, H, W), uint8 or float, sizes may differ;
                labels: (C,) float in {1, 0, -1 = ignored}; in training only.
        Returns:
            in training {"loss_multi_label": scalar}, else one dict per image of
                scores: (C,) probabilities;
                logits: (C,).
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        logits = self.label_head(self.global_feature(features, images))
        if self.training:
            return {"loss_multi_label": self.loss(logits, self.targets(batched_inputs))}
        scores = logits.sigmoid()
        return [{"scores": row, "logits": logit} for row, logit in zip(scores, logits)]

    def global_feature(self, features: Dict[str, torch.Tensor], images: ImageList) -> torch.Tensor:
        """x (B, D), pooled from the backbone's feature maps where they show an image."""
        features = features[self.in_feature]
        return self.pooling(features, valid_cells(features, images.image_sizes, self.stride))

    def targets(self, batched_inputs: List[Dict]) -> torch.Tensor:
        """(B, C) in {1, 0, -1 = ignored}."""
        return torch.stack([x["labels"] for x in batched_inputs]).to(self.device)

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """Normalise each image and pad them, with the mean's colour, to one batch."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)
