"""The same pixels of the same file: in evaluation, in a predictor, and of an exported model."""

import io
import itertools

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from ia_gcn.data import MultiLabelDatasetMapper
from ia_gcn.data.augmentation import INTERPOLATIONS
from ia_gcn.data.test_time_views import DatasetMapperTTA
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.export import describe
from ia_gcn.inference import EvaluationView
from ia_gcn.inference.onnx_predictor import ImageView
from tests.helpers.images import IMAGES, JPEGS, jpeg_bytes

# Height, width, channel order and share of the image of models' inputs: images are shrunk much, a
# little, or enlarged.
INPUTS = [
    ((48, 64), "RGB", "bicubic", 1.0),
    ((171, 256), "BGR", "bilinear", 0.9),
    ((500, 300), "RGB", "bilinear", 1.0),
    ((63, 32), "RGB", "bicubic", 0.7),
]


def photo(size, **options):
    """A piece of a photo, (width, height), as bytes of a file; options are those of `save`."""
    file = io.BytesIO()
    image = Image.fromarray(load_sample_images().images[0]).resize(size, Image.Resampling.BICUBIC)
    image.save(file, **options)
    return file.getvalue()


def write_files(folder):
    """Files of all kinds: their paths."""
    contents = {f"{i} {kind}.jpg": jpeg_bytes(**o) for i, (kind, o) in enumerate(JPEGS.items())}
    for size in [(640, 427), (299, 448), (30, 200), (1, 1)]:
        for kind in ("jpeg", "png", "webp", "bmp"):
            contents[f"{size}.{kind}"] = photo(size, format=kind)
    for orientation, kind in itertools.product(range(1, 9), ("jpeg", "png", "webp", "tiff")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        contents[f"turned {orientation}.{kind}"] = photo((60, 41), format=kind, exif=exif)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name, image in IMAGES.items():
        image.save(folder / name)
    return sorted(folder.iterdir())


def build_views(size, image_format, interpolation="bilinear", center_crop=1.0):
    """The config, the view of a checkpoint's predictor, and that of an exported model."""
    opts = ["INPUT.IMAGE_SIZE", size, "INPUT.FORMAT", image_format, "MODEL.DEVICE", "cpu"]
    opts += ["INPUT.INTERPOLATION", interpolation, "INPUT.CENTER_CROP", center_crop]
    cfg = setup_cfg("configs/DigitScenes/asl.yaml", opts)
    # As an exported file has it.
    return cfg, EvaluationView(cfg), ImageView(describe(cfg, ["cat"])["preprocessing"])


@pytest.mark.parametrize(("size", "image_format", "interpolation", "center_crop"), INPUTS)
def test_all_views_of_a_file_are_identical(
    repository, monkeypatch, tmp_path, size, image_format, interpolation, center_crop
):
    monkeypatch.chdir(repository)
    cfg, view, exported_view = build_views(size, image_format, interpolation, center_crop)
    resized = [round(side / center_crop) for side in size]
    cut_out = torchvision.transforms.CenterCrop(size)
    cfg.TEST.AUG.SCALES, cfg.TEST.AUG.FLIP = (1.0,), False
    mapper, views_mapper = MultiLabelDatasetMapper(cfg, is_train=False), DatasetMapperTTA(cfg)
    files = write_files(tmp_path)
    assert len(files) > 60
    for file in files:
        found, exported = view(file), exported_view(file)
        assert found["image"].shape == (3, *size)
        assert exported["image"].dtype == np.uint8
        np.testing.assert_array_equal(exported["image"], found["image"], str(file))
        assert [found[key] for key in ("height", "width")] == [
            exported[key] for key in ("height", "width")
        ]
        record = {"file_name": str(file), "image_id": 0, "labels": []}
        evaluated, (one_view,) = mapper(record), views_mapper(record)["views"]
        np.testing.assert_array_equal(exported["image"], evaluated["image"], str(file))
        np.testing.assert_array_equal(found["window"], evaluated["window"])
        np.testing.assert_allclose(found["window"], exported["window"], atol=1e-9)
        np.testing.assert_array_equal(exported["image"], one_view["image"], str(file))
        with Image.open(file) as image:
            if not image.mode.startswith(("I", "F")):
                # Pillow's own, apart from the greys that it can't scale.
                pillows = ImageOps.exif_transpose(image).convert("RGB")
                pillows = pillows.resize(resized[::-1], INTERPOLATIONS[interpolation])
                pillows = np.asarray(cut_out(pillows))
                order = [2, 1, 0] if image_format == "BGR" else [0, 1, 2]
                expected = pillows.transpose(2, 0, 1)[order]
                np.testing.assert_array_equal(exported["image"], expected, str(file))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, [0, 0, 300, 200]),
        # 64×32 is row 4 of 40 and column 8 of 80.
        (0.8, [30, 20, 270, 180]),
        # Of 91×46, from row 7 and, as 13.5 is rounded to even, column 14.
        (0.7, [300 * 14 / 91, 200 * 7 / 46, 300 * 78 / 91, 200 * 39 / 46]),
    ],
)
def test_the_window_is_what_the_view_shows_of_the_image(repository, monkeypatch, share, expected):
    monkeypatch.chdir(repository)
    for view in build_views((32, 64), "RGB", center_crop=share)[1:]:
        window = view(np.zeros((200, 300, 3), np.uint8))["window"]
        np.testing.assert_allclose(window, expected, atol=1e-9)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_every_source_of_an_image_gives_the_same(repository, monkeypatch, tmp_path, image_format):
    monkeypatch.chdir(repository)
    _, view, exported_view = build_views((48, 64), image_format)
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo((200, 150), format="jpeg"))
    expected = view(path)["image"]
    with open(path, "rb") as file, Image.open(path) as image, Image.open(path) as twin:
        pixels = np.asarray(image.convert("RGB"))
        for source in (str(path), file, io.BytesIO(path.read_bytes()), image, twin, pixels):
            for look in (view, exported_view):
                np.testing.assert_array_equal(look(source)["image"], expected)


def test_without_simplejpeg_pillow_decodes(repository, monkeypatch, tmp_path):
    """The same pixels, for an exported model where there is little installed."""
    monkeypatch.chdir(repository)
    _, view, exported_view = build_views((48, 64), "RGB")
    files = write_files(tmp_path)
    expected = [view(file)["image"] for file in files]
    monkeypatch.setattr("ia_gcn.io.images.simplejpeg", None)
    for file, pixels in zip(files, expected):
        np.testing.assert_array_equal(exported_view(file)["image"], pixels, str(file))


@pytest.mark.parametrize("source", [None, b"bytes", 5, np.zeros((4, 4), np.uint8)])
def test_other_sources_are_refused(repository, monkeypatch, source):
    monkeypatch.chdir(repository)
    for view in build_views((48, 64), "RGB")[1:]:
        with pytest.raises(InputError, match="an image is"):
            view(source)


def test_an_unknown_interpolation_is_refused(repository, monkeypatch, error_line):
    monkeypatch.chdir(repository)
    message = error_line(build_views, (48, 64), "RGB", "nearest")
    assert "INPUT.INTERPOLATION must be bilinear or bicubic, not 'nearest'" in message
