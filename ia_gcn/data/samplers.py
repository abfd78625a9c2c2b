"""The order in which training sees its images."""

from __future__ import annotations

import itertools
import logging
from typing import Callable, Iterator, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)


def shuffle_all(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(n,) images in an order in which each may be anywhere."""
    return images[torch.randperm(len(images), generator=generator)]


class ShuffleShards:
    """Puts images into an order in which few shards are read at a time.

    The shards are shuffled and dealt to streams, a run of them to each, so that all streams have as
    many images (a shard may be divided between two); the streams' images take turns. In a stream,
    an image's place is that of its shard, 0, 1, 2, ..., and a random number in [0, window) more:
    at no place are there images of more than `window` shards. That is a shuffle buffer of so many
    shards, whose order is known without reading any.

    So of p processes, where p divides the number of streams, each reads its own shards, but for
    those that are divided.
    """

    def __init__(self, shards: Sequence[int], window: int, streams: int):
        """
        Args:
            shards: the number of each image's shard, from 0 on; -1: it is in none, and may be
                anywhere.
            window: how many shards of a stream are mixed.
            streams: how many there are.
        """
        self.shards = torch.as_tensor(shards)
        self.window = window
        self.streams = streams

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        Args:
            images: (n,) indices, in which one may occur several times.
            generator: of which the order is a function.
        Returns:
            (n,), the same in another order.
        """
        shards = self.shards[images]
        number = int(self.shards.max()) + 1
        places = torch.randperm(number, generator=generator).double()[shards]
        anywhere = number * torch.rand(len(images), generator=generator, dtype=torch.float64)
        places = torch.where(shards < 0, anywhere, places)
        order = torch.empty_like(images)
        for stream, part in enumerate(places.argsort(stable=True).tensor_split(self.streams)):
            shift = self.window * torch.rand(len(part), generator=generator, dtype=torch.float64)
            mixed = part[(places[part] + shift).argsort(stable=True)]
            order[stream :: self.streams] = images[mixed]
        return order


class PositionSampler(Sampler):
    """An endless shuffled stream of images in which every place can be computed from the seed.

    The stream is one permutation of the data set after the other, the e-th drawn from
    (seed, e). With repeat factors, an image is in the e-th one as often as its factor r says:
    ⌊r⌋ times, and once more with probability r - ⌊r⌋; so their lengths differ. Process r of w takes
    the places r, r + w, r + 2w, ... from `start` on, so the images of an iteration are the same for
    any number of processes, and a run that is resumed goes on at the place where it was cut.

    Attributes:
        start: the stream's first place that is used; iterations done × images per iteration.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        repeat_factors: torch.Tensor | None = None,
        shuffle: Callable[[torch.Tensor, torch.Generator], torch.Tensor] = shuffle_all,
    ):
        """
        Args:
            size: number of images.
            seed: the same in all processes.
            repeat_factors: (size,), at least 1, see `repeat_factors_from_config`; None: each image
                is in each permutation once.
            shuffle: puts the images of a permutation into its order, see `ShuffleShards`.
        """
        self.size = size
        self.seed = seed
        self.repeat_factors = repeat_factors
        self.shuffle = shuffle
        self.start = 0

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        """(place in the stream, index of the image), without end."""
        place = self.start + comm.get_rank()
        first = 0
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
            images = self._images(generator)
            end = first + len(images)
            if place < end:
                order = self.shuffle(images, generator).tolist()
            while place < end:
                yield place, order[place - first]
                place += comm.get_world_size()
            first = end

    def _images(self, generator: torch.Generator) -> torch.Tensor:
        """The images of a permutation, each as often as it is in it."""
        images = torch.arange(self.size)
        if self.repeat_factors is None:
            return images
        whole = self.repeat_factors.floor()
        more = torch.rand(self.size, generator=generator) < self.repeat_factors - whole
        return images.repeat_interleave(whole.long() + more)


def repeat_factors_from_config(
    cfg: CfgNode, labels: Sequence[Sequence[int]]
) -> torch.Tensor | None:
    """How often images are repeated for the sake of rare labels; None: each is there once.

    With DATALOADER.SAMPLER_TRAIN "RepeatFactorTrainingSampler" these are detectron2's factors, of
    LVIS (Gupta et al., CVPR 2019): for a label in a share f of the images max(1, √(t / f)), t =
    DATALOADER.REPEAT_THRESHOLD; for an image the highest of its labels.

    Args:
        labels: indices of each image's labels.
    Returns:
        (n,) float32.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "RepeatFactorTrainingSampler":
        return None
    # As detectron2 takes them; a label's dict is shared by all images.
    box_of = {label: {"category_id": label} for image in labels for label in image}
    dicts = [{"annotations": [box_of[label] for label in image]} for image in labels]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, cfg.DATALOADER.REPEAT_THRESHOLD
    )
    repeated = int((factors > 1).sum())
    logger.info(
        f"Images with rare labels are repeated: {repeated:,} of {len(factors):,} images, up to "
        f"{factors.max():.1f} times on average"
    )
    return factors


def mix_seeds(*numbers: int) -> int:
    """One seed below 2³² from several non-negative numbers, unlike those of near-by numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
