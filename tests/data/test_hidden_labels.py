"""Which labels are hidden, against what each protocol asks for."""

from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.data import hidden_labels as module
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.data.hidden_labels import (
    hide_labels,
    keep_entries,
    keep_of_each_image,
    keep_of_each_label,
    keep_one_positive,
)

C = 8
quick = settings(max_examples=60)
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
SEEDS = st.integers(0, 3)


@st.composite
def data_sets(draw):
    """Dicts of complete images and of images with holes, with ids of both kinds."""
    as_text = draw(st.booleans())
    dicts = []
    for i in range(draw(st.integers(0, 10))):
        states = draw(st.lists(st.sampled_from([1, 0, -1]), min_size=C, max_size=C))
        found = {s: [j for j, state in enumerate(states) if state == s] for s in (1, 0, -1)}
        record = {"image_id": f"{i}.jpg" if as_text else i, "labels": found[1]}
        rest = {"absent_labels": found[0]} if draw(st.booleans()) else {"ignored_labels": found[-1]}
        dicts.append({**record, **rest})
    return dicts


def targets_of(dicts):
    return {d["image_id"]: target_vector(d, C).tolist() for d in dicts}


def half_up(number):
    return int(number + 0.5)


@quick
@given(data_sets(), SHARES, SEEDS)
def test_a_share_of_each_image(dicts, share, seed):
    hidden = targets_of(hide_labels(dicts, C, keep_of_each_image(share), seed))
    for image, before in targets_of(dicts).items():
        known = sum(target != -1 for target in before)
        assert sum(target != -1 for target in hidden[image]) == half_up(share * known)


@quick
@given(data_sets(), SHARES, SEEDS)
def test_a_share_of_each_label(dicts, share, seed):
    before = np.array(list(targets_of(dicts).values())).reshape(-1, C)
    hidden = targets_of(hide_labels(dicts, C, keep_of_each_label(share), seed))
    after = np.array(list(hidden.values())).reshape(-1, C)
    for label in range(C):
        for state in (1, 0):
            number = sum(before[:, label] == state)
            expected = max(half_up(share * number), min(number, 1))
            assert sum(after[:, label] == state) == expected


@quick
@given(data_sets(), SEEDS)
def test_one_positive(dicts, seed):
    hidden = targets_of(hide_labels(dicts, C, keep_one_positive(), seed))
    for image, before in targets_of(dicts).items():
        assert hidden[image].count(1) == (1 if 1 in before else 0)
        assert hidden[image].count(0) == 0


EVERY = [
    keep_entries(0.5),
    keep_of_each_image(0.5),
    keep_of_each_label(0.5),
    keep_one_positive(),
]


@quick
@given(data_sets(), st.sampled_from(EVERY), SEEDS, st.randoms(use_true_random=False))
def test_what_is_left_is_true_whatever_the_order(dicts, keep, seed, random):
    hidden = hide_labels(dicts, C, keep, seed)
    for image, before in targets_of(dicts).items():
        pairs = zip(before, targets_of(hidden)[image])
        assert all(after in (target, -1) for target, after in pairs)
    assert [d["image_id"] for d in hidden] == [d["image_id"] for d in dicts]
    shuffled = random.sample(dicts, len(dicts))
    assert targets_of(hide_labels(shuffled, C, keep, seed)) == targets_of(hidden)


@quick
@given(data_sets(), st.sampled_from(EVERY), st.integers(1, 4))
def test_images_that_are_looked_at_together_make_no_difference(dicts, keep, at_once):
    hidden = hide_labels(dicts, C, keep, 0)
    seen = []

    def choose(targets, draws):
        seen.append(len(targets))
        return keep.choose(targets, draws)

    with mock.patch.object(module, "ENTRIES_AT_ONCE", at_once * C):
        assert hide_labels(dicts, C, keep._replace(choose=choose), 0) == hidden
    assert sum(seen) == len(dicts)
    assert not keep.by_image or max(seen, default=0) <= at_once


@pytest.mark.parametrize("keep", EVERY[:2] + EVERY[3:])
def test_other_images_make_no_difference(keep):
    dicts = [{"image_id": i, "labels": [i % C, (i + 3) % C]} for i in range(20)]
    hidden = targets_of(hide_labels(dicts, C, keep, 0))
    alone = targets_of(hide_labels(dicts[7:9], C, keep, 0))
    assert alone == {i: hidden[i] for i in (7, 8)}
    assert targets_of(hide_labels(dicts, C, keep, 1)) != hidden


def test_the_choice_is_at_random():
    """Each of 3 labels in a third of 3,000 images: 1,000, within 4 deviations of 26."""
    dicts = [{"image_id": i, "labels": [1, 4, 6]} for i in range(3000)]
    chosen = Counter(d["labels"][0] for d in hide_labels(dicts, C, keep_one_positive(), 0))
    assert set(chosen) == {1, 4, 6}
    assert all(abs(number - 1000) < 104 for number in chosen.values())
    known = hide_labels(dicts, C, keep_entries(0.3), 0)
    number = sum(len(d["labels"]) + len(d["absent_labels"]) for d in known)
    assert abs(number - 0.3 * 3000 * C) < 4 * (0.3 * 0.7 * 3000 * C) ** 0.5


def test_boxes_of_hidden_labels_go():
    boxes = [{"category_id": label, "bbox": [0, 0, 1, 1]} for label in (0, 1, 1)]
    dicts = [{"image_id": 5, "labels": [0, 1], "annotations": boxes}]
    (hidden,) = hide_labels(dicts, C, keep_one_positive(), 0)
    assert {box["category_id"] for box in hidden["annotations"]} == set(hidden["labels"])
    assert len(dicts[0]["annotations"]) == 3
