"""The Augmentations by themselves: Warp, MultiScaleCrop, Cutout, RandAugment."""

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as vision

from ia_gcn.data import Cutout, MultiScaleCrop, RandAugment, Warp
from ia_gcn.data.augmentation import INTERPOLATIONS
from ia_gcn.errors import InputError


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------- Warp

sides = st.integers(1, 80)


def exactly_warped(pixels, height, width):
    """What Pillow's bilinear resize is without rounding: (height, width, C) float."""
    channels = [Image.fromarray(c) for c in pixels.astype(np.float32).transpose(2, 0, 1)]
    return np.dstack([np.asarray(c.resize((width, height), Image.BILINEAR)) for c in channels])


@settings(max_examples=200)
@given(sides, sides, sides, sides, st.integers(1, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_a_warp_is_pillows_within_rounding(height, width, new_h, new_w, channels, seed, extreme):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if extreme:
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    before = pixels.copy()
    found = Warp((new_h, new_w)).get_transform(pixels).apply_image(pixels)
    assert (found.shape, found.dtype) == ((new_h, new_w, channels), np.uint8)
    assert np.array_equal(pixels, before)
    # Half a level for the rows, half a level for the columns, and something for 16-bit weights.
    exact = exactly_warped(pixels, new_h, new_w)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1.1)


@pytest.fixture(scope="module")
def photos():
    return load_sample_images().images


# By how many levels of 256: a bicubic's weights are larger, and some are negative.
FURTHEST = {"bilinear": 1, "bicubic": 2}


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(448, 448), (224, 320), (900, 600), (64, 64), (576, 576)])
def test_few_pixels_of_a_photo_differ_from_pillows_by_a_level(photos, size, name):
    interpolation = INTERPOLATIONS[name]
    for photo in photos:
        found = Warp(size, interpolation).get_transform(photo).apply_image(photo)
        expected = np.asarray(Image.fromarray(photo).resize(size[::-1], interpolation))
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= FURTHEST[name]
        assert (difference > 0).mean() < 0.02


def test_a_crop_and_a_flip_are_torchvisions(photos):
    crop = MultiScaleCrop((448, 448), (1.0, 0.875, 0.75, 0.66), 2)
    for seed in range(10):
        np.random.seed(seed)
        photo = photos[seed % 2]
        transform = crop.get_transform(photo) + T.HFlipTransform(448)
        box = transform.transforms[0]
        place = (box.y0, box.x0, box.h, box.w)
        expected = vision.hflip(vision.resized_crop(Image.fromarray(photo), *place, [448, 448]))
        difference = np.abs(transform.apply_image(photo).astype(int) - np.asarray(expected))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fast", [True, False])
def test_any_layout_in_memory_will_do(monkeypatch, fast):
    """Read-only, mirrored, BGR, a piece of something larger; with torch's kernel and without."""
    monkeypatch.setattr("ia_gcn.data.augmentation.HAS_FAST_KERNEL", fast)
    whole = noise(40, 60)
    read_only = np.asarray(Image.fromarray(whole))
    assert not read_only.flags.writeable
    warp = Warp((24, 32))
    for view in (read_only, whole[:, ::-1], whole[:, :, ::-1], whole[3:30, 7:50]):
        expected = Image.fromarray(np.ascontiguousarray(view)).resize((32, 24), Image.BILINEAR)
        found = warp.get_transform(view).apply_image(view)
        np.testing.assert_allclose(found, np.asarray(expected), rtol=0, atol=1 if fast else 0)


def test_boxes_and_masks_follow_as_in_detectron2():
    ours, theirs = (
        augmentation((33, 21)).get_transform(noise(40, 60)) for augmentation in (Warp, T.Resize)
    )
    boxes = np.array([[3.0, 5.0, 30.5, 39.0], [0.0, 0.0, 60.0, 40.0]])
    assert np.array_equal(ours.apply_box(boxes), theirs.apply_box(boxes))
    mask = noise(40, 60)[:, :, 0]
    assert np.array_equal(ours.apply_segmentation(mask), theirs.apply_segmentation(mask))
    colours = np.random.default_rng(0).random((40, 60, 3), np.float32)
    assert np.array_equal(ours.apply_image(colours), theirs.apply_image(colours))


def test_a_crop_is_resized_as_asked_for(photos):
    for name, interpolation in INTERPOLATIONS.items():
        np.random.seed(0)
        crop = MultiScaleCrop((224, 224), (1.0, 0.5), 1, interpolation).get_transform(photos[0])
        box = crop.transforms[0]
        piece = Image.fromarray(photos[0][box.y0 : box.y0 + box.h, box.x0 : box.x0 + box.w])
        expected = np.asarray(piece.resize((224, 224), interpolation))
        difference = np.abs(crop.apply_image(photos[0]).astype(int) - expected)
        assert difference.max() <= FURTHEST[name]


