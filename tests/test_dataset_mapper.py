"""From a data set dict to a sample: reading, both views, boxes, and MultiScaleCrop."""

import copy
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from ia_gcn import add_ia_gcn_config
from ia_gcn.data import MultiLabelDatasetMapper, MultiScaleCrop, UnreadableImage


def make_mapper(is_train=False, **keys):
    """A mapper for four labels; double underscores in the keys stand for dots."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    keys = {"MODEL__LABEL_HEAD__NUM_LABELS": 4, "INPUT__FORMAT": "RGB", **keys}
    keys.setdefault("INPUT__IMAGE_SIZE", (32, 48))
    cfg.merge_from_list([x for key, value in keys.items() for x in (key.replace("__", "."), value)])
    return MultiLabelDatasetMapper(cfg, is_train=is_train)


@pytest.fixture
def noise(tmp_path):
    """A picture of 30×20 random pixels: (path, pixels (20, 30, 3))."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    return str(path), pixels


def record_of(path, **more):
    return {"file_name": str(path), "image_id": 7, "labels": [1], **more}


# --------------------------------------------------------------------------------------- a sample


@pytest.mark.parametrize("is_train", [False, True])
def test_what_a_sample_holds(noise, is_train):
    record = record_of(noise[0], labels=[3, 0], ignored_labels=[1], annotations=[], extra="kept")
    sample = make_mapper(is_train)(record)
    assert set(sample) == {"file_name", "image_id", "extra", "height", "width", "image", "labels"}
    assert (sample["file_name"], sample["image_id"], sample["extra"]) == (noise[0], 7, "kept")
    assert (sample["height"], sample["width"]) == (20, 30)
    assert sample["image"].shape == (3, 32, 48)
    assert sample["image"].dtype == torch.uint8
    assert sample["labels"].dtype == torch.float32
    assert sample["labels"].tolist() == [1, -1, 0, 1]


def test_no_label_is_all_zeros(noise):
    assert make_mapper()(record_of(noise[0], labels=[]))["labels"].tolist() == [0, 0, 0, 0]


def test_the_dict_is_left_alone(noise):
    box = {"bbox": [2, 3, 10, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0}
    record = record_of(noise[0], labels=[2], ignored_labels=[0], annotations=[box])
    before = copy.deepcopy(record)
    make_mapper(True, INPUT__WITH_BOXES=True)(record)
    assert record == before


def test_the_test_view_is_the_whole_picture_warped(noise):
    path, pixels = noise
    image = make_mapper()(record_of(path))["image"]
    expected = Image.fromarray(pixels).resize((48, 32), Image.BILINEAR)
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(expected))
    same_size = make_mapper(INPUT__IMAGE_SIZE=(20, 30))(record_of(path))["image"]
    assert np.array_equal(same_size.permute(1, 2, 0), pixels)


def test_the_channel_order_is_input_format(noise):
    rgb = make_mapper()(record_of(noise[0]))["image"]
    bgr = make_mapper(INPUT__FORMAT="BGR")(record_of(noise[0]))["image"]
    assert torch.equal(rgb, bgr.flip(0))
    assert not torch.equal(rgb, bgr)


def test_the_training_view_without_crop_and_flip_is_the_test_view(noise):
    plain = make_mapper(True, INPUT__MULTI_SCALE_CROP__ENABLED=False, INPUT__RANDOM_FLIP="none")
    expected = make_mapper()(record_of(noise[0]))["image"]
    for _ in range(5):
        assert torch.equal(plain(record_of(noise[0]))["image"], expected)


@pytest.mark.parametrize(("flip", "axis"), [("horizontal", 2), ("vertical", 1)])
def test_the_training_view_flips_half_of_the_pictures(noise, flip, axis):
    mapper = make_mapper(True, INPUT__MULTI_SCALE_CROP__ENABLED=False, INPUT__RANDOM_FLIP=flip)
    expected = make_mapper()(record_of(noise[0]))["image"]
    np.random.seed(0)
    views = [mapper(record_of(noise[0]))["image"] for _ in range(60)]
    flipped = [torch.equal(view, expected.flip(axis)) for view in views]
    assert 15 < sum(flipped) < 45
    assert all(f or torch.equal(v, expected) for f, v in zip(flipped, views))


