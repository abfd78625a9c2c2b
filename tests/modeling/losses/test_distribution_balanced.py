import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ia_gcn.modeling import distribution_balanced_loss
from ia_gcn.modeling.losses import rebalanced_weights
from tests.helpers.losses import batches, loss_from_config, quick, sigmoid

smoothings = st.tuples(st.floats(0, 1), st.floats(0.1, 20), st.floats(0, 1))
tolerances = st.tuples(st.floats(0, 1), st.floats(0.5, 5))
gammas = st.one_of(st.sampled_from([0.0, 2.0]), st.floats(0, 4))


@st.composite
def counted_batches(draw):
    logits, targets = draw(batches())
    counts = hnp.arrays(float, logits.shape[1], elements=st.integers(0, 1000).map(float))
    return logits, targets, torch.from_numpy(draw(counts)), torch.from_numpy(draw(counts))


def weight(labels, c, present, alpha, beta, mu):
    """r̂, as the paper has it."""
    of_image = sum(1 / max(n, 1) for y, n in zip(labels, present) if y == 1)
    if not of_image:
        return alpha + 1
    return alpha + sigmoid(beta * (1 / max(present[c], 1) / of_image - mu))


def loop(logits, targets, present, absent, smoothing, tolerance, gamma):
    """Wu et al., one entry at a time, as in their code; the mean over labels and images."""
    kappa, scale = tolerance
    total = 0.0
    for row, labels in zip(logits.tolist(), targets.tolist()):
        for c, (x, y) in enumerate(zip(row, labels)):
            shift = -math.log(max(absent[c], 1) / max(present[c], 1)) * kappa / scale
            r = weight(labels, c, present, *smoothing)
            if y == 1:
                q, r = sigmoid(x + shift), r
            elif y == 0:
                q, r = sigmoid(-scale * (x + shift)), r / scale
            else:
                continue
            total -= r * math.log(q) * (2 * (1 - q) ** gamma if gamma else 1)
    return total / logits.numel()


@quick
@given(counted_batches(), smoothings, tolerances, gammas)
def test_it_is_the_loop(batch, smoothing, tolerance, gamma):
    loss = distribution_balanced_loss(*batch, smoothing, tolerance, gamma)
    assert loss.shape == ()
    counts = [count.tolist() for count in batch[2:]]
    expected = loop(*batch[:2], *counts, smoothing, tolerance, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_rare_label_weighs_more_and_less_beside_a_rarer_one():
    present = torch.tensor([1000.0, 10.0, 1.0])
    alone, beside = rebalanced_weights(
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), present, (0.1, 10.0, 0.2)
    )
    assert alone[0] < alone[1]
    assert beside[1] < alone[1]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_it_is_differentiated_as_a_whole(gamma):
    logits = torch.tensor([[-2.7, -0.4, 0.0, 1.3], [4.0, 0.7, 1.0, -1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0, 1, 0], [-1, 1, -2, 0]])
    counts = torch.tensor([[5.0, 50, 500, 0], [995, 950, 500, 1000]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: distribution_balanced_loss(x, targets, *counts, gamma=gamma),
        logits.requires_grad_(),
    )


def test_it_takes_its_numbers_from_the_config():
    names = ("ALPHA", "BETA", "MU", "KAPPA", "LAMBDA", "GAMMA")
    numbers = (0.2, 5.0, 0.3, 0.1, 3.0, 1.0)
    logits, targets = torch.tensor([[0.3, -2.0, 1.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    counts = [3.0, 20.0, 70.0], [97.0, 80.0, 20.0]
    # The paper's, for COCO.
    for keys, (smoothing, tolerance, gamma) in (
        ({}, ((0.1, 10.0, 0.2), (0.05, 2.0), 2.0)),
        (dict(zip(names, numbers)), ((0.2, 5.0, 0.3), (0.1, 3.0), 1.0)),
    ):
        loss = loss_from_config(
            "DistributionBalancedLoss",
            **{f"DISTRIBUTION_BALANCED__{key}": number for key, number in keys.items()},
        )
        loss.fill(100, *map(torch.tensor, counts))
        expected = loop(logits, targets, *counts, smoothing, tolerance, gamma)
        assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
