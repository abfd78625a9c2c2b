"""A few labels at a time: the same figures whatever their number, and no memory for the others."""

import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.evaluation import (
    Conventions,
    best_f1_points,
    interpolated_precision,
    labels_without_negatives,
    measure_by_frequency,
    measure_calibration,
    multi_label_metrics,
    summarize,
)
from ia_gcn.evaluation import label_blocks as module
from ia_gcn.evaluation.confusion import confused_pairs
from ia_gcn.evaluation.label_blocks import count_given, label_blocks
from ia_gcn.evaluation.metrics import CONVENTIONS, label_measures
from tests.helpers.strategies import predictions

ALL_CONVENTIONS = st.builds(
    Conventions,
    *map(st.sampled_from, (CONVENTIONS["ap"], CONVENTIONS["cf1"])),
    st.booleans(),
    st.sampled_from(CONVENTIONS["ignored"]),
    st.booleans(),
)


def all_figures(scores, targets, known, top_k, conventions):
    """What the functions of the package make of them."""
    summary, ap = summarize(
        scores, targets, top_k, threshold=0.5, conventions=conventions, known=known
    )
    return [
        *summary.items(),
        ap,
        measure_by_frequency(ap, targets),
        labels_without_negatives(targets, [str(i) for i in range(targets.shape[1])]),
        *label_measures(scores, targets, 0.3),
        *best_f1_points(scores, targets),
        interpolated_precision(scores, targets),
        *measure_calibration(scores, targets),
        confused_pairs(scores, targets, 0.3, 5),
    ]


@settings(max_examples=60)
@given(
    predictions(max_labels=9), st.integers(1, 40), st.integers(1, 10), ALL_CONVENTIONS, st.data()
)
def test_figures_are_the_same_to_the_bit_in_blocks_of_any_size(
    prediction, at_once, top_k, conventions, data
):
    scores, targets = prediction
    drawn = st.lists(st.integers(-1, 1), min_size=targets.size, max_size=targets.size)
    known = np.where(targets == -1, np.reshape(data.draw(drawn), targets.shape), -1)
    arrays = scores, targets, known
    expected = all_figures(*arrays, top_k, conventions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES_AT_ONCE", at_once)
        for order in "CF":
            found = all_figures(*(np.array(x, order=order) for x in arrays), top_k, conventions)
            np.testing.assert_equal(found, expected)


@settings(max_examples=60)
@given(predictions(max_labels=9), st.integers(1, 40), st.integers(1, 9))
def test_the_top_k_are_those_of_sorting_each_image(prediction, at_once, top_k):
    """Of equal scores, the first label's."""
    scores, targets = prediction
    known = np.where(targets == -1, -1, scores.astype(np.float64))
    ranks = np.argsort(np.argsort(-known, axis=1, kind="stable"), axis=1)
    predicted = (ranks < top_k) & (known >= 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES_AT_ONCE", at_once)
        found = multi_label_metrics(
            scores, targets, 0.5, top_k, conventions=Conventions(forced_top_k=True)
        )
    correct, present = (predicted & (targets == 1)).sum(), (targets == 1).sum()
    assert found["OP"] == pytest.approx(100 * correct / max(1, predicted.sum()))
    assert found["OR"] == pytest.approx(100 * correct / max(1, present))


@pytest.mark.parametrize("labels", [None, [4, 0, 4, 2]])
def test_each_label_comes_once_in_its_order(monkeypatch, labels):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 25)
    matrix = np.arange(50).reshape(10, 5)
    parts, blocks = zip(*label_blocks(matrix, -matrix, labels=labels))
    assert [(part.start, part.stop) for part in parts][:2] == [(0, 2), (2, 4)]
    expected = matrix.T if labels is None else matrix.T[labels]
    for sign, found in zip((1, -1), zip(*blocks)):
        np.testing.assert_array_equal(np.concatenate(found), sign * expected)


def test_images_that_have_a_label_and_have_not(monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 3)
    targets = np.array([[1, 0, -1, 1], [1, -1, -1, 0]])
    present, absent = count_given(targets)
    assert (present.tolist(), absent.tolist()) == ([2, 0, 0, 1], [0, 1, 0, 1])


def resident(name):
    """Bytes of a mapped file that this process holds."""
    with open("/proc/self/smaps") as file:
        blocks = file.read().split("VmFlags")
    (block,) = [block for block in blocks if name in block]
    return 1024 * int(block.split("Rss:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells it")
def test_a_mapped_matrix_is_not_kept_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "a matrix of its own"
    shape = 2**16, 256
    np.memmap(path, np.int8, "w+", shape=shape, order="F")[::4096] = 1
    matrix = np.asarray(np.memmap(path, np.int8, "r", shape=shape, order="F"))
    assert matrix.sum() == 16 * 256
    assert resident(path.name) > 2**23
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2**20)
    sizes = []
    for labels, (block,) in label_blocks(matrix):
        assert block.sum() == 16 * len(block)
        if labels.start % 64 == 0:
            sizes.append(resident(path.name))
    # Before the first block, all of it was; the system reads around what is asked for.
    assert max(sizes[1:]) < 2**22
    assert resident(path.name) < os.sysconf("SC_PAGE_SIZE")
    assert count_given(matrix)[0].tolist() == [16] * 256
