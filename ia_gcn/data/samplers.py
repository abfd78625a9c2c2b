"""The order in which training sees its images."""

from __future__ import annotations

from typing import Iterator, Tuple

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import Sampler


class PositionSampler(Sampler):
    """An endless shuffled stream of images in which every place can be computed from the seed.

    The stream is one permutation of the data set after the other, the e-th drawn from
    (seed, e). Process r of w takes the places r, r + w, r + 2w, ... from `start` on, so the images
    of an iteration are the same for any number of processes, and a run that is resumed goes on at
    the place where it was cut.

    Attributes:
        start: the stream's first place that is used; iterations done × images per iteration.
    """

    def __init__(self, size: int, seed: int):
        """
        Args:
            size: number of images.
            seed: the same in all processes.
        """
        self.size = size
        self.seed = seed
        self.start = 0

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        """(place in the stream, index of the image), without end."""
        place = self.start + comm.get_rank()
        epoch, permutation = -1, None
        while True:
            if place // self.size != epoch:
                epoch = place // self.size
                permutation = self._permutation(epoch)
            yield place, permutation[place % self.size]
            place += comm.get_world_size()

    def _permutation(self, epoch: int):
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        return torch.randperm(self.size, generator=generator).tolist()


def mix_seeds(*numbers: int) -> int:
    """One seed below 2³² from several non-negative numbers, unlike those of near-by numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
