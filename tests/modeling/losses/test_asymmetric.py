import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.loss import AsymmetricLossMultiLabel

from ia_gcn.modeling import multi_label_bce, selective_loss
from ia_gcn.modeling.losses import (
    AsymmetricAngularLoss,
    AsymmetricLoss,
    asymmetric_angular_loss,
    asymmetric_loss,
)
from tests.helpers.losses import (
    EXTREMES,
    HALVES_AND_SINGLE,
    batches,
    loss_from_config,
    quick,
    sigmoid,
)

gammas = st.one_of(st.sampled_from([0.0, 1.0, 4.0]), st.floats(0, 8))
clips = st.one_of(st.sampled_from([0.0, 0.05]), st.floats(0, 0.9))


def loop_asl(logits, targets, gamma_pos, gamma_neg, clip):
    """The paper's L+ and L-, summed up one entry at a time, and the mean over images."""
    total = 0.0
    for row, labels in zip(logits.tolist(), targets.tolist()):
        for x, y in zip(row, labels):
            p = sigmoid(x)
            shifted = max(p - clip, 0)
            if y == 1:
                total -= (1 - p) ** gamma_pos * math.log(p)
            elif y == 0:
                total -= shifted**gamma_neg * math.log(1 - shifted)
    return total / len(logits)


@quick
@given(batches(), gammas, gammas, clips, st.booleans())
def test_asl_is_the_loop(batch, gamma_pos, gamma_neg, clip, focusing_gradient):
    loss = asymmetric_loss(*batch, gamma_pos, gamma_neg, clip, focusing_gradient)
    assert loss.shape == ()
    expected = loop_asl(*batch, gamma_pos, gamma_neg, clip)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(batches(), gammas, gammas, clips)
def test_without_its_gradient_the_focusing_factor_is_a_weight(batch, gamma_pos, gamma_neg, clip):
    logits, targets = batch
    asymmetric_loss(logits.requires_grad_(), targets, gamma_pos, gamma_neg, clip).backward()
    for i, row in enumerate(targets.tolist()):
        for c, y in enumerate(row):
            p = sigmoid(logits[i, c].item())
            assume(abs(p - clip) > 1e-6)
            shifted = max(p - clip, 0)
            if y == 1:
                expected = -((1 - p) ** (gamma_pos + 1))
            elif y == 0 and shifted > 0:
                expected = shifted**gamma_neg * p * (1 - p) / (1 - shifted)
            else:
                expected = 0
            assert logits.grad[i, c].item() * len(logits) == pytest.approx(
                expected, rel=1e-9, abs=1e-12
            )


