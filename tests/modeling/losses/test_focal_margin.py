import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ia_gcn.modeling import hill_loss, splc_loss
from tests.helpers.losses import batches, loss_from_config, quick, sigmoid, sum_over_entries

gammas = st.one_of(st.sampled_from([0.0, 2.0]), st.floats(0, 4))
margins = st.floats(-1, 2)


def focal(p, gamma):
    return -((1 - p) ** gamma) * math.log(p)


def loop_hill(logits, targets, hill, margin, gamma):
    """Zhang et al., one entry at a time; the mean over images."""

    def cost(x, y, c):
        p = sigmoid(x)
        if y == 1:
            return focal(sigmoid(x - margin), gamma)
        return (hill - p) * p**2 if y > -2 else 0.0

    return sum_over_entries(cost, logits, targets) / len(logits)


def loop_splc(logits, targets, threshold, margin, gamma):
    """Their SPLC, as in their code but for labels that are known to be absent."""

    def cost(x, y, c):
        if y == -2:
            return 0.0
        p = sigmoid(x - margin) if y == 1 else sigmoid(x)
        is_present = y == 1 or (y == -1 and p > threshold)
        return focal(p if is_present else 1 - p, gamma)

    return sum_over_entries(cost, logits, targets) / len(logits)


@quick
@given(batches(), st.floats(0.1, 3), margins, gammas)
def test_hill_is_the_loop(batch, hill, margin, gamma):
    loss = hill_loss(*batch, hill, margin, gamma)
    assert loss.shape == ()
    expected = loop_hill(*batch, hill, margin, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(batches(), st.floats(0, 1), margins, gammas)
def test_splc_is_the_loop(batch, threshold, margin, gamma):
    loss = splc_loss(*batch, threshold, margin, gamma)
    assert loss.shape == ()
    expected = loop_splc(*batch, threshold, margin, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss", [hill_loss, splc_loss])
def test_they_are_differentiated_as_a_whole(loss):
    logits = torch.tensor([[-2.7, -0.4, 0.0, 1.3, 4.0, 0.7]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0, 1, 0, -1, -2]])
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_())


def test_the_slope_of_the_hill_falls_where_a_label_may_be_missing():
    logits = torch.logit(torch.linspace(0.01, 0.99, 99, dtype=torch.float64)).requires_grad_()
    hill_loss(logits[None], torch.full((1, 99), -1.0)).backward()
    p = logits.detach().sigmoid()
    slopes = logits.grad / (p * (1 - p))
    # λ / 3 with λ = 1.5.
    assert p[slopes.argmax()].item() == pytest.approx(0.5)
    assert (logits.grad > 0).all()


def test_splc_corrects_nothing_in_the_first_epoch():
    loss = loss_from_config("SPLCLoss")
    logits, targets = torch.tensor([[3.0, 3.0, -1.0]]), torch.tensor([[-1.0, 0.0, 1.0]])
    found = []
    for loss.epoch in (0, 1, 2):
        found.append(loss(logits, targets).item())
    # The paper's.
    assert found[0] == pytest.approx(loop_splc(logits, targets, 1.0, 1.0, 2.0), rel=1e-6)
    expected = loop_splc(logits, targets, 0.6, 1.0, 2.0)
    assert found[1:] == pytest.approx([expected, expected], rel=1e-6)


def test_they_take_their_numbers_from_the_config():
    logits, targets = torch.tensor([[0.3, -2.0, 1.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    loss = loss_from_config("HillLoss", HILL__LAMBDA=2.0, HILL__MARGIN=0.5, HILL__GAMMA=3.0)
    expected = loop_hill(logits, targets, 2.0, 0.5, 3.0)
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    numbers = {"THRESHOLD": 0.7, "START_EPOCH": 0, "MARGIN": 0.5, "GAMMA": 3.0}
    loss = loss_from_config("SPLCLoss", **{f"SPLC__{key}": x for key, x in numbers.items()})
    expected = loop_splc(logits, targets, 0.7, 0.5, 3.0)
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
