"""The package inplace_abn, which is CUDA code, in torch: batch norm and activation in one module.

Its scale is |weight| + eps, and it has no number of batches.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn


class InPlaceABN(nn.Module):
    def __init__(
        self,
        num_features: int,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        group=None,
    ):
        """
        Args:
            activation: leaky_relu or identity.
            activation_param: the slope of leaky_relu.
            group: of processes; no effect in evaluation.
        """
        super().__init__()
        self.num_features = num_features
        self.activation = activation
        self.activation_param = activation_param
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, features):
        features = F.batch_norm(
            features,
            self.running_mean,
            self.running_var,
            self.weight.abs() + self.eps,
            self.bias,
            training=False,
            eps=self.eps,
        )
        if self.activation == "identity":
            return features
        return F.leaky_relu(features, self.activation_param)


def module() -> ModuleType:
    """What `import inplace_abn` gives."""
    made = ModuleType("inplace_abn")
    made.ABN, made.InPlaceABN, made.InPlaceABNSync = nn.Module, InPlaceABN, InPlaceABN
    return made