@pytest.mark.parametrize("clip", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("gamma_pos", [0.0, 0.5, 2.0])
def test_with_its_gradient_the_loss_is_differentiated_as_a_whole(gamma_pos, gamma_neg, clip):
    # No probability at a clip, where there is a bend.
    logits = torch.linspace(-6, 6, 16, dtype=torch.float64).view(2, 8).requires_grad_()
    targets = torch.tensor([[1, 0, -1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, -1, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda x: asymmetric_loss(x, targets, gamma_pos, gamma_neg, clip, True), logits
    )


@quick
@given(
    batches(values=(1, 0)),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([0, 0.05, 0.2]),
    st.booleans(),
)
def test_asl_is_timms(batch, gamma_pos, gamma_neg, clip, focusing_gradient):
    logits, targets = batch[0].float(), batch[1].float()
    assume(((logits.sigmoid() - clip).abs() > 1e-4).all())
    theirs = AsymmetricLossMultiLabel(
        gamma_neg, gamma_pos, clip, disable_torch_grad_focal_loss=not focusing_gradient
    )
    theirs_in, ours_in = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    # Image by image, because releases of timm differ in what they do with a batch.
    images = zip(theirs_in.split(1), targets.split(1))
    expected = sum(theirs(x, y) for x, y in images) / len(logits)
    loss = asymmetric_loss(ours_in, targets, gamma_pos, gamma_neg, clip, focusing_gradient)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-5)


@quick
@given(batches(), st.sampled_from([1, 50, 1000]), st.booleans())
def test_without_focusing_and_clip_asl_is_bce_summed_over_labels(batch, scale, focusing_gradient):
    logits, targets = scale * batch[0], batch[1]
    asl_in, bce_in = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    asl = asymmetric_loss(asl_in, targets, 0, 0, 0, focusing_gradient)
    bce = logits.shape[1] * multi_label_bce(bce_in, targets)
    torch.testing.assert_close(asl, bce)
    asl.backward()
    bce.backward()
    torch.testing.assert_close(asl_in.grad, bce_in.grad)


@quick
@given(batches(), gammas, gammas, clips, st.booleans())
def test_asl_of_a_batch_is_the_mean_of_its_images(
    batch, gamma_pos, gamma_neg, clip, focusing_gradient
):
    def loss(logits, targets):
        return asymmetric_loss(logits, targets, gamma_pos, gamma_neg, clip, focusing_gradient)

    alone = [loss(x, y) for x, y in zip(batch[0].split(1), batch[1].split(1))]
    torch.testing.assert_close(loss(*batch), torch.stack(alone).mean())


@pytest.mark.parametrize("focusing_gradient", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, torch.float64])
def test_asl_and_its_gradient_stay_finite(dtype, focusing_gradient):
    for gamma, clip in itertools.product(
        (0, 1e-3, 0.1, 0.5, 1, 4, 1e3, 1e6), (0, 1e-30, 1e-6, 0.05, 0.5, 0.999, 1 - 1e-9)
    ):
        # Where p is m, or as near to it as the type allows.
        at_clip = math.log(clip / (1 - clip)) if clip else 0
        near = [at_clip * (1 + k * torch.finfo(dtype).eps) for k in range(-4, 5)]
        values = [*EXTREMES, *(-x for x in EXTREMES), *near]
        logits = torch.tensor([3 * values], dtype=dtype, requires_grad=True)
        targets = torch.tensor([1, 0, -1]).repeat_interleave(len(values))[None]
        loss = asymmetric_loss(logits, targets, gamma, gamma, clip, focusing_gradient)
        loss.backward()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert logits.grad.dtype == dtype
        assert loss.isfinite(), (gamma, clip)
        assert logits.grad.isfinite().all(), (gamma, clip)
        assert (logits.grad[targets == -1] == 0).all()


def exact_asl(x, y, gamma, clip):
    """L+ or L- of one logit, in as many digits as it takes."""
    with localcontext() as context:
        context.prec = 60
        x, gamma, clip = Decimal(x), Decimal(gamma), Decimal(clip)
        p, not_p = 1 / (1 + (-x).exp()), 1 / (1 + x.exp())
        missed, found = (not_p, p) if y else (max(p - clip, Decimal(0)), min(not_p + clip, 1))
        return float(-Decimal(found).ln() * (missed**gamma if gamma else 1))


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE)
@pytest.mark.parametrize("clip", [0.0, 2.0**-20, 0.046875, 0.75])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("y", [0, 1])
def test_asl_is_accurate_however_large_the_logits(dtype, clip, gamma, y):
    for x in [*EXTREMES, *(-x for x in EXTREMES)]:
        logits = torch.tensor([[x]], dtype=dtype)
        loss = asymmetric_loss(logits, torch.tensor([[y]]), gamma, gamma, clip)
        expected = exact_asl(logits.item(), y, gamma, clip)
        # As exact as float32 is, whatever the logits came in.
        assert loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-37), x


