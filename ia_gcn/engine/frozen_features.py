"""Label heads trained on frozen features: the network runs on each image once.

A training then takes seconds, and a comparison of heads can have as many seeds as it needs. B, N,
C, D and K are the numbers of images, regions, labels, and channels of a feature map and of a
region's feature.
"""

from __future__ import annotations

import itertools
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Union

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from safetensors.torch import load_file, save
from torch import nn

from ..data.known_labels import draw_known
from ..data.samplers import PositionSampler, mix_seeds, repeat_factors_from_config
from ..errors import InputError
from ..io.files import write_atomically
from ..modeling import ImageFeatures, MultiLabelRecognizer
from ..modeling.recognizer import ignore_known
from .hooks import FollowLoss
from .schedule import build_lr_scheduler, build_optimizer, iterations_per_epoch

# In a file, in front of a feature map's name and of its mask's.
MAP, MASK = "map.", "mask."


class FrozenFeatures(NamedTuple):
    """The features of B images, and their labels."""

    features: ImageFeatures
    """On the CPU, without proposals."""
    targets: torch.Tensor
    """(B, C) in {1, 0, -1 = unknown}."""
    images: torch.Tensor | None = None
    """(B,) int64, their places among all features that are trained on; None outside training."""

    def pick(self, images) -> FrozenFeatures:
        """Those of some images: indices or a slice."""
        found = self.features
        picked = found._replace(
            maps={name: value[images] for name, value in found.maps.items()},
            masks={name: _pick(value, images) for name, value in found.masks.items()},
            label_states=_pick(found.label_states, images),
            regions=_pick(found.regions, images),
            valid=_pick(found.valid, images),
        )
        return FrozenFeatures(picked, self.targets[images])

    def save(self, path: str) -> None:
        """Write them as safetensors."""
        found = self.features
        tensors = {
            "targets": self.targets,
            "label_states": found.label_states,
            "regions": found.regions,
            "valid": found.valid,
            **{f"{MAP}{name}": value for name, value in found.maps.items()},
            **{f"{MASK}{name}": value for name, value in found.masks.items()},
        }
        tensors = {name: t.contiguous() for name, t in tensors.items() if t is not None}
        with write_atomically(path) as file:
            file.write(save(tensors))

    @classmethod
    def load(cls, path: str) -> FrozenFeatures:
        tensors = load_file(path)
        maps = {name[len(MAP) :]: t for name, t in tensors.items() if name.startswith(MAP)}
        features = ImageFeatures(
            maps,
            {name: tensors.get(f"{MASK}{name}") for name in maps},
            tensors.get("label_states"),
            tensors.get("regions"),
            tensors.get("valid"),
        )
        return cls(features, tensors["targets"])


def _pick(values: torch.Tensor | None, images) -> torch.Tensor | None:
    return None if values is None else values[images]


@torch.no_grad()
def extract_features(
    model: MultiLabelRecognizer,
    batches: Iterable[List[Dict]],
    in_features: Sequence[str] | None = None,
) -> FrozenFeatures:
    """The features of all images of a data loader, in its order.

    Args:
        model: with the network; its heads are not run, but say which feature maps they read.
        batches: of a test loader, whose samples have `labels`. All images have one size.
        in_features: names of the feature maps; None: those that the model's label head reads.
    """
    model.eval()
    parts = []
    for inputs in batches:
        features, _ = model.extract_features(inputs, in_features)
        parts.append((features._replace(proposals=None), model.targets(inputs)))
    features, targets = zip(*parts)
    maps, masks, *rest = zip(*features)
    joined = ImageFeatures(
        {name: torch.cat([part[name] for part in maps]).cpu() for name in maps[0]},
        {name: _join([part[name] for part in masks]) for name in masks[0]},
        *map(_join, rest),
    )
    return FrozenFeatures(joined, torch.cat(targets).cpu())