# --------------------------------------------------------------------------------- MultiScaleCrop

SCALES = (1.0, 0.875, 0.75, 0.66)


def crop_of(augmentation, height, width):
    """(x0, y0, width, height) of the crop that is drawn, and the transformed image."""
    image = np.zeros((height, width, 3), np.uint8)
    transform = augmentation.get_transform(image)
    crop = transform.transforms[0]
    assert isinstance(crop, T.CropTransform)
    return (crop.x0, crop.y0, crop.w, crop.h), transform.apply_image(image)


@settings(max_examples=150)
@given(
    *(sides, sides),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    st.integers(0, 4),
    st.sampled_from(["square", "image"]),
)
def test_crops_lie_in_the_image_and_have_the_right_sides(height, width, scales, max_distort, base):
    augmentation = MultiScaleCrop((7, 5), scales, max_distort, base=base)
    (x, y, w, h), image = crop_of(augmentation, height, width)
    assert image.shape == (7, 5, 3)
    assert 0 <= x <= x + w <= width
    assert 0 <= y <= y + h <= height
    whole_h, whole_w = (height, width) if base == "image" else 2 * (min(height, width),)
    places = [
        (i, j)
        for i, scale_h in enumerate(scales)
        for j, scale_w in enumerate(scales)
        if (h, w) == (max(1, round(whole_h * scale_h)), max(1, round(whole_w * scale_w)))
    ]
    assert any(abs(i - j) <= max_distort for i, j in places)


@pytest.mark.parametrize(("max_distort", "pairs"), [(0, 4), (1, 10), (2, 14), (3, 16)])
def test_every_pair_of_scales_occurs_about_as_often(max_distort, pairs):
    np.random.seed(0)
    augmentation = MultiScaleCrop((8, 8), SCALES, max_distort)
    drawn = [crop_of(augmentation, 100, 150)[0][2:] for _ in range(100 * pairs)]
    shapes, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(shapes) == pairs
    assert set(shapes.ravel()) == {100, 88, 75, 66}
    assert counts.min() > 60
    assert counts.max() < 150
    assert max_distort > 0 or all(w == h for w, h in drawn)


def test_every_place_occurs():
    np.random.seed(0)
    augmentation = MultiScaleCrop((8, 8), (0.5,), 0)
    places = [crop_of(augmentation, 8, 10)[0][:2] for _ in range(1000)]
    assert {x for x, _ in places} == set(range(7))
    assert {y for _, y in places} == set(range(5))


def test_a_crop_of_one_pixel():
    crop, image = crop_of(MultiScaleCrop((4, 6), SCALES, 2), 1, 1)
    assert crop == (0, 0, 1, 1)
    assert image.shape == (4, 6, 3)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, 1.1), (-0.5,), (float("nan"),)])
def test_scales_must_make_sense(scales):
    with pytest.raises(InputError, match="SCALES"):
        MultiScaleCrop((8, 8), scales, 2)


