"""Label heads trained on frozen features: what a network makes of an image is computed once.

A training then takes seconds, and a comparison of heads as many seeds as it needs. B, N, C, D and K
are the numbers of images, regions, labels, and channels of an image's and of a region's feature.
"""

from __future__ import annotations

from typing import Dict, Iterable, Iterator, List, NamedTuple, Union

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.samplers import PositionSampler
from ..modeling import InstanceAwareRecognizer, MultiLabelRecognizer
from .schedule import build_lr_scheduler, build_optimizer

FROZEN_PARTS = ("backbone", "proposal_generator")


class FrozenFeatures(NamedTuple):
    """What a network makes of B images, and what is in them."""

    x: torch.Tensor
    """(B, D)."""
    regions: torch.Tensor
    """X, (B, N, K): of the regions, best first by objectness; 0 where there is none."""
    valid: torch.Tensor
    """(B, N) bool, true for a region that is there."""
    targets: torch.Tensor
    """(B, C) in {1, 0, -1 = ignored}."""

    def pick(self, images) -> FrozenFeatures:
        """Those of some images: indices or a slice."""
        return FrozenFeatures(*(values[images] for values in self))

    def save(self, path: str) -> None:
        save_file(self._asdict(), path)

    @classmethod
    def load(cls, path: str) -> FrozenFeatures:
        return cls(**load_file(path))


@torch.no_grad()
def extract_features(
    model: InstanceAwareRecognizer, batches: Iterable[List[Dict]]
) -> FrozenFeatures:
    """The features of all images of a data loader, in its order.

    Args:
        model: with the network; its heads are not asked.
        batches: of a test loader, whose samples have `labels`.
    """
    model.eval()
    parts = []
    for inputs in batches:
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        x = model.global_feature(features, images)
        proposals, _ = model.propose_regions(images, features, inputs)
        regions, valid = model.roi_heads.region_features(features, proposals)
        parts.append(FrozenFeatures(x, regions, valid, model.targets(inputs)))
    return FrozenFeatures(*map(torch.cat, zip(*parts)))


class HeadsOnFeatures(nn.Module):
    """A recogniser that gets features instead of images; its network stays as it is."""

    def __init__(self, model: MultiLabelRecognizer):
        super().__init__()
        self.model = model
        for name in FROZEN_PARTS:
            part = getattr(model, name, None)
            if part is not None:
                part.requires_grad_(False)

    def forward(self, features: FrozenFeatures) -> Union[Dict[str, torch.Tensor], torch.Tensor]:
        """In training the losses, as the recogniser names them; else the logits (B, C)."""
        model, losses = self.model, {}
        if isinstance(model, InstanceAwareRecognizer):
            regions = features.regions[:, : model.roi_heads.num_regions]
            valid = features.valid[:, : model.roi_heads.num_regions]
            draws, losses = model.roi_heads.weigh_regions(regions, valid, features.targets)
            logits = model.fuse(model.mean_branch_logits(features.x, draws))
        else:
            logits = model.label_head(features.x)
        if not self.training:
            return logits
        return {"loss_multi_label": model.loss(logits, features.targets), **losses}

    @torch.no_grad()
    def predict(self, features: FrozenFeatures, batch_size: int = 500) -> torch.Tensor:
        """Logits of any number of images, (B, C), in evaluation mode."""
        self.eval()
        starts = range(0, len(features.x), batch_size)
        return torch.cat([self(features.pick(slice(i, i + batch_size))) for i in starts])


def train_heads(cfg: CfgNode, model: MultiLabelRecognizer, features: FrozenFeatures):
    """Train a recogniser's heads for SOLVER.MAX_ITER iterations.

    The images come in the order that a training on images with the same SEED has; there is no
    augmentation.

    Args:
        cfg: of which SOLVER and SEED, 0 or more, count.
        model: its label graphs filled in.
        features: of the training set.
    Returns:
        the `HeadsOnFeatures`, and detectron2's EventStorage with the losses and regions/*.
    """
    heads = HeadsOnFeatures(model).train()
    optimizer = build_optimizer(cfg, model)
    trainer = SimpleTrainer(heads, _Batches(features, cfg), optimizer)
    trainer.register_hooks([hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))])
    trainer.train(0, cfg.SOLVER.MAX_ITER)
    return heads, trainer.storage


class _Batches:
    """Endless batches of features, in `PositionSampler`'s order."""

    def __init__(self, features: FrozenFeatures, cfg: CfgNode):
        self.features = features
        self.batch_size = cfg.SOLVER.IMS_PER_BATCH
        self.sampler = PositionSampler(len(features.x), cfg.SEED)

    def __iter__(self) -> Iterator[FrozenFeatures]:
        order = iter(self.sampler)
        while True:
            images = [next(order)[1] for _ in range(self.batch_size)]
            yield self.features.pick(images)
