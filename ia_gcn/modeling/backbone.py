"""Backbones beside detectron2's own: any of timm's, and a ResNet-10."""

from __future__ import annotations

import logging
from typing import Dict

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from timm.utils import freeze
from torch import nn

from ..errors import InputError
from ..io.inputs import check_regular
from ..io.pth import plain_state_dict, read_pth

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """The stages of a timm network by their stride: res2 of 4 pixels, res3 of 8, ..., res5 of 32.

    So a config can name res4 and res5 of any network; res1, with a stride of 2 pixels, exists if
    the network has it. Of several stages with the same stride, the last one is used.
    """

    def __init__(self, net: nn.Module):
        """
        Args:
            net: made by timm with `features_only=True`; its strides are powers of 2.
        """
        super().__init__()
        self.net = net
        strides = net.feature_info.reduction()
        channels = net.feature_info.channels()
        self._channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self._places = {f"res{stride.bit_length() - 1}": i for i, stride in enumerate(strides)}
        self._shapes = {
            name: ShapeSpec(channels=channels[i], stride=strides[i])
            for name, i in self._places.items()
        }

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Images (B, 3, H, W) to feature maps (B, ., H / stride, W / stride) by name."""
        maps = self.net(images)
        if self._channels_last:
            maps = [features.permute(0, 3, 1, 2) for features in maps]
        return {name: maps[i] for name, i in self._places.items()}

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        return max(shape.stride for shape in self._shapes.values())


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """MODEL.TIMM.NAME, with random weights, timm's own, or those of MODEL.TIMM.WEIGHTS_FILE.

    MODEL.BACKBONE.FREEZE_AT 5 keeps all of it as it was loaded, 0 nothing.

    Raises:
        InputError: timm has no such network, it has no feature maps, or not of INPUT.IMAGE_SIZE, or
            their strides are not powers of 2; its weights can't be downloaded or don't fit;
            FREEZE_AT is another number.
    """
    name, weights_file = cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS_FILE
    options = {"in_chans": input_shape.channels}
    if pretrained_cfg(name).fixed_input_size:
        options["img_size"] = tuple(cfg.INPUT.IMAGE_SIZE)
    # A checkpoint has all weights: evaluating it needs no download and no second file.
    pretrained = cfg.MODEL.TIMM.PRETRAINED and not weights_file and not cfg.MODEL.WEIGHTS
    try:
        net = timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:  # timm and its downloads raise nearly anything
        reason = " ".join(str(error).split())[:300]
        if pretrained:
            reason = (
                f"timm's weights can't be downloaded ({reason}); without a network, set "
                "MODEL.TIMM.PRETRAINED to False, or MODEL.TIMM.WEIGHTS_FILE to a file with them"
            )
        raise InputError(f"MODEL.TIMM.NAME {name}: {reason}") from error
    if weights_file and not cfg.MODEL.WEIGHTS:
        load_weights(net, name, weights_file, options)
    strides = net.feature_info.reduction()
    if not all(isinstance(stride, int) and stride & (stride - 1) == 0 for stride in strides):
        raise InputError(f"MODEL.TIMM.NAME {name}: strides {strides} are not powers of 2")
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at not in (0, 5):
        raise InputError(f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: a timm network takes 0 or 5")
    if freeze_at:
        freeze(net)
    own = "timm's weights" if pretrained else "random weights"
    logger.debug(f"{name}: {cfg.MODEL.WEIGHTS or weights_file or own}")
    return TimmBackbone(net)


def pretrained_cfg(name: str) -> PretrainedCfg:
    """timm's facts about a network's weights: `mean` and `std` of pixels from 0 to 1, and so on.

    Raises:
        InputError: timm has no such network.
    """
    if not timm.is_model(name):
        raise InputError(f"MODEL.TIMM.NAME: timm has no network {name!r}")
    return timm.get_pretrained_cfg(name)


def load_weights(net: nn.Module, name: str, path: str, options: Dict) -> None:
    """Load a file with the names of a whole timm network into its stages alone.

    Args:
        net: made with `features_only=True`.
        name: of the network.
        path: see `read_weights`.
        options: further ones that `net` was made with.
    Raises:
        InputError: the file can't be read, or is not of this network; only a classifier may be
            missing.
    """
    state = read_weights(path)
    classifier = f"{timm.get_pretrained_cfg(name).classifier}.weight"
    num_classes = len(state[classifier]) if classifier in state else 0
    # timm knows older names of its own, and is strict if the classifier's size is what it expects.
    overlay = {"state_dict": state, "num_classes": num_classes}
    try:
        whole = timm.create_model(
            name, True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **options
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"MODEL.TIMM.WEIGHTS_FILE {path} does not fit MODEL.TIMM.NAME {name}: {reason}"
        ) from error
    # Stages alone are called layer1_0 or model.layer1.0 for layer1.0.
    found = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    names = {key: key.replace("model.", "", 1).replace(".", "_") for key in net.state_dict()}
    net.load_state_dict({key: found[place] for key, place in names.items()})


def read_weights(path: str) -> Dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth (itself, or its `state_dict` or `model`).

    Raises:
        InputError: there is no such file, or something else than tensors is in it.
    """
    shown = f"MODEL.TIMM.WEIGHTS_FILE: {path}"
    try:
        local = PathManager.get_local_path(path)
        if path.endswith(".safetensors"):
            check_regular(local)
            return plain_state_dict(load_file(local), shown)
    except Exception as error:  # of a damaged file safetensors raises nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{shown}: {reason}") from None
    content = read_pth(local, shown)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not content:
        raise InputError(f"{shown}: it is empty")
    return plain_state_dict(content, shown)


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
