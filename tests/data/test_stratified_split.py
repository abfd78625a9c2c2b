"""Holding out images: which ones, and that every label is on both sides."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.data.stratified_split import stratified_folds, stratified_split

data_sets = st.dictionaries(
    st.text("abc123./", min_size=1, max_size=6), st.sets(st.sampled_from("pqrst")), max_size=12
)


def long_tailed(num_images=2000, num_labels=20):
    """Label lists in which label k is 1 / (k + 1) as frequent as label 0; some are empty."""
    rng = random.Random(0)
    weights = [1 / (k + 1) for k in range(num_labels)]
    return {
        f"{i}.jpg": [f"label {k}" for k in rng.choices(range(num_labels), weights, k=i % 5)]
        for i in range(num_images)
    }


def counts_of(labels, images):
    return Counter(label for image in images for label in set(labels[image]))


@settings(max_examples=100)
@given(data_sets, st.floats(0.05, 0.95), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_images_and_labels_does_not_matter(labels, share, seed, rng):
    held_out = stratified_split(labels, share, seed)
    assert held_out <= set(labels)
    items = [(image, rng.sample(sorted(names), len(names))) for image, names in labels.items()]
    rng.shuffle(items)
    assert stratified_split(dict(items), share, seed) == held_out


@settings(max_examples=100)
@given(data_sets, st.integers(0, 3))
def test_a_label_with_one_image_stays_in_training(labels, seed):
    held_out = stratified_split(labels, 0.3, seed)
    single = {label for label, count in counts_of(labels, labels).items() if count == 1}
    assert not single & set(counts_of(labels, held_out))


def test_every_label_has_its_share():
    labels = long_tailed()
    held_out = stratified_split(labels, 0.2, seed=0)
    assert len(held_out) == pytest.approx(0.2 * len(labels), rel=0.05)
    found, total = counts_of(labels, held_out), counts_of(labels, labels)
    for label, count in total.items():
        assert abs(found[label] - 0.2 * count) < 1, label
    empty = [image for image, names in labels.items() if not names]
    assert sum(image in held_out for image in empty) == pytest.approx(0.2 * len(empty), abs=1)
    # What chance alone would give is an order of magnitude further off.
    chance = counts_of(labels, random.Random(0).sample(sorted(labels), len(held_out)))
    assert max(abs(chance[label] - 0.2 * count) for label, count in total.items()) > 5


def test_rare_labels_are_on_both_sides():
    labels = {f"{i}.jpg": [f"rare {i // 2}", "common"] for i in range(40)}
    held_out = stratified_split(labels, 0.1, seed=0)
    assert len(counts_of(labels, held_out)) == 21
    assert len(counts_of(labels, set(labels) - held_out)) == 21


def test_an_image_is_moved_where_a_label_would_be_on_one_side():
    """Against all ways to split, of small data sets: only labels of single images may hinder."""
    rng, short = random.Random(1), 0
    for seed in range(60):
        labels = {i: rng.sample("abcd", rng.randint(0, 2)) for i in range(7)}
        total = counts_of(labels, labels)
        single = {image for image in labels if any(total[label] == 1 for label in labels[image])}

        def on_both_sides(held_out, labels=labels):
            return set(counts_of(labels, held_out)) & set(
                counts_of(labels, set(labels) - set(held_out))
            )

        free = sorted(set(labels) - single)
        subsets = itertools.chain(*(itertools.combinations(free, n) for n in range(len(free) + 1)))
        best = max(len(on_both_sides(held_out)) for held_out in subsets)
        short += len(on_both_sides(stratified_split(labels, 0.3, seed))) < best
    assert short <= 1


def test_another_seed_holds_out_other_images():
    labels = long_tailed(200)
    assert stratified_split(labels, 0.2, 0) == stratified_split(labels, 0.2, 0)
    assert stratified_split(labels, 0.2, 0) != stratified_split(labels, 0.2, 1)


def test_folds_have_every_label_in_like_numbers():
    labels = long_tailed()
    folds = stratified_folds(labels, 5, seed=0)
    assert set(folds) == set(labels)
    total = counts_of(labels, labels)
    for fold in range(5):
        images = [image for image in labels if folds[image] == fold]
        assert len(images) == pytest.approx(len(labels) / 5, rel=0.05)
        for label, count in counts_of(labels, images).items():
            assert abs(count - total[label] / 5) < 2, (fold, label)


@settings(max_examples=50)
@given(data_sets, st.integers(2, 6), st.integers(0, 3), st.randoms(use_true_random=False))
def test_folds_do_not_depend_on_the_order(labels, number, seed, rng):
    folds = stratified_folds(labels, number, seed)
    assert set(folds.values()) <= set(range(number))
    items = list(labels.items())
    rng.shuffle(items)
    assert stratified_folds(dict(items), number, seed) == folds