def test_crops_repeat_with_numpys_seed():
    def draw(seed):
        np.random.seed(seed)
        return [crop_of(MultiScaleCrop((8, 8), SCALES, 2), 60, 80)[0] for _ in range(10)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_a_crop_at_its_own_size_is_a_piece_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    transform = MultiScaleCrop((20, 20), (0.5,), 0).get_transform(image)
    x, y = transform.transforms[0].x0, transform.transforms[0].y0
    assert np.array_equal(transform.apply_image(image), image[y : y + 20, x : x + 20])


# ----------------------------------------------------------------------------------------- Cutout


def hidden(transform, height, width):
    """(H, W) bool: which pixels of the result say nothing of the image."""
    image = noise(height, width)
    # A pixel and its complement are never the same.
    return (transform.apply_image(image) == transform.apply_image(255 - image)).all(axis=2)


@settings(max_examples=150)
@given(sides, sides, st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
def test_a_rectangle_of_one_colour_is_hidden(height, width, share, seed):
    np.random.seed(seed)
    image = noise(height, width)
    before = image.copy()
    transform = Cutout(share).get_transform(image)
    result = transform.apply_image(image)
    assert np.array_equal(image, before)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    mask = hidden(transform, height, width)
    assert np.array_equal(result[~mask], image[~mask])
    assert len(np.unique(result[mask], axis=0)) <= 1
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert mask.sum() == len(rows) * len(columns)
    for found, side in ((rows, height), (columns, width)):
        whole = round(share * side)
        if len(found):
            assert found[-1] - found[0] + 1 == len(found)
            # Less is hidden only at a border, and never less than the half.
            assert len(found) == whole or (found[0] == 0 or found[-1] == side - 1)
            assert whole // 2 <= len(found) <= whole
        else:
            assert round(share * height) == 0 or round(share * width) == 0


def test_the_centre_is_uniform_over_the_image():
    np.random.seed(0)
    # A rectangle of one pixel, which is its own centre.
    cutout = Cutout(0.2)
    counts = sum(hidden(cutout.get_transform(noise(6, 7)), 6, 7).astype(int) for _ in range(4200))
    assert counts.sum() == 4200
    assert counts.min() > 60
    assert counts.max() < 150


def test_a_border_cuts_off_what_reaches_over_it():
    np.random.seed(0)
    image = noise(8, 12)
    masks = [hidden(Cutout(0.5).get_transform(image), 8, 12) for _ in range(500)]
    for axis, side, half in ((1, 8, 2), (0, 12, 3)):
        spans = {tuple(np.flatnonzero(mask.any(axis=axis))[[0, -1]].tolist()) for mask in masks}
        assert spans == {(max(0, c - half), min(side, c + half) - 1) for c in range(side)}


def test_the_colour_is_any():
    np.random.seed(0)
    image = np.zeros((1, 1, 3), np.uint8)
    pixels = [Cutout(0.9).get_transform(image).apply_image(image)[0, 0] for _ in range(2000)]
    assert [len(set(channel)) for channel in np.transpose(pixels)] == [256] * 3
    assert np.abs(np.corrcoef(np.transpose(pixels)) - np.eye(3)).max() < 0.1


def test_cutout_of_nothing_leaves_the_image():
    image = noise(20, 30)
    assert np.array_equal(Cutout(0).get_transform(image).apply_image(image), image)


def test_cutout_moves_nothing():
    transform = Cutout(0.5).get_transform(noise(20, 30))
    boxes = np.array([[0.0, 1.0, 12.5, 20.0], [3.0, 3.0, 30.0, 9.0]])
    assert np.array_equal(transform.apply_box(boxes), boxes)
    classes = np.arange(600).reshape(20, 30)
    assert np.array_equal(transform.apply_segmentation(classes), classes)


# ------------------------------------------------------------------------------------ RandAugment


@settings(max_examples=60)
@given(sides, sides, st.integers(0, 4), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_rand_augment_keeps_the_form(height, width, num_ops, magnitude, seed):
    np.random.seed(seed)
    image = noise(height, width)
    result = RandAugment(num_ops, magnitude).get_transform(image).apply_image(image)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    assert num_ops > 0 or np.array_equal(result, image)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(1, 5), (2, 9), (3, 30)])
def test_rand_augment_is_torchvisions(num_ops, magnitude):
    image = noise(20, 30)
    policy = torchvision.transforms.RandAugment(num_ops, magnitude)
    for seed in range(20):
        np.random.seed(seed)
        transform = RandAugment(num_ops, magnitude).get_transform(image)
        torch.manual_seed(transform.seed)
        expected = np.asarray(policy(Image.fromarray(image)))
        assert np.array_equal(transform.apply_image(image), expected)


def test_numpys_seed_alone_decides_what_rand_augment_does():
    image = noise(20, 30)

    def results(seed):
        np.random.seed(seed)
        transforms = [RandAugment(2, 9).get_transform(image) for _ in range(10)]
        return [transform.apply_image(image).tobytes() for transform in transforms]

    torch.manual_seed(0)
    first = results(3)
    torch.manual_seed(1)
    assert results(3) == first
    assert results(4) != first
    assert len(set(first)) > 5


@pytest.mark.parametrize("augmentation", [Cutout(0.5), RandAugment(2, 9)])
def test_what_was_drawn_is_done_again_and_draws_nothing(augmentation):
    image = noise(20, 30)
    for _ in range(10):
        transform = augmentation.get_transform(image)
        of_numpy, of_torch = np.random.get_state()[1].copy(), torch.get_rng_state()
        first = transform.apply_image(image)
        assert np.array_equal(np.random.get_state()[1], of_numpy)
        assert torch.equal(torch.get_rng_state(), of_torch)
        np.random.rand()
        torch.rand(1)
        assert np.array_equal(transform.apply_image(image), first)


def test_rand_augment_does_to_bgr_what_it_does_to_rgb():
    rgb = noise(20, 30)
    for seed in range(20):
        results = []
        for image_format, image in (("RGB", rgb), ("BGR", rgb[:, :, ::-1])):
            np.random.seed(seed)
            transform = RandAugment(3, 20, image_format).get_transform(image)
            results.append(transform.apply_image(image))
        assert np.array_equal(results[0], results[1][:, :, ::-1])


def test_rand_augment_refuses_what_would_have_to_move_along():
    transform = RandAugment(2, 9).get_transform(noise(20, 30))
    with pytest.raises(NotImplementedError):
        transform.apply_box(np.array([[0.0, 1.0, 12.5, 20.0]]))
    with pytest.raises(NotImplementedError):
        transform.apply_segmentation(np.zeros((20, 30), np.uint8))