def test_autocast_changes_nothing():
    logits, targets = torch.linspace(-9, 9, 12).view(3, 4), torch.tensor([[1, 0, -1, 0]] * 3)
    expected = asymmetric_loss(logits, targets, 1, 4, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = asymmetric_loss(logits, targets, 1, 4, 0.05)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


# AAM


def loop_aam(logits, targets, gamma_pos, gamma_neg, clip, weight):
    """The sum over an image's labels, as the formula is written; the mean over images."""
    total = 0.0
    for row, labels in zip(logits.tolist(), targets.tolist()):
        for x, y in zip(row, labels):
            p = sigmoid(x)
            q = min(1 - p + clip, 1)
            if y == 1:
                total -= weight * q**gamma_pos * math.log(p)
            elif y == 0:
                total -= (1 - weight) * p**gamma_neg * math.log(q)
    return total / len(logits)


@quick
@given(batches(), gammas, gammas, clips, st.floats(0, 1))
def test_aam_is_the_loop(batch, gamma_pos, gamma_neg, clip, weight):
    loss = asymmetric_angular_loss(*batch, gamma_pos, gamma_neg, clip, weight)
    assert loss.shape == ()
    expected = loop_aam(*batch, gamma_pos, gamma_neg, clip, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
def test_aam_is_differentiated_as_a_whole(gamma, clip):
    # None where q reaches 1, where it has a kink.
    logits = torch.tensor([[-2.7, -0.4, 0.0, 1.3, 4.0, 0.7]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0, 1, 0, 1, -1]])
    assert torch.autograd.gradcheck(
        lambda x: asymmetric_angular_loss(x, targets, gamma, gamma, clip), logits.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, torch.float64])
def test_aam_and_its_gradient_stay_finite(dtype):
    values = torch.tensor(EXTREMES).to(dtype)
    for gamma, clip in itertools.product((0.0, 0.5, 4.0), (0.0, 0.05)):
        logits = torch.cat([values, -values])[None].expand(3, -1).clone().requires_grad_()
        targets = torch.tensor([[1.0], [0.0], [-1.0]]).expand(logits.shape)
        loss = asymmetric_angular_loss(logits, targets, gamma, gamma, clip)
        loss.backward()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.isfinite(), (gamma, clip)
        assert logits.grad.isfinite().all(), (gamma, clip)
        assert (logits.grad[2] == 0).all()


