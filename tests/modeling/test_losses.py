import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss
from timm.loss import AsymmetricLossMultiLabel

from ia_gcn import add_ia_gcn_config
from ia_gcn.errors import InputError
from ia_gcn.modeling import MultiLabelCriterion, build_multi_label_loss, multi_label_bce
from ia_gcn.modeling.losses import (
    AsymmetricAngularLoss,
    AsymmetricLoss,
    asymmetric_angular_loss,
    asymmetric_loss,
)

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


# ------------------------------------------------------------------------------------------- BCE


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


# ------------------------------------------------------------------------------------------- ASL

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
    batches(ignored=False),
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


HALVES_AND_SINGLE = [torch.float16, torch.bfloat16, torch.float32]
EXTREMES = [0, 1e-3, 1, 3, 10, 17, 20, 50, 88, 95, 103, 110, 1e3, 1e4]


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
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.LOSS.NAME = "AsymmetricAngularLoss"
    cfg.MODEL.LOSS.GAMMA_POS, cfg.MODEL.LOSS.GAMMA_NEG = 2.0, 3.0
    cfg.MODEL.LOSS.CLIP, cfg.MODEL.LOSS.POSITIVE_WEIGHT = 0.1, 0.6
    loss = build_multi_label_loss(cfg)
    assert type(loss) is AsymmetricAngularLoss
    logits, targets = torch.tensor([[0.3, -2.0, 1.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    expected = loop_aam(logits, targets, 2.0, 3.0, 0.1, 0.6)
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def asl_from_config(**keys):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.LOSS.NAME = "AsymmetricLoss"
    cfg.merge_from_list([x for key, v in keys.items() for x in (f"MODEL.LOSS.{key}", v)])
    return build_multi_label_loss(cfg)


def test_asl_takes_its_numbers_from_the_config():
    logits, targets = torch.tensor([[0.5, -1.0, 2.0, 1.5]]), torch.tensor([[1.0, 0.0, -1.0, 0.0]])
    assert isinstance(asl_from_config(), AsymmetricLoss)
    # The paper's.
    expected = loop_asl(logits, targets, 0, 4, 0.05)
    assert asl_from_config()(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    for focusing_gradient in (False, True):
        loss = asl_from_config(
            GAMMA_POS=1.5, GAMMA_NEG=2.5, CLIP=0.1, FOCUSING_GRADIENT=focusing_gradient
        )
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
    assert f"MODEL.LOSS.{key}" in error_line(lambda: asl_from_config(**{key: value}))


# The criterion over the outputs of a head


def make_criterion(weights=()):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.LOSS.AUX_WEIGHTS = weights
    return MultiLabelCriterion(cfg)


def test_auxiliary_logits_have_losses_of_their_own_weight():
    generator = torch.Generator().manual_seed(0)
    main, first, second = torch.randn(3, 4, 5, generator=generator)
    targets = torch.randint(-1, 2, (4, 5), generator=generator).float()
    outputs = {"logits": main, "aux_logits": {"deep": first, "gcn": second}}
    losses = make_criterion(("gcn=0.25",))(outputs, targets)
    assert list(losses) == ["loss_multi_label", "loss_deep", "loss_gcn"]
    torch.testing.assert_close(losses["loss_multi_label"], multi_label_bce(main, targets))
    torch.testing.assert_close(losses["loss_deep"], multi_label_bce(first, targets))
    torch.testing.assert_close(losses["loss_gcn"], 0.25 * multi_label_bce(second, targets))
    assert list(make_criterion()({"logits": main}, targets)) == ["loss_multi_label"]


def test_weights_of_what_is_not_there_are_refused():
    outputs = {"logits": torch.zeros(1, 2), "aux_logits": {"deep": torch.zeros(1, 2)}}
    with pytest.raises(InputError, match=r"AUX_WEIGHTS: the label head has no .* 'gcn', but deep"):
        make_criterion(("gcn=1",))(outputs, torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"AUX_WEIGHTS: 'gcn' is not name=weight"):
        make_criterion(("gcn",))
