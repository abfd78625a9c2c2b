import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from ia_gcn import add_ia_gcn_config
from ia_gcn.modeling import (
    assume_negative_loss,
    build_multi_label_loss,
    expected_positive_loss,
    multi_label_bce,
)
from tests.helpers.losses import batches, loss_from_config, quick, sigmoid, sum_over_entries


def loop_bce(logits, targets):
    """Eq. 13, summed up one entry at a time, and the mean over images."""
    total = 0.0
    for row, labels in zip(logits.tolist(), targets.tolist()):
        for x, y in zip(row, labels):
            if y == 1:
                total -= math.log(sigmoid(x))
            elif y == 0:
                total -= math.log(1 - sigmoid(x))
    return total / logits.numel()


@quick
@given(batches())
def test_bce_is_the_loop(batch):
    loss = multi_label_bce(*batch)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loop_bce(*batch), rel=1e-9, abs=1e-15)


@quick
@given(batches(values=(1, 0)))
def test_bce_is_scikit_learns_log_loss(batch):
    logits, targets = batch
    probabilities = [sigmoid(x) for x in logits.flatten().tolist()]
    expected = log_loss(targets.flatten().tolist(), probabilities, labels=[0, 1])
    assert multi_label_bce(logits, targets).item() == pytest.approx(expected, rel=1e-9)


@quick
@given(batches())
def test_gradient_is_probability_minus_target_and_nothing_where_ignored(batch):
    logits, targets = batch
    multi_label_bce(logits.requires_grad_(), targets).backward()
    for i, row in enumerate(targets.tolist()):
        for c, y in enumerate(row):
            expected = 0 if y < 0 else (sigmoid(logits[i, c].item()) - y) / logits.numel()
            assert logits.grad[i, c].item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_an_ignored_entry_stays_in_the_mean():
    logits = torch.zeros(1, 4)
    assert multi_label_bce(logits, torch.tensor([[1.0, 0.0, -1.0, -1.0]])).item() == pytest.approx(
        math.log(2) / 2
    )
    assert multi_label_bce(logits, -torch.ones(1, 4)).item() == 0


@quick
@given(batches())
def test_the_gradient_of_a_batch_is_the_mean_of_its_images(batch):
    features, targets = batch
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def gradient(rows):
        return torch.autograd.grad(multi_label_bce(weight * features[rows], targets[rows]), weight)

    alone = [gradient(slice(i, i + 1))[0].item() for i in range(len(features))]
    assert gradient(slice(None))[0].item() == pytest.approx(np.mean(alone), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = multi_label_bce(logits, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    loss.backward()
    # The wrong ones cost what they are off by.
    assert loss.item() == (0 + 0 + 1e4 + 1e4) / 4
    assert logits.grad.tolist() == [[0, 0, 0.25, -0.25]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_the_loss_has_the_logits_dtype(dtype):
    logits = torch.tensor([[0.5, -1.0, 2.0]])
    targets = torch.tensor([[1, 0, -1]])
    loss = multi_label_bce(logits, targets.to(dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loop_bce(logits, targets), rel=1e-6)


def test_targets_are_left_alone():
    targets = torch.tensor([[1.0, 0.0, -1.0]])
    multi_label_bce(torch.zeros(1, 3), targets)
    assert targets.tolist() == [[1, 0, -1]]


def test_the_default_loss_of_a_config_is_bce():
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    loss = build_multi_label_loss(cfg)
    logits, targets = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    assert loss(logits, targets).item() == pytest.approx(loop_bce(logits, targets), rel=1e-6)
    assert not list(loss.parameters())


# Unknown labels taken as absent


def loop_assume_negative(logits, targets, unknown_weight, smoothing):
    """Cole et al., AN, WAN and AN-LS, one entry at a time."""

    def cost(x, y, c):
        present, absent = -math.log(sigmoid(x)), -math.log(1 - sigmoid(x))
        right, wrong = (present, absent) if y == 1 else (absent, present)
        weight = {1: 1, 0: 1, -1: unknown_weight, -2: 0}[y]
        return weight * ((1 - smoothing) * right + smoothing * wrong)

    return sum_over_entries(cost, logits, targets) / logits.numel()


@quick
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_assuming_negatives_is_the_loop(batch, unknown_weight, smoothing):
    loss = assume_negative_loss(*batch, unknown_weight, smoothing)
    assert loss.shape == ()
    expected = loop_assume_negative(*batch, unknown_weight, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(batches(values=(1, 0, -1)))
def test_it_is_the_bce_of_absent_labels_or_of_known_ones_alone(batch):
    logits, targets = batch
    absent = multi_label_bce(logits, targets.clamp(min=0))
    torch.testing.assert_close(assume_negative_loss(logits, targets), absent)
    known = multi_label_bce(logits, targets)
    torch.testing.assert_close(assume_negative_loss(logits, targets, unknown_weight=0), known)


def test_assuming_negatives_takes_its_numbers_from_the_config():
    logits, targets = torch.tensor([[0.5, -1.0, 2.0, 0.1]]), torch.tensor([[1.0, 0.0, -1.0, -2.0]])
    for keys, numbers in (
        ({}, (1, 0)),
        # WAN: 1 / (C - 1).
        ({"ASSUME_NEGATIVE__UNKNOWN_WEIGHT": 0.0}, (1 / 3, 0)),
        (
            {"ASSUME_NEGATIVE__UNKNOWN_WEIGHT": 0.3, "ASSUME_NEGATIVE__SMOOTHING": 0.1},
            (0.3, 0.1),
        ),
    ):
        loss = loss_from_config("AssumeNegativeLoss", **keys)(logits, targets)
        expected = loop_assume_negative(logits, targets, *numbers)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


# The expected number of labels


@quick
@given(batches(), st.floats(0, 6))
def test_epr_is_the_loop(batch, expected_labels):
    logits, targets = batch
    loss = expected_positive_loss(logits, targets, expected_labels)
    num_labels, found, asked = logits.shape[1], [], []
    for row, states in zip(logits.tolist(), targets.tolist()):
        counted = [x for x, state in zip(row, states) if state != -2]
        found.append(sum(map(sigmoid, counted)))
        asked.append(expected_labels * len(counted) / num_labels)
    penalty = ((np.mean(found) - np.mean(asked)) / num_labels) ** 2
    expected = loop_bce(logits, targets) + penalty
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_number_of_labels_is_that_of_the_known_ones():
    loss = loss_from_config("ExpectedPositiveLoss")
    assert loss.needs == {"label_counts"}
    # 1/2 + 1/4 + 0: the last label is not known of any image.
    loss.fill(9, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([2.0, 3.0, 0.0]))
    logits, targets = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    torch.testing.assert_close(loss(logits, targets), expected_positive_loss(logits, targets, 0.75))


def test_present_labels_alone_say_nothing_of_their_number(error_line):
    loss = loss_from_config("ExpectedPositiveLoss")
    message = error_line(loss.fill, 9, torch.ones(3), torch.zeros(3))
    assert "MODEL.LOSS.EXPECTED_POSITIVE.NUM_LABELS must be set" in message
    loss = loss_from_config("ExpectedPositiveLoss", EXPECTED_POSITIVE__NUM_LABELS=2.9)
    assert not loss.needs
    logits, targets = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, -1.0, -1.0]])
    torch.testing.assert_close(loss(logits, targets), expected_positive_loss(logits, targets, 2.9))