def _join(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    return None if values[0] is None else torch.cat(values).cpu()


class HeadsOnFeatures(nn.Module):
    """A recogniser that gets features instead of images; its network is not trained."""

    def __init__(self, model: MultiLabelRecognizer):
        super().__init__()
        self.model = model
        for name in model.network:
            part = getattr(model, name)
            if part is not None:
                part.requires_grad_(False)

    def forward(self, batch: FrozenFeatures) -> Union[Dict[str, torch.Tensor], torch.Tensor]:
        """In training the losses, as the recogniser names them; else the logits (B, C).

        Raises:
            InputError: the label head reads a feature map that is not there.
        """
        missing = [name for name in self.model.in_features if name not in batch.features.maps]
        if missing:
            raise InputError(
                f"MODEL.LABEL_HEAD.IN_FEATURES: the label head reads {', '.join(missing)}, and the "
                f"frozen features are of {', '.join(batch.features.maps)}"
            )
        if not self.training:
            return self.model.apply_heads(batch.features)[0]["logits"]
        targets = ignore_known(batch.targets, batch.features.label_states)
        outputs, losses = self.model.apply_heads(batch.features, targets)
        return {**self.model.criterion(outputs, targets, batch.images), **losses}

    @torch.no_grad()
    def predict(self, features: FrozenFeatures, batch_size: int = 500) -> torch.Tensor:
        """Logits of any number of images, (B, C), in evaluation mode."""
        self.eval()
        starts = range(0, len(features.targets), batch_size)
        return torch.cat([self(features.pick(slice(i, i + batch_size))) for i in starts])


def train_heads(cfg: CfgNode, model: MultiLabelRecognizer, features: FrozenFeatures):
    """Train a recogniser's heads for SOLVER.MAX_ITER iterations.

    The images come in the order that a training on images with the same SEED and
    DATALOADER.SAMPLER_TRAIN has; there is no augmentation. With INPUT.KNOWN_LABELS, labels are
    known as they are in such a training.

    Args:
        cfg: of which SOLVER, DATALOADER, INPUT.KNOWN_LABELS and SEED, 0 or more, count.
        model: its label graph and its loss filled in.
        features: of the training set.
    Returns:
        the `HeadsOnFeatures`, and detectron2's EventStorage with the losses and regions/*.
    """
    heads = HeadsOnFeatures(model).train()
    optimizer = build_optimizer(cfg, model)
    trainer = SimpleTrainer(heads, _Batches(features, cfg), optimizer)
    scheduler = hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))
    per_epoch = iterations_per_epoch(cfg, len(features.targets))
    follow = FollowLoss(model.criterion.loss, per_epoch)
    trainer.register_hooks([scheduler, follow])
    trainer.train(0, cfg.SOLVER.MAX_ITER)
    return heads, trainer.storage


class _Batches:
    """Endless batches of features, in `PositionSampler`'s order."""

    def __init__(self, features: FrozenFeatures, cfg: CfgNode):
        self.features = features
        self.batch_size = cfg.SOLVER.IMS_PER_BATCH
        self.seed, self.known_labels = cfg.SEED, cfg.INPUT.KNOWN_LABELS
        labels = [image.nonzero().flatten().tolist() for image in features.targets == 1]
        repeat_factors = repeat_factors_from_config(cfg, labels)
        self.sampler = PositionSampler(len(labels), cfg.SEED, repeat_factors)

    def __iter__(self) -> Iterator[FrozenFeatures]:
        order = iter(self.sampler)
        while True:
            places, images = zip(*itertools.islice(order, self.batch_size))
            images = torch.tensor(images)
            batch = self.features.pick(images)._replace(images=images)
            if self.known_labels:
                states = torch.stack(list(map(self._draw_known, batch.targets, places)))
                batch = batch._replace(features=batch.features._replace(label_states=states))
            yield batch

    def _draw_known(self, targets: torch.Tensor, place: int) -> torch.Tensor:
        """The states of an image's labels, a function of the seed and its place in the stream."""
        random = np.random.RandomState(mix_seeds(self.seed, place))
        return draw_known(targets, self.known_labels, random)
