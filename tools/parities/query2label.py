"""Query2Label on ResNet-101 and TResNet-L, as its authors build it."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Iterator
from unittest import mock

import torchvision
from torch import nn

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, from_0_to_1, imagenet, import_authors
from ._inplace_abn import module as inplace_abn

REPOSITORY = "https://github.com/SlongLiu/query2labels"
REPLACED = (
    "inplace_abn, by torch's batch norm; TResNet's compiled blur, by its own uncompiled one; a "
    "module that torchvision no longer has, those of Swin and CvT, and utils.misc, none of them "
    "used; the download of torchvision's weights"
)

# Backbone, image size, channels, and those between the linear layers.
PUBLISHED = [
    ("resnet101", 448, 2048, 8192),
    ("resnet101", 576, 2048, 8192),
    ("tresnetl", 448, 2432, 2432),
    ("tresnetl_v2", 448, 2048, 2048),
]


def cases(folder: Path) -> Iterator[Case]:
    """The published models on ResNet-101 and both versions of TResNet-L."""
    models = import_models(folder)
    for backbone, size, dim, ffn_dim in PUBLISHED:
        args = Namespace(
            num_class=80,
            img_size=size,
            backbone=backbone,
            pretrained=False,
            position_embedding="sine",
            hidden_dim=dim,
            dim_feedforward=ffn_dim,
            nheads=4,
            enc_layers=1,
            dec_layers=2,
            dropout=0.1,
            pre_norm=False,
            keep_other_self_attn_dec=False,
            keep_first_self_attn_dec=False,
            keep_input_proj=False,
        )
        is_resnet = backbone.startswith("resnet")
        network = build_resnet(models, args) if is_resnet else models.build_q2l(args)
        yield Case(
            name=f"{backbone}, {size}",
            network=network,
            labels=COCO_LABELS,
            prepare=imagenet if is_resnet else from_0_to_1,
            checkpoint=lambda state: {
                "epoch": 7,
                "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            },
            size=size,
        )


def build_resnet(models: ModuleType, args: Namespace) -> nn.Module:
    """A network on torchvision's ResNet, whose weights are not downloaded."""
    build = getattr(torchvision.models, args.backbone)

    def without_weights(pretrained: bool = True, **options):
        return build(**options)

    with mock.patch.object(torchvision.models, args.backbone, without_weights):
        return models.build_q2l(args)


def import_models(folder: Path) -> ModuleType:
    """The module with `build_q2l`."""
    replaced = {"inplace_abn": inplace_abn()}
    for name, functions in {
        "models.cls_cvt": ["build_CvT"],
        "models.swin_transformer": ["build_swin_transformer"],
        "utils.misc": ["clean_state_dict"],
        "torchvision.models.utils": ["load_state_dict_from_url"],
    }.items():
        replaced[name] = ModuleType(name)
        for function in functions:
            setattr(replaced[name], function, None)
    models = import_authors(folder / "lib", "models.query2label", replaced)
    for tresnet in ("tresnet", "tresnet2"):
        blur = sys.modules[f"models.{tresnet}.layers.anti_aliasing"]
        # The one needs CUDA; the other is beside it, for use without the compiler.
        blur.DownsampleJIT = blur.Downsample
    return models
