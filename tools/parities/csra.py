"""CSRA's head as mmpretrain has it, on torchvision's ResNet, whose names mmpretrain's has."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Iterator

import torchvision
from torch import nn

from ia_gcn.data.datasets import VOC_LABELS

from . import Case, from_0_to_1, import_authors

REPOSITORY = "https://github.com/open-mmlab/mmpretrain"
REPLACED = "mmengine's registry and base classes; the ResNet is torchvision's"


def cases(folder: Path) -> Iterator[Case]:
    """On VOC's labels, with one head and with six."""
    csra = import_head(folder)
    for heads, weight in ((1, 0.1), (6, 0.4)):
        head = csra.CSRAClsHead(num_classes=20, in_channels=2048, num_heads=heads, lam=weight)
        temperatures = head.temp_list
        yield Case(
            name=f"ResNet-101, {heads} {'heads' if heads > 1 else 'head'}",
            network=Classifier(head),
            labels=VOC_LABELS,
            prepare=from_0_to_1,
            checkpoint=lambda state: {"meta": {"epoch": 20}, "state_dict": state},
            arguments={"opts": ["MODEL.CSRA.ATTENTION_WEIGHT", weight]},
        )
        assert len(temperatures) == heads


class Classifier(nn.Module):
    """`backbone` and `head`, as mmpretrain's image classifier calls them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.backbone = torchvision.models.resnet101()
        self.backbone.fc = self.backbone.avgpool = nn.Identity()
        self.head = head

    def forward(self, images):
        features = self.backbone(images).unflatten(1, (2048, images.shape[2] // 32, -1))
        return self.head((features,))


def import_head(folder: Path) -> ModuleType:
    """The module of the head, without the rest of its package, which needs mmcv."""

    class Registry:
        def register_module(self):
            return lambda cls: cls

    class Base(nn.Module):
        def __init__(self, init_cfg=None):
            super().__init__()

    names = ["mmengine", "mmengine.model", "mmpretrain", "mmpretrain.registry", "heads"]
    modules = {name: ModuleType(name) for name in [*names, "heads.multi_label_cls_head"]}
    modules["mmengine.model"].BaseModule = Base
    modules["mmengine.model"].ModuleList = nn.ModuleList
    modules["mmpretrain.registry"].MODELS = Registry()
    modules["heads.multi_label_cls_head"].MultiLabelClsHead = Base
    heads = folder / "mmpretrain" / "models" / "heads"
    modules["heads"].__path__ = [str(heads)]
    return import_authors(heads.parent, "heads.multi_label_csra_head", modules)
