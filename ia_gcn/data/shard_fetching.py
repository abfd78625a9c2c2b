"""Copying shards from elsewhere before their images are asked for."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from queue import Queue
from typing import Iterator, Sequence

from torch.utils.data import Sampler

from ..io.shards import Shard, copy_shard, is_remote

logger = logging.getLogger(__name__)


class FetchAhead(Sampler):
    """The items of another sampler, while a thread copies the shards that come next.

    It is ahead by as many images as a shard has on average, so by about a shard.
    """

    def __init__(self, sampler: Sampler, numbers: Sequence[int], shards: Sequence[Shard]):
        """
        Args:
            sampler: of indices, or of tuples whose last element is one.
            numbers, shards: see `number_shards`; of each image's shard, by its index.
        """
        self.sampler = sampler
        self.numbers = numbers
        self.shards = shards
        self.lead = len(numbers) // len(shards)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator:
        wanted: Queue[Shard | None] = Queue()
        threading.Thread(target=_copy_all, args=(wanted,), daemon=True).start()
        waiting, in_lead = deque(), Counter()
        try:
            for item in self.sampler:
                number = self._shard(item)
                if not in_lead[number] and number >= 0:
                    wanted.put(self.shards[number])
                in_lead[number] += 1
                waiting.append(item)
                if len(waiting) > self.lead:
                    in_lead[self._shard(waiting[0])] -= 1
                    yield waiting.popleft()
            yield from waiting
        finally:
            wanted.put(None)

    def _shard(self, item) -> int:
        return self.numbers[item[-1] if isinstance(item, tuple) else item]


def _copy_all(wanted: Queue[Shard | None]) -> None:
    while (shard := wanted.get()) is not None:
        try:
            if is_remote(shard.path):
                copy_shard(shard)
        # Who reads an image of it reports that.
        except OSError as error:
            logger.debug(f"{shard.path}: {error}")
