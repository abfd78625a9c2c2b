"""Parts of a multi-label data set, stratified by label: a share held out, or folds."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from typing import Collection, Dict, Hashable, List, Mapping, Set, Tuple

TRAIN, HELD_OUT = 0, 1
# Images without a label are stratified as if they had this one; a label's name makes a (0, name).
UNLABELLED = (1, "")


def stratified_split(labels: Mapping[Hashable, Collection[str]], share: float, seed: int) -> Set:
    """Choose the images to hold out, so that about `share` of each label's images are among them.

    Iterative stratification in a simple greedy form (Sechidis, Tsoumakas, Vlahavas: On the
    Stratification of Multi-Label Data, 2011): the label with the fewest images left is dealt out
    first, each image to the side that lacks more of that label. Then a label that one side lacks
    altogether gets an image there, unless another label would lose its last one by that.

    The result is a function of the arguments alone, whatever the order of images and labels.

    Args:
        labels: the label names of each image, by the image's id; any number of them.
        share: of the images, in (0, 1).
        seed: another one gives another choice.
    Returns:
        the ids of the images that are held out. A label with a single image stays in training. One
        with more is on both sides, but for cases in which that would take such an image out of
        training, or the exchange of several images.
    """
    order = sorted(labels, key=lambda image: _rank(image, seed))
    groups = {image: {(0, name) for name in labels[image]} or {UNLABELLED} for image in order}
    members: Dict[Tuple, List] = {}
    for image in order:
        for group in groups[image]:
            members.setdefault(group, []).append(image)
    sides = _deal_out(groups, members, share)
    _mend(sides, groups, members)
    return {image for image, side in sides.items() if side == HELD_OUT}


def stratified_folds(
    labels: Mapping[Hashable, Collection[str]], number: int, seed: int
) -> Dict[Hashable, int]:
    """Divide images into folds of about equal size, in each label too, by `stratified_split`.

    Args:
        labels, seed: see there.
        number: K of the folds, at least 2.
    Returns:
        the fold of each image, 0 to K - 1.
    """
    left = dict(labels)
    folds: Dict[Hashable, int] = {}
    for fold in range(number - 1):
        held_out = stratified_split(left, 1 / (number - fold), seed)
        folds.update(dict.fromkeys(held_out, fold))
        left = {image: names for image, names in left.items() if image not in held_out}
    return {**folds, **dict.fromkeys(left, number - 1)}


def _rank(image: Hashable, seed: int) -> bytes:
    """A random number of an image that depends on the seed and its id alone."""
    return hashlib.sha256(f"{seed}:{image!r}".encode()).digest()


def _deal_out(groups: Mapping, members: Mapping, share: float) -> Dict[Hashable, int]:
    """The greedy part: the side of each image."""
    lacking = {group: _wanted(len(images), share) for group, images in members.items()}
    lacking_in_all = [(1 - share) * len(groups), share * len(groups)]
    left = {group: len(images) for group, images in members.items()}
    sides: Dict[Hashable, int] = {}
    # Among labels with equally few images left, the one that had fewer at first.
    rarest = [(number, number, group) for group, number in left.items()]
    heapq.heapify(rarest)
    while rarest:
        number, _, group = heapq.heappop(rarest)
        if number != left[group] or not number:
            continue  # An outdated entry: the label has fewer images left, and is further ahead.
        for image in members[group]:
            if image in sides:
                continue
            side = max((TRAIN, HELD_OUT), key=lambda s: (lacking[group][s], lacking_in_all[s]))
            sides[image] = side
            lacking_in_all[side] -= 1
            for other in groups[image]:
                lacking[other][side] -= 1
                left[other] -= 1
                heapq.heappush(rarest, (left[other], len(members[other]), other))
    return sides


def _wanted(number: int, share: float) -> List[float]:
    """How many of a label's images each side is to have: at least one, if there are two."""
    held_out = min(max(share * number, 1), number - 1)
    return [number - held_out, held_out]


def _mend(sides: Dict[Hashable, int], groups: Mapping, members: Mapping) -> None:
    """Move single images to where one of their labels is lacking altogether."""
    found = [Counter(), Counter()]
    for image, side in sides.items():
        found[side].update(groups[image])
    for group in sorted(members, key=lambda group: (len(members[group]), group)):
        for side in (TRAIN, HELD_OUT):
            if found[side][group] or len(members[group]) < 2:
                continue
            other = 1 - side
            for image in members[group]:
                if all(found[other][label] > 1 for label in groups[image]):
                    sides[image] = side
                    found[other].subtract(groups[image])
                    found[side].update(groups[image])
                    break
