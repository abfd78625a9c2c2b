"""Faster evaluation of a trained model, with the same outputs."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from timm.layers import Conv2dSame, FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

logger = logging.getLogger(__name__)

# An instance or layer norm depends on the image.
BATCH_NORMS = (_BatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d, FrozenBatchNormAct2d)
# Convolutions that use their weight as it is; not so, for example, timm's StdConv2d.
PLAIN_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
# How much feature maps may differ by rounding, as a share of their largest value.
TOLERANCE = 1e-4


def optimize_for_inference(model: nn.Module, image_size: Sequence[int] = (224, 224)) -> nn.Module:
    """Fold batch norms into their convolutions and lay tensors out with their channels last.

    Outputs stay the same within rounding. The model is changed in place; its state dict is no
    longer that of its config, and it can't be trained any more.

    Args:
        model: a recogniser. Norms of detectron2's convolutions are folded, and those of timm's or
            another backbone that directly follow a convolution; others stay as they are.
        image_size: height and width in pixels, INPUT.IMAGE_SIZE. The backbone is run on such an
            image to see which norms these are, and whether its outputs stay the same.
    Returns:
        the model, in evaluation mode.
    """
    model.eval().requires_grad_(False)
    model.fix_classifiers()
    for module in model.modules():
        if isinstance(module, Conv2d) and _is_fixed(module.norm):
            _fold(module, module.norm)
            module.norm = None
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, len(model.pixel_mean), *image_size, generator=generator)
    fold_following_norms(model.backbone, image.to(model.pixel_mean))
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def fold_following_norms(backbone: nn.Module, image: torch.Tensor) -> None:
    """Fold batch norms that directly follow a convolution, if feature maps then stay the same.

    A BatchNormAct2d of timm leaves its activation. If maps would change, nothing is folded.

    Args:
        backbone: in evaluation mode; images to feature maps by name.
        image: (1, channels, H, W) float, to run it on.
    """
    expected, pairs = _convolutions_with_norms(backbone, image)
    before = [(conv, conv.weight, conv.bias) for conv, _ in pairs]
    rests = {}
    for conv, norm in pairs:
        _fold(conv, norm)
        rests[norm] = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    _replace(backbone, rests)
    try:
        same = all(map(_is_close, backbone(image).values(), expected.values()))
    except Exception:  # the network reads an attribute of its norm
        same = False
    if not same:
        logger.info("No batch norm of the backbone is folded: its feature maps would change")
        for conv, weight, bias in before:
            conv.weight, conv.bias = weight, bias
        _replace(backbone, {rest: norm for norm, rest in rests.items()})


def _is_fixed(norm: nn.Module | None) -> bool:
    """Whether it is a batch norm with statistics of its own."""
    return isinstance(norm, BATCH_NORMS) and norm.running_mean is not None


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)


def _convolutions_with_norms(
    backbone: nn.Module, image: torch.Tensor
) -> Tuple[Dict[str, torch.Tensor], List[Tuple[nn.Module, nn.Module]]]:
    """The feature maps, and the convolutions whose output is a batch norm's input, with that norm.

    Both are called once, and the output is none of the feature maps.
    """
    calls, outputs, pairs = Counter(), {}, []

    def after_convolution(conv, args, output):
        calls[conv] += 1
        # With the tensor itself, so that its id is not reused.
        outputs[id(output)] = conv, output

    def before_norm(norm, args):
        calls[norm] += 1
        if id(args[0]) in outputs:
            pairs.append((*outputs[id(args[0])], norm))

    with ExitStack() as hooks:
        for module in backbone.modules():
            if type(module) in PLAIN_CONVOLUTIONS:
                hooks.callback(module.register_forward_hook(after_convolution).remove)
            elif _is_fixed(module):
                hooks.callback(module.register_forward_pre_hook(before_norm).remove)
        maps = backbone(image)
    returned = set(map(id, maps.values()))
    return maps, [
        (conv, norm)
        for conv, output, norm in pairs
        if calls[conv] == calls[norm] == 1 and id(output) not in returned
    ]


def _replace(network: nn.Module, modules: dict) -> None:
    """Put the values of `modules` in place of its keys."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if child in modules:
                setattr(parent, name, modules[child])


def _is_close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (values - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max())