def test_the_training_view_crops(noise):
    mapper = make_mapper(True, INPUT__RANDOM_FLIP="none")
    views = {mapper(record_of(noise[0]))["image"].numpy().tobytes() for _ in range(20)}
    assert len(views) > 10


# ------------------------------------------------------------------------------------------ boxes


def enclosing_box(mask):
    """x0, y0, x1, y1 around a mask's pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_boxes_follow_crops_and_flips(tmp_path, flip):
    pixels = np.full((90, 120, 3), 30, np.uint8)
    pixels[20:61, 35:50] = (250, 30, 30)
    pixels[40:70, 70:110] = (30, 250, 30)
    path = tmp_path / "rectangles.png"
    Image.fromarray(pixels).save(path)
    annotations = [
        {"bbox": [35, 20, 50, 61], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 3},
        {"bbox": [70, 40, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0},
        {"bbox": [0, 0, 120, 90], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
    ]
    mapper = make_mapper(
        True,
        INPUT__WITH_BOXES=True,
        INPUT__RANDOM_FLIP=flip,
        INPUT__IMAGE_SIZE=(96, 112),
        INPUT__MULTI_SCALE_CROP__SCALES=(1.0, 0.7, 0.4),
    )
    seen = cut_off = 0
    for seed in range(150):
        np.random.seed(seed)
        sample = mapper(record_of(path, labels=[0, 1, 3], annotations=annotations))
        instances = sample["instances"]
        assert instances.image_size == (96, 112)
        assert isinstance(instances.gt_boxes, Boxes)
        found = dict(zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()))
        assert len(found) == len(instances)
        assert set(found) <= {1, 3}
        # The crowd's label stays, its box doesn't.
        assert sample["labels"].tolist() == [1, 1, 0, 1]
        for label, channel in ((3, 0), (1, 1)):
            painted = sample["image"][channel].numpy() > 140
            if label not in found:
                # At the very edge, a painted pixel's blur may be left of it.
                assert painted.any(axis=0).sum() <= 2 or painted.any(axis=1).sum() <= 2
                cut_off += 1
            elif min(np.subtract(found[label][2:], found[label][:2])) > 3:
                np.testing.assert_allclose(found[label], enclosing_box(painted), atol=2)
                seen += 1
    assert seen > 100
    assert cut_off > 10


def test_boxes_are_handed_out_only_for_training_and_when_asked(noise):
    box = {"bbox": [2, 3, 10, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    record = record_of(noise[0], annotations=[box])
    assert "instances" not in make_mapper(True)(record)
    assert "instances" not in make_mapper(False, INPUT__WITH_BOXES=True)(record)
    assert len(make_mapper(True, INPUT__WITH_BOXES=True)(record_of(noise[0]))["instances"]) == 0


SEGMENTATIONS = {
    "polygon": [[2.0, 3.0, 12.0, 3.0, 12.0, 12.0]],
    "rle": coco_mask.frPyObjects({"size": [20, 30], "counts": [62, 10, 528]}, 20, 30),
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_masks_of_a_detection_data_set_are_left_out(noise, kind):
    box = {"bbox": [2, 3, 10, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    mapper = make_mapper(
        True,
        INPUT__WITH_BOXES=True,
        INPUT__RANDOM_FLIP="none",
        INPUT__MULTI_SCALE_CROP__ENABLED=False,
        INPUT__IMAGE_SIZE=(20, 30),
    )
    record = record_of(noise[0], annotations=[{**box, "segmentation": SEGMENTATIONS[kind]}])
    instances = mapper(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[2, 3, 12, 12]]
    assert instances.gt_classes.tolist() == [2]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}


# ------------------------------------------------------------------------------ kinds of pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20], upright[:12, 20:], upright[12:, :20] = 80, 160, 240
    # How a camera held that way stores it.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "camera.jpg"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    sample = make_mapper(INPUT__IMAGE_SIZE=(24, 40))(record_of(path))
    assert (sample["height"], sample["width"]) == (24, 40)
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0), upright, atol=6)


def ramp(dtype, top):
    """(20, 30), from black on the left to `top` on the right."""
    return np.tile(np.linspace(0, top, 30).astype(dtype), (20, 1))


GREY = Image.fromarray(ramp(np.uint8, 255))
PICTURES = {
    "grey.png": GREY,
    "grey.jpg": GREY,
    "grey with alpha.png": GREY.convert("LA"),
    "black and white.png": GREY.convert("1"),
    "palette.png": GREY.convert("P"),
    "palette.gif": GREY.convert("P"),
    "alpha.png": GREY.convert("RGBA"),
    "cmyk.jpg": GREY.convert("RGB").convert("CMYK"),
    "16 bit.png": Image.fromarray(ramp(np.uint16, 65535)),
    "16 bit.tif": Image.fromarray(ramp(np.uint16, 65535)),
    "float.tif": Image.fromarray(ramp(np.float32, 255)),
    "photo.webp": GREY.convert("RGB"),
    "photo.bmp": GREY.convert("RGB"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("is_train", [False, True])
def test_every_kind_of_picture_becomes_rgb(tmp_path, name, is_train):
    PICTURES[name].save(tmp_path / name)
    sample = make_mapper(is_train)(record_of(tmp_path / name))
    assert sample["image"].shape == (3, 32, 48)
    assert sample["image"].dtype == torch.uint8


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_keeps_its_greys(tmp_path, name):
    PICTURES[name].save(tmp_path / name)
    image = make_mapper(INPUT__IMAGE_SIZE=(20, 30))(record_of(tmp_path / name))["image"].float()
    expected = torch.from_numpy(ramp(np.float32, 255))
    if name == "black and white.png":  # dithered
        assert set(image.unique().tolist()) == {0, 255}
        image, expected = image.mean(1), expected.mean(0)
        torch.testing.assert_close(image[0], expected, atol=40, rtol=0)
    else:
        torch.testing.assert_close(image, expected.expand(3, -1, -1), atol=8, rtol=0)


def write_bomb(path):
    """A PNG of a few bytes that says it has 60000×60000 pixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_truncated(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-1500])


