"""Labels of an image that a model is told beside the image (C-Tran's inference with known labels).

C is the number of labels. A target is 1 (present), 0 (absent) or -1 (ignored).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


def draw_known(labels: torch.Tensor, share: float, random: Any = np.random) -> torch.Tensor:
    """The states of an image's labels in label-mask training (C-Tran).

    The number of labels that are drawn is uniform from 0 to ⌊share · C⌋, and they are any of the C,
    each with the same chance.

    Args:
        labels: targets, (C,).
        share: the largest part of the labels, in [0, 1].
        random: a numpy RandomState; by default numpy's global one.
    Returns:
        (C,) of the labels' dtype: 1 or 0 for a label that is drawn, as its target says; else, and
        for an ignored one, -1 = unknown.
    """
    return _told(labels, random.randint(int(share * len(labels)) + 1), random)


def choose_known(labels: torch.Tensor, share: float, image_id: Any, seed: int) -> torch.Tensor:
    """The states of a test image's labels, of which ⌊share · C⌋ are drawn, see `draw_known`.

    Which ones is a function of C, the image's id and the seed.

    Args:
        image_id: of any type with a text that is always the same.
        seed: 0 or more.
    """
    digest = hashlib.sha256(f"{seed} {image_id}".encode()).digest()
    random = np.random.RandomState(np.frombuffer(digest, np.uint32))
    return _told(labels, int(share * len(labels)), random)


def _told(labels: torch.Tensor, count: int, random: Any) -> torch.Tensor:
    drawn = random.permutation(len(labels))[:count]
    states = torch.full_like(labels, -1)
    states[drawn] = labels[drawn]
    return states
