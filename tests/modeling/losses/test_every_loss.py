"""What every loss of the registry does."""

import pytest
import torch

from ia_gcn.modeling import MULTI_LABEL_LOSS_REGISTRY, NOT_COUNTED, MultiLabelCriterion
from tests.helpers.losses import EXTREMES, HALVES_AND_SINGLE, loss_from_config

LOSSES = sorted(name for name, cls in MULTI_LABEL_LOSS_REGISTRY if "ia_gcn" in cls.__module__)
SCHEMES = [{"LARGE_LOSS__SCHEME": scheme, "LARGE_LOSS__RATE": 0.1} for scheme in ("LL-Ct", "LL-Cp")]
VARIANTS = [*((name, {}) for name in LOSSES), *(("LargeLoss", keys) for keys in SCHEMES)]


def make(name, num_labels, keys):
    """The loss in its second epoch, and what it is to be called with beside logits and targets."""
    loss = loss_from_config(name, num_labels, **keys)
    loss.epoch = 1
    needs = getattr(loss, "needs", ())
    if "label_counts" in needs:
        loss.fill(9, torch.arange(num_labels).double(), torch.full((num_labels,), 4.0).double())
    return loss, lambda images: {"images": images} if "images" in needs else {}


@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, torch.float64])
@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_it_and_its_gradient_stay_finite(name, keys, dtype):
    values = [*EXTREMES, *(-x for x in EXTREMES)]
    logits = torch.tensor([4 * values], dtype=dtype, requires_grad=True)
    targets = torch.tensor([1.0, 0, -1, NOT_COUNTED]).repeat_interleave(len(values))[None]
    loss, context = make(name, targets.shape[1], keys)
    value = loss(logits, targets, **context(torch.tensor([3])))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_what_does_not_count_has_no_gradient_and_no_influence(name, keys):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator)
    targets = torch.randint(-2, 2, (4, 6), generator=generator).float()
    others = torch.where(targets == NOT_COUNTED, logits + 3, logits)
    loss, context = make(name, 6, keys)
    context = context(torch.arange(4))
    logits.requires_grad_()
    value = loss(logits, targets, **context)
    value.backward()
    assert (logits.grad[targets == NOT_COUNTED] == 0).all()
    assert (logits.grad != 0).any()
    assert torch.equal(loss(others, targets, **context), value)


def test_a_loss_that_lacks_its_label_counts_says_so():
    criterion = MultiLabelCriterion(loss=loss_from_config("DistributionBalancedLoss"))
    with pytest.raises(RuntimeError, match="DistributionBalancedLoss has no label counts: call"):
        criterion({"logits": torch.zeros(1, 3)}, torch.zeros(1, 3))