UNREADABLE = {
    "truncated.jpg": write_truncated,
    "truncated.png": write_truncated,
    "text.jpg": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "empty.jpg": lambda path: path.touch(),
    "header only.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "bomb.png": write_bomb,
    "folder.png": lambda path: path.mkdir(),
    "missing.png": lambda path: None,
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("is_train", [False, True])
def test_unreadable_files_are_named(tmp_path, name, is_train):
    path = tmp_path / name
    UNREADABLE[name](path)
    with pytest.raises(UnreadableImage, match=re.escape(str(path))) as caught:
        make_mapper(is_train)(record_of(path))
    assert caught.value.file_name == str(path)
    assert caught.value.reason


def test_an_unreadable_image_can_leave_a_worker_process():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "no picture")))
    assert (error.file_name, error.reason, str(error)) == (
        "a.jpg",
        "no picture",
        "a.jpg: no picture",
    )


# --------------------------------------------------------------------------------- MultiScaleCrop

SCALES = (1.0, 0.875, 0.75, 0.66)


def crop_of(augmentation, height, width):
    """(x0, y0, width, height) of the crop that is drawn, and the transformed image."""
    image = np.zeros((height, width, 3), np.uint8)
    transform = augmentation.get_transform(image)
    crop = transform.transforms[0]
    assert isinstance(crop, T.CropTransform)
    return (crop.x0, crop.y0, crop.w, crop.h), transform.apply_image(image)


sides = st.integers(1, 80)


@settings(max_examples=150)
@given(sides, sides, st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(0, 4))
def test_crops_lie_in_the_image_and_have_the_right_sides(height, width, scales, max_distort):
    augmentation = MultiScaleCrop((7, 5), scales, max_distort)
    (x, y, w, h), image = crop_of(augmentation, height, width)
    assert image.shape == (7, 5, 3)
    assert 0 <= x <= x + w <= width
    assert 0 <= y <= y + h <= height
    shorter = min(height, width)
    places = [
        (i, j)
        for i, scale_h in enumerate(scales)
        for j, scale_w in enumerate(scales)
        if (h, w) == (max(1, round(shorter * scale_h)), max(1, round(shorter * scale_w)))
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
    with pytest.raises(ValueError, match="SCALES"):
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
