"""From a data set dict to a sample: reading, both views, and boxes."""

import copy
import io
import os
import pickle
import re
import struct
import warnings

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from ia_gcn import add_ia_gcn_config
from ia_gcn.data import (
    Cutout,
    MultiLabelDatasetMapper,
    MultiScaleCrop,
    RandAugment,
    RandomResizedCrop,
    UnreadableImage,
)
from ia_gcn.data.build import TrainingSamples
from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.errors import InputError
from ia_gcn.io import images
from ia_gcn.io.images import decode_upright_jpeg
from tests.helpers.images import GREY, IMAGES, JPEGS, UNREADABLE, jpeg_bytes, ramp


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
    """An image of 30×20 random pixels: (path, pixels (20, 30, 3))."""
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
    keys = {"file_name", "image_id", "extra", "height", "width", "image", "labels"}
    assert set(sample) == (keys if is_train else {*keys, "window"})
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


def test_the_test_view_is_the_whole_image_warped(noise):
    path, pixels = noise
    image = make_mapper()(record_of(path))["image"]
    expected = Image.fromarray(pixels).resize((48, 32), Image.BILINEAR)
    np.testing.assert_allclose(image.permute(1, 2, 0), np.asarray(expected), rtol=0, atol=1)
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
def test_the_training_view_flips_half_of_the_images(noise, flip, axis):
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


def kinds(mapper):
    return [type(augmentation) for augmentation in mapper.augmentations.augs]


def test_what_the_training_view_is_made_of():
    assert kinds(make_mapper(True)) == [MultiScaleCrop, T.RandomFlip]
    resized = {"INPUT__MULTI_SCALE_CROP__ENABLED": False, "INPUT__RANDOM_RESIZED_CROP": 0.7}
    assert kinds(make_mapper(True, **resized)) == [RandomResizedCrop, T.RandomFlip]
    with pytest.raises(InputError, match=r"RANDOM_RESIZED_CROP takes the place"):
        make_mapper(True, INPUT__RANDOM_RESIZED_CROP=0.7)
    both = {"INPUT__CUTOUT": 0.5, "INPUT__RAND_AUGMENT_OPS": 2}
    assert kinds(make_mapper(True, **both)) == [MultiScaleCrop, T.RandomFlip, Cutout, RandAugment]
    assert kinds(make_mapper(False, **both)) == kinds(make_mapper(False)) == [T.Resize]


@pytest.mark.parametrize("key", ["INPUT__CUTOUT", "INPUT__RAND_AUGMENT_OPS"])
def test_cutout_and_rand_augment_make_other_views_of_the_same_form(noise, key):
    plain = {"INPUT__MULTI_SCALE_CROP__ENABLED": False, "INPUT__RANDOM_FLIP": "none"}
    mapper = make_mapper(True, **plain, **{key: 0.5 if key == "INPUT__CUTOUT" else 2})
    expected = make_mapper()(record_of(noise[0]))["image"]
    np.random.seed(0)
    views = [mapper(record_of(noise[0]))["image"] for _ in range(20)]
    assert {(view.shape, view.dtype) for view in views} == {((3, 32, 48), torch.uint8)}
    assert sum(not torch.equal(view, expected) for view in views) > 15
    assert len({view.numpy().tobytes() for view in views}) > 15


def test_rand_augment_knows_the_channel_order(noise):
    for seed in range(10):
        views = []
        for image_format in ("RGB", "BGR"):
            np.random.seed(seed)
            mapper = make_mapper(True, INPUT__FORMAT=image_format, INPUT__RAND_AUGMENT_OPS=4)
            views.append(mapper(record_of(noise[0]))["image"])
        assert torch.equal(views[0], views[1].flip(0))