def test_aam_takes_its_numbers_from_the_config():
    numbers = {"GAMMA_POS": 2.0, "GAMMA_NEG": 3.0, "CLIP": 0.1, "POSITIVE_WEIGHT": 0.6}
    loss = loss_from_config("AsymmetricAngularLoss", **numbers)
    assert type(loss) is AsymmetricAngularLoss
    logits, targets = torch.tensor([[0.3, -2.0, 1.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    expected = loop_aam(logits, targets, 2.0, 3.0, 0.1, 0.6)
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_asl_takes_its_numbers_from_the_config():
    logits, targets = torch.tensor([[0.5, -1.0, 2.0, 1.5]]), torch.tensor([[1.0, 0.0, -1.0, 0.0]])
    assert isinstance(loss_from_config("AsymmetricLoss"), AsymmetricLoss)
    # The paper's.
    expected = loop_asl(logits, targets, 0, 4, 0.05)
    assert loss_from_config("AsymmetricLoss")(logits, targets).item() == pytest.approx(
        expected, rel=1e-5
    )
    for focusing_gradient in (False, True):
        numbers = {"GAMMA_POS": 1.5, "GAMMA_NEG": 2.5, "CLIP": 0.1}
        loss = loss_from_config("AsymmetricLoss", FOCUSING_GRADIENT=focusing_gradient, **numbers)
        ours, expected = (logits.clone().requires_grad_() for _ in range(2))
        loss(ours, targets).backward()
        asymmetric_loss(expected, targets, 1.5, 2.5, 0.1, focusing_gradient).backward()
        assert loss(logits, targets).item() == pytest.approx(
            loop_asl(logits, targets, 1.5, 2.5, 0.1), rel=1e-5
        )
        assert torch.equal(ours.grad, expected.grad)
        assert not list(loss.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("GAMMA_POS", -0.5),
        ("GAMMA_NEG", -1.0),
        ("GAMMA_NEG", math.inf),
        ("GAMMA_POS", math.nan),
        ("CLIP", -0.05),
        ("CLIP", 1.0),
        ("CLIP", math.nan),
    ],
)
def test_numbers_out_of_range_are_refused(error_line, key, value):
    assert f"MODEL.LOSS.{key}" in error_line(
        lambda: loss_from_config("AsymmetricLoss", **{key: value})
    )


# Class-aware selective loss


def loop_selective(logits, targets, frequent, top_k, gamma_pos, gamma_neg, gamma_unknown, clip):
    """P-ASL of what is not ignored, added up one image at a time; the mean over images."""

    def cost(x, y, c):
        p = sigmoid(x)
        shifted = max(p - clip, 0)
        if y == 1:
            return -((1 - p) ** gamma_pos) * math.log(p)
        if y == 0:
            return -(shifted**gamma_neg) * math.log(1 - shifted)
        return 0.0 if c in ignored else -(shifted**gamma_unknown) * math.log(1 - shifted)

    total = 0.0
    for row, labels in zip(logits.tolist(), targets.tolist()):
        unknown = [c for c, y in enumerate(labels) if y == -1]
        likeliest = sorted(unknown, key=lambda c: -row[c])[:top_k]
        told = [c for c, y in enumerate(labels) if y == -2]
        ignored = {*likeliest, *told, *(c for c in unknown if frequent[c])}
        total += sum(cost(x, y, c) for c, (x, y) in enumerate(zip(row, labels)))
    return total / len(logits)


@quick
@given(batches(), st.integers(0, 6), gammas, gammas, gammas, clips, st.integers(0, 31))
def test_the_selective_loss_is_the_loop(
    batch, top_k, gamma_pos, gamma_neg, gamma_unknown, clip, frequent
):
    logits, targets = batch
    # Of equal logits, any may be the likeliest.
    assume(all(len(set(row)) == len(row) for row in logits.tolist()))
    frequent = torch.tensor([bool(frequent >> c & 1) for c in range(logits.shape[1])])
    numbers = top_k, gamma_pos, gamma_neg, gamma_unknown, clip
    loss = selective_loss(logits, targets, frequent, *numbers)
    expected = loop_selective(logits, targets, frequent, *numbers)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(batches(values=(1, 0, -1)))
def test_it_is_asl_where_nothing_is_ignored_and_unknown_labels_are_like_absent_ones(batch):
    logits, targets = batch
    nothing = torch.zeros(logits.shape[1], dtype=torch.bool)
    loss = selective_loss(logits, targets, nothing, 0, 0, 4, 4, 0.05)
    torch.testing.assert_close(loss, asymmetric_loss(logits, targets.clamp(min=0)))


def test_the_focusing_of_the_selective_loss_has_no_gradient():
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    targets, nothing = torch.tensor([[1, 0, -1]]), torch.zeros(3, dtype=torch.bool)
    selective_loss(logits, targets, nothing, 0, 1.0, 2.0, 3.0, 0.0).backward()
    p = [sigmoid(x) for x in logits[0].tolist()]
    expected = [-((1 - p[0]) ** 2), p[1] ** 3, p[2] ** 4]
    assert logits.grad[0].tolist() == pytest.approx(expected)


def test_labels_are_frequent_by_what_is_known_of_them():
    loss = loss_from_config(
        "SelectiveLoss", num_labels=4, SELECTIVE__PRIOR_THRESHOLD=0.25, SELECTIVE__TOP_K=0
    )
    # Shares of 1/2, 1/4 and 1/5; the last is not known of any image.
    loss.fill(100, torch.tensor([5.0, 1.0, 1.0, 0.0]), torch.tensor([5.0, 3.0, 4.0, 0.0]))
    assert loss.frequent.tolist() == [True, False, False, False]
    logits = torch.zeros(1, 4, requires_grad=True)
    loss(logits, torch.full((1, 4), -1.0)).backward()
    assert (logits.grad[0] != 0).tolist() == [False, True, True, True]


def test_the_selective_loss_takes_its_numbers_from_the_config():
    numbers = {"GAMMA_POS": 1.0, "GAMMA_NEG": 2.0, "CLIP": 0.1}
    own = {"SELECTIVE__GAMMA_UNKNOWN": 3.0, "SELECTIVE__TOP_K": 1}
    loss = loss_from_config("SelectiveLoss", **numbers, **own)
    loss.fill(4, torch.zeros(3), torch.ones(3))
    logits, targets = torch.tensor([[0.3, -2.0, 1.0]]), torch.tensor([[0.0, -1.0, -1.0]])
    expected = loop_selective(logits, targets, [False] * 3, 1, 1.0, 2.0, 3.0, 0.1)
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
