import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ia_gcn.modeling import LabelCorrections
from ia_gcn.modeling.losses import large_losses
from tests.helpers.losses import batches, loss_from_config, quick, sigmoid

PARTS_OF_A_THOUSAND = st.integers(0, 1000)


def largest(logits, targets, share):
    """Places of the unknown labels with the largest losses as absent ones, sorted literally."""
    unknown = [(i, c) for i, c in np.ndindex(*logits.shape) if targets[i, c] == -1]
    unknown.sort(key=lambda place: math.log(1 - sigmoid(logits[place].item())))
    number = math.ceil(share * logits.numel())
    return set(unknown[:number])


def loop(logits, targets, large, scheme):
    """Kim et al., one entry at a time; the mean over labels and images."""
    total = 0.0
    for place in np.ndindex(*logits.shape):
        p, y = sigmoid(logits[place].item()), targets[place]
        if place in large:
            total -= 0 if scheme == "LL-R" else math.log(p)
        elif y > -2:
            total -= math.log(p if y == 1 else 1 - p)
    return total / logits.numel()


def different_logits(batch):
    """The batch with logits of which no two are equal."""
    logits, targets = batch
    return logits + torch.arange(logits.numel()).view(logits.shape) * 1e-3, targets


@quick
@given(batches(max_labels=7).map(different_logits), PARTS_OF_A_THOUSAND)
def test_the_largest_losses_are_those_of_unknown_labels(batch, thousandths):
    large = large_losses(*batch, thousandths / 1000)
    found = {tuple(place) for place in large.nonzero().tolist()}
    assert found == largest(*batch, Fraction(thousandths, 1000))


@quick
@given(
    batches().map(different_logits),
    st.sampled_from(["LL-R", "LL-Ct"]),
    st.integers(0, 20),
    st.integers(0, 400),
)
def test_rejected_and_corrected_labels_are_those_of_the_loop(batch, scheme, epoch, thousandths):
    keys = {"LARGE_LOSS__SCHEME": scheme, "LARGE_LOSS__RATE": thousandths / 1000}
    loss = loss_from_config("LargeLoss", **keys)
    loss.epoch = epoch
    share = min(epoch * Fraction(thousandths, 1000), 1)
    expected = loop(*batch, largest(*batch, share), scheme)
    assert loss(*batch).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_their_gradients_are_those_of_labels_left_out_and_of_present_ones():
    logits = torch.tensor([[-1.0, 3.0, 2.0, 1.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, -1.0, -1.0]])
    for scheme, slope in (("LL-R", 0.0), ("LL-Ct", sigmoid(2.0) - 1)):
        loss = loss_from_config("LargeLoss", LARGE_LOSS__SCHEME=scheme, LARGE_LOSS__RATE=0.25)
        loss.epoch, logits.grad = 1, None
        loss(logits, targets).backward()
        expected = [sigmoid(-1.0) - 1, sigmoid(3.0), slope, sigmoid(1.0)]
        assert logits.grad[0].mul(4).tolist() == pytest.approx(expected, rel=1e-5)


# LL-Cp


def settle(corrections):
    corrections.add(corrections.take_new())


def make_permanent(num_images, num_labels, rate):
    keys = {"LARGE_LOSS__SCHEME": "LL-Cp", "LARGE_LOSS__RATE": rate}
    loss = loss_from_config("LargeLoss", **keys)
    assert loss.needs == {"images", "label_counts"}
    loss.fill(num_images, torch.zeros(num_labels), torch.zeros(num_labels))
    return loss


def test_labels_are_corrected_for_good():
    loss = make_permanent(5, 3, rate=1 / 6)
    logits = torch.tensor([[2.0, 3.0, -1.0], [1.0, 0.0, 4.0]])
    targets, images = torch.tensor([[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0]]), torch.tensor([4, 2])
    # Nothing is, in the first epoch.
    assert loss(logits, targets, images).item() == pytest.approx(loop(logits, targets, (), "LL-Cp"))
    settle(loss.corrections)
    assert not loss.corrections.bits.any()
    # Then one of six entries after the other, whatever the epoch.
    given = targets.clone()
    for loss.epoch, place in ((1, (0, 1)), (2, (0, 0)), (5, (1, 1))):
        expected = loop(logits, given, {place}, "LL-Cp")
        assert loss(logits, targets, images).item() == pytest.approx(expected, rel=1e-6)
        settle(loss.corrections)
        given[place] = 1
        assert torch.equal(loss.corrections.of(images), (given == 1) & (targets == -1))
    assert not loss.corrections.of(torch.tensor([0, 1, 3])).any()
    assert targets.tolist() == [[-1, -1, 0], [1, -1, 0]]


def test_a_label_that_has_become_known_stays_as_it_is_known():
    loss = make_permanent(1, 2, rate=0.0)
    loss.corrections.add(np.array([[0, 0], [0, 1]]))
    logits, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -2.0]])
    expected = loop(logits, targets, (), "LL-Cp")
    assert loss(logits, targets, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


@quick
@given(st.data())
def test_corrections_are_a_set(data):
    num_images, num_labels = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    pair = st.tuples(st.integers(0, num_images - 1), st.integers(0, num_labels - 1))
    corrections, expected = LabelCorrections(num_images, num_labels), set()
    for pairs in data.draw(st.lists(st.lists(pair, max_size=8), max_size=3)):
        corrections.add(np.array(pairs, np.int64).reshape(-1, 2))
        expected |= set(pairs)
    rows = corrections.of(torch.arange(num_images))
    assert rows.shape == (num_images, num_labels)
    assert {tuple(place) for place in rows.nonzero().tolist()} == expected
