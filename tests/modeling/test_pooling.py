import numpy as np
import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.modeling import GlobalPooling, MeanROIPooler, valid_cells

quick = settings(max_examples=80)

NAMES = ["max", "mean", "gem"]


def reference(name, region, power=3.0):
    """x (D,) of one image's own cells (D, h, w)."""
    cells = region.reshape(len(region), -1)
    if name == "max":
        return cells.max(axis=1)
    if name == "mean":
        return cells.mean(axis=1)
    return (np.maximum(cells, 1e-6) ** power).mean(axis=1) ** (1 / power)


def make_features(sizes, grid=(4, 5), padding=0.0, seed=0):
    """Features (B, D, H, W) with negative values, and masks that leave h × w cells of each map."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(len(sizes), 3, *grid)))
    valid = torch.zeros(len(sizes), 1, *grid, dtype=torch.bool)
    for mask, (height, width) in zip(valid, sizes):
        mask[:, :height, :width] = True
    return features.masked_fill(~valid, padding), valid


def own_cells(features, sizes):
    return [image[:, :height, :width].numpy() for image, (height, width) in zip(features, sizes)]


# GlobalPooling

SIZES = [(4, 5), (2, 5), (4, 1), (1, 1)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [0.0, 1e4, -1e4])
def test_pooling_is_over_each_images_own_cells(name, padding):
    features, valid = make_features(SIZES, padding=padding)
    expected = [reference(name, region) for region in own_cells(features, SIZES)]
    np.testing.assert_allclose(
        GlobalPooling(name)(features, valid).tolist(), np.stack(expected), rtol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_pooling_without_a_mask_is_over_every_cell(name):
    features, valid = make_features([(4, 5), (4, 5)])
    pooled = GlobalPooling(name)(features)
    expected = [reference(name, image.numpy()) for image in features]
    np.testing.assert_allclose(pooled.tolist(), np.stack(expected), rtol=1e-6)
    assert torch.allclose(GlobalPooling(name)(features, valid), pooled)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_padding(name):
    features, valid = make_features(SIZES, padding=2.0)
    # Above where the generalised mean cuts off.
    features = features.abs() + 0.1
    GlobalPooling(name)(features.requires_grad_(), valid).sum().backward()
    assert not (features.grad * ~valid).any()
    assert (features.grad * valid).flatten(1).any(dim=1).all()


def test_the_maximum_of_negative_features_is_negative():
    features, valid = make_features([(2, 2), (3, 4)])
    features = torch.where(valid, -features.abs() - 1, 0)
    pooled = GlobalPooling("max")(features, valid)
    assert (pooled <= -1).all()


def test_generalised_mean_of_power_1_is_the_mean():
    features, valid = make_features(SIZES)
    features = features.abs() + 0.1
    torch.testing.assert_close(
        GlobalPooling("gem", 1.0)(features, valid), GlobalPooling("mean")(features, valid)
    )


def test_generalised_mean_of_a_large_power_is_the_maximum():
    features, valid = make_features(SIZES)
    features = features.abs() + 0.1
    torch.testing.assert_close(
        GlobalPooling("gem", 300.0)(features, valid),
        GlobalPooling("max")(features, valid),
        rtol=0.02,
        atol=0,
    )


def test_the_power_of_the_generalised_mean_is_learned():
    pooling = GlobalPooling("gem", 2.5).double()
    assert [parameter.item() for parameter in pooling.parameters()] == [2.5]
    features, valid = make_features(SIZES)

    def pool(features, power):
        return torch.func.functional_call(pooling, {"power": power}, (features, valid))

    features = features.abs() + 0.1
    assert torch.autograd.gradcheck(pool, (features.requires_grad_(), pooling.power))
    assert not list(GlobalPooling("max").parameters())
    assert not list(GlobalPooling("mean").parameters())


@pytest.mark.parametrize("power", [1.0, 3.0, 10.0])
def test_a_channel_without_activation_does_no_harm_to_the_generalised_mean(power):
    pooling = GlobalPooling("gem", power)
    features = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pooled = pooling(features)
    pooled.sum().backward()
    assert pooled.max() <= 2e-6
    assert features.grad.isfinite().all()
    assert pooling.power.grad.isfinite()


@pytest.mark.parametrize("name", ["", "Max", "average"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"MODEL\.GLOBAL_POOLING\.NAME"):
        GlobalPooling(name)


# valid_cells


def ceil_div(length, stride):
    return -(-length // stride)


def loop_valid(image_sizes, grid, stride):
    """A cell begins every `stride` pixels and is valid if it begins on the image."""
    height, width = grid
    return [
        [[[r * stride < h and c * stride < w for c in range(width)] for r in range(height)]]
        for h, w in image_sizes
    ]


SIDES = st.integers(1, 200)
IMAGE_SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4)


def check_valid_cells(image_sizes, padded_size, stride):
    grid = tuple(ceil_div(side, stride) for side in padded_size)
    valid = valid_cells(torch.zeros(len(image_sizes), 2, *grid), image_sizes, stride)
    expected = torch.tensor(loop_valid(image_sizes, grid, stride))
    if valid is None:
        assert expected.all()
    else:
        assert valid.dtype == torch.bool
        assert valid.tolist() == expected.tolist()


@quick
@given(IMAGE_SIZES, st.sampled_from([8, 16, 32]))
def test_valid_cells_of_a_batch_that_is_padded_to_multiples_of_the_stride(image_sizes, stride):
    padded = [ceil_div(max(sides), stride) * stride for sides in zip(*image_sizes)]
    check_valid_cells(image_sizes, tuple(padded), stride)


@quick
@given(IMAGE_SIZES, st.sampled_from([8, 16, 32]))
def test_valid_cells_of_a_batch_that_is_padded_to_its_largest_sides(image_sizes, stride):
    check_valid_cells(image_sizes, tuple(max(sides) for sides in zip(*image_sizes)), stride)


def test_valid_cells_by_hand():
    features = torch.zeros(3, 1, 2, 3)
    valid = valid_cells(features, [(64, 96), (32, 33), (33, 64)], 32)
    assert valid.int().tolist() == [
        [[[1, 1, 1], [1, 1, 1]]],
        [[[1, 1, 0], [0, 0, 0]]],
        [[[1, 1, 0], [1, 1, 0]]],
    ]


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_a_batch_without_padding_needs_no_mask(size):
    assert valid_cells(torch.zeros(2, 1, 2, 3), [size, list(size)], 32) is None


def test_one_padded_image_needs_a_mask():
    valid = valid_cells(torch.zeros(1, 1, 3, 3), [(20, 70)], 32)
    assert valid.int().tolist() == [[[[1, 1, 1], [0, 0, 0], [0, 0, 0]]]]


# The mean over regions

# Within the map of 7 × 5 cells, over its border, beyond it, of no size, and all of it.
REGION_BOXES = [
    *([8.0, 10.5, 60.2, 33.3], [-40.0, 70.0, 20.0, 130.0], [200.0, 200.0, 260.0, 290.0]),
    *([31.0, 44.0, 31.0, 44.0], [0.0, 0.0, 80.0, 112.0]),
]


def region_means(cls, features, boxes, resolution, samples):
    pooler = cls(resolution, [1 / 16], samples, "ROIAlignV2")
    boxes = [Boxes(torch.tensor(image).reshape(-1, 4)) for image in boxes]
    return pooler([features], boxes).mean(dim=(2, 3))


@pytest.mark.parametrize("boxes", [[REGION_BOXES, [], REGION_BOXES[:2]], [[]], [[], REGION_BOXES]])
@pytest.mark.parametrize("resolution", [1, 3])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_means_of_regions_are_those_of_roi_align(boxes, resolution, samples):
    torch.manual_seed(0)
    features = torch.randn(len(boxes), 3, 7, 5, dtype=torch.float64, requires_grad=True)
    found, expected = (
        region_means(cls, features, boxes, resolution, samples)
        for cls in (MeanROIPooler, ROIPooler)
    )
    assert found.shape == (sum(map(len, boxes)), 3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad(means, features, weights)[0] for means in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_means_of_regions_are_taken_in_full_precision_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(1, 3, 7, 5).bfloat16()
    expected = region_means(MeanROIPooler, features.double(), [REGION_BOXES], 1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = region_means(MeanROIPooler, features, [REGION_BOXES], 1, 5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_a_region_s_mean_asks_for_no_other_image():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 7, 5)
    alone = region_means(MeanROIPooler, features[:1], [REGION_BOXES], 1, 4)
    features[1] = float("nan")
    assert torch.equal(
        region_means(MeanROIPooler, features, [REGION_BOXES, REGION_BOXES], 1, 4)[:5], alone
    )
