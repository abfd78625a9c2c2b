"""Backbones beside detectron2's own."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet


@BACKBONE_REGISTRY.register()
def build_resnet10_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-10, one basic block per stage: small enough to train from scratch on a CPU.

    Of MODEL.RESNETS it takes STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled in each further stage),
    NORM and OUT_FEATURES, as detectron2's build_resnet_backbone does for 18 layers and more; and
    MODEL.BACKBONE.FREEZE_AT.
    """
    resnets = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    stages = []
    in_channels, out_channels = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    for stride in (1, 2, 2, 2):
        block = BasicBlock(in_channels, out_channels, stride=stride, norm=resnets.NORM)
        stages.append([block])
        in_channels, out_channels = out_channels, 2 * out_channels
    backbone = ResNet(stem, stages, out_features=resnets.OUT_FEATURES)
    return backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