def test_a_view_is_a_function_of_the_place_in_the_stream(noise):
    mapper = make_mapper(True, INPUT__CUTOUT=0.5, INPUT__RAND_AUGMENT_OPS=2)
    samples = TrainingSamples([record_of(noise[0])], mapper, seed=3)

    def views(places):
        return {place: samples[place, 0]["image"].numpy().tobytes() for place in places}

    first = views(range(8))
    torch.manual_seed(5)
    assert views(reversed(range(8))) == first
    assert len(set(first.values())) == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.CUTOUT", -0.1),
        ("INPUT.CUTOUT", 1.0),
        ("INPUT.CUTOUT", float("nan")),
        ("INPUT.RAND_AUGMENT_OPS", -1),
        ("INPUT.RAND_AUGMENT_MAGNITUDE", -1),
        ("INPUT.RAND_AUGMENT_MAGNITUDE", 31),
        ("INPUT.MULTI_SCALE_CROP.SCALES", (1.1,)),
    ],
)
def test_numbers_out_of_range_are_refused(error_line, key, value):
    keys = {"INPUT__RAND_AUGMENT_OPS": 2, key.replace(".", "__"): value}
    assert key in error_line(lambda: make_mapper(True, **keys))


@pytest.mark.parametrize("key", ["INPUT__WITH_BOXES", "MODEL__LOAD_PROPOSALS"])
def test_rand_augment_is_refused_where_boxes_would_have_to_follow(error_line, key):
    keys = {"INPUT__RAND_AUGMENT_OPS": 2, key: True}
    assert "INPUT.RAND_AUGMENT_OPS" in error_line(lambda: make_mapper(True, **keys))
    assert kinds(make_mapper(False, **keys)) == [T.Resize]


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


