"""Faster evaluation of a trained model, with the same outputs."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Fold batch norms into their convolutions and lay tensors out with their channels last.

    Outputs stay the same within rounding. The model is changed in place; its state dict is no
    longer that of its config, and it can't be trained any more.

    Args:
        model: detectron2 convolutions with a norm of their own, as its ResNets have, are folded;
            others stay as they are.
    Returns:
        the model, in evaluation mode.
    """
    model.eval()
    model.fix_classifiers()
    for module in model.modules():
        if not isinstance(module, Conv2d):
            continue
        norm = module.norm
        # An instance or layer norm depends on the image.
        if isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)):
            module.weight, module.bias = fuse_conv_bn_weights(
                module.weight,
                module.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            module.norm = None
    return model.requires_grad_(False).to(memory_format=torch.channels_last)
