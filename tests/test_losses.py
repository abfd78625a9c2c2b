import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss

from ia_gcn import add_ia_gcn_config
from ia_gcn.modeling import build_multi_label_loss, multi_label_bce

quick = settings(max_examples=60)


@st.composite
def batches(draw, ignored=True, max_images=5, max_labels=5):
    """Logits and targets (B, C) in float64."""
    shape = draw(st.tuples(st.integers(1, max_images), st.integers(1, max_labels)))
    # Where the logarithm of a sigmoid can be taken as it is written.
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-8, 8)))
    values = [1, 0, -1] if ignored else [1, 0]
    targets = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from(values)))
    return torch.from_numpy(logits), torch.from_numpy(targets)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


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
@given(batches(ignored=False))
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
            expected = 0 if y == -1 else (sigmoid(logits[i, c].item()) - y) / logits.numel()
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