def test_cutout_leaves_boxes_where_they_are(noise):
    box = {"bbox": [2, 3, 10, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    samples = []
    for cutout in (0.0, 0.6):
        np.random.seed(1)
        mapper = make_mapper(True, INPUT__WITH_BOXES=True, INPUT__CUTOUT=cutout)
        samples.append(mapper(record_of(noise[0], annotations=[box])))
    plain, cut = samples
    assert len(plain["instances"]) == 1
    assert torch.equal(cut["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
    assert not torch.equal(cut["image"], plain["image"])


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


# ------------------------------------------------------------------------------ kinds of images


def put_last(path):
    """Move a PNG's EXIF, which Pillow puts before the pixels, behind them."""
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    trailer = content.index(b"IEND") - 4
    parts = (content[:start], content[end:trailer], content[start:end], content[trailer:])
    path.write_bytes(b"".join(parts))


@pytest.mark.parametrize("name", ["camera.jpg", "camera.png", "late.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation, name):
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
    path = tmp_path / name
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    if name == "late.png":
        put_last(path)
    sample = make_mapper(INPUT__IMAGE_SIZE=(24, 40))(record_of(path))
    assert (sample["height"], sample["width"]) == (24, 40)
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0), upright, atol=6)


@pytest.mark.parametrize(
    "exif",
    [b"", b"Exif\0\0", b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12"],
)
@pytest.mark.parametrize("name", ["camera.jpg", "camera.png", "late.png", "camera.webp"])
def test_an_image_with_damaged_exif_is_upright(tmp_path, name, exif):
    path = tmp_path / name
    GREY.convert("RGB").save(path)
    expected = read_image(str(path))
    GREY.convert("RGB").save(path, exif=exif)
    if name == "late.png" and exif:
        put_last(path)
    np.testing.assert_array_equal(read_image(str(path)), expected)


def test_pixels_that_are_missing_are_no_damaged_exif(tmp_path):
    """EXIF behind the pixels is looked for after they are read, which must not be tried twice."""
    path = tmp_path / "cut.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=b"garbage")
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UnreadableImage):
        read_image(str(path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
def test_an_image_of_several_strips_is_that_of_one(monkeypatch, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (31, 20, 3), dtype=np.uint8))
    if mode in ("I", "I;16", "F"):
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        image = Image.fromarray(rng.integers(0, 70_000, (31, 20)).astype(kind))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    expected = images.convert_image(image, "RGB")
    monkeypatch.setattr(images, "STRIP", 90)
    np.testing.assert_array_equal(images.convert_image(image, "RGB"), expected)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("is_train", [False, True])
def test_every_kind_of_image_becomes_rgb(tmp_path, name, is_train):
    IMAGES[name].save(tmp_path / name)
    sample = make_mapper(is_train)(record_of(tmp_path / name))
    assert sample["image"].shape == (3, 32, 48)
    assert sample["image"].dtype == torch.uint8


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_keeps_its_greys(tmp_path, name):
    IMAGES[name].save(tmp_path / name)
    image = make_mapper(INPUT__IMAGE_SIZE=(20, 30))(record_of(tmp_path / name))["image"].float()
    expected = torch.from_numpy(ramp(np.float32, 255))
    if name == "black and white.png":  # dithered
        assert set(image.unique().tolist()) == {0, 255}
        image, expected = image.mean(1), expected.mean(0)
        torch.testing.assert_close(image[0], expected, atol=40, rtol=0)
    else:
        torch.testing.assert_close(image, expected.expand(3, -1, -1), atol=8, rtol=0)


def write_large(path):
    """108 million pixels: more than Pillow warns of, fewer than it refuses."""
    Image.new("RGB", (12000, 9000), (200, 90, 40)).save(path)


def write_transparent_palette(path):
    GREY.convert("P").save(path, transparency=bytes(range(256)))


WARNED_OF = {
    "large.jpg": (write_large, (9000, 12000, 3)),
    "transparent.png": (write_transparent_palette, (20, 30, 3)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WARNED_OF)
def test_what_pillow_warns_of_is_read_in_silence(tmp_path, name):
    write, shape = WARNED_OF[name]
    write(tmp_path / name)
    pixels = read_image(str(tmp_path / name))
    assert (pixels.shape, pixels.dtype) == (shape, np.uint8)


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("is_train", [False, True])
def test_unreadable_files_are_named(tmp_path, name, is_train):
    path = tmp_path / name
    UNREADABLE[name](path)
    with pytest.raises(UnreadableImage, match=re.escape(str(path))) as caught:
        make_mapper(is_train)(record_of(path))
    assert caught.value.file_name == str(path)
    assert caught.value.reason


def read_both(path, content):
    """What we and Pillow make of a file of these bytes; None where it can't be read."""
    path.write_bytes(content)
    try:
        ours = read_image(str(path))
    except UnreadableImage:
        ours = None
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            pillows = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        pillows = None
    return ours, pillows


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(45, 37), (1, 1), (640, 3)])
def test_a_jpegs_pixels_are_pillows(tmp_path, kind, size):
    ours, pillows = read_both(tmp_path / "photo.jpg", jpeg_bytes(size, **JPEGS[kind]))
    np.testing.assert_array_equal(ours, pillows)
    assert ours.flags.c_contiguous
    with Image.open(tmp_path / "photo.jpg") as image:
        # It is not Pillow that has decoded them.
        np.testing.assert_array_equal(decode_upright_jpeg(image, "RGB"), pillows)


def test_what_follows_a_jpeg_in_its_file_is_not_read_to_the_end(tmp_path):
    content = jpeg_bytes()
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    os.truncate(path, 2**40)  # a terabyte of nothing
    np.testing.assert_array_equal(read_image(str(path)), Image.open(io.BytesIO(content)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(JPEGS)),
    cuts=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 20), st.binary(max_size=20)), max_size=4
    ),
    end=st.floats(0, 2),
)
def test_a_damaged_jpeg_is_what_pillow_makes_of_it(tmp_path, kind, cuts, end):
    content = jpeg_bytes(**JPEGS[kind])
    content = content[: round(end * len(content))]
    for place, length, instead in cuts:
        place = round(place * len(content))
        content = content[:place] + instead + content[place + length :]
    ours, pillows = read_both(tmp_path / "photo.jpg", content)
    assert (ours is None) == (pillows is None)
    if ours is not None:
        np.testing.assert_array_equal(ours, pillows)


def test_an_unreadable_image_can_leave_a_worker_process():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "no image")))
    assert (error.file_name, error.reason, str(error)) == (
        "a.jpg",
        "no image",
        "a.jpg: no image",
    )
