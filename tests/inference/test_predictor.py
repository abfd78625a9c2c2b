"""MultiLabelPredictor: weights alone are enough, and what it says is what evaluation says."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ia_gcn import MultiLabelPredictor
from ia_gcn.data import UnreadableImage
from ia_gcn.errors import InputError
from ia_gcn.inference import Prediction
from tests.helpers.checkpoints import COLOURS, change, evaluate, save_checkpoint
from tests.helpers.images import IMAGES, UNREADABLE, ramp
from tools.tortures.harness import Limits, run_in_child


@pytest.fixture
def make_checkpoint(make_cfg):
    """`save_checkpoint` with its first argument."""
    return partial(save_checkpoint, make_cfg)


# ------------------------------------------------------------------------------------ what it says


def test_three_lines(make_checkpoint, tmp_path, monkeypatch):
    make_checkpoint()
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "run" / "photo.jpg")
    monkeypatch.chdir(tmp_path / "run")
    p = MultiLabelPredictor(weights="model.pth")
    prediction = p("photo.jpg")
    assert prediction.labels == p.label_names == COLOURS
    assert prediction.scores.shape == (3,)
    assert prediction.scores.dtype == np.float32
    assert prediction.regions is None


def test_a_model_in_memory_predicts_as_its_checkpoint(make_checkpoint):
    weights, cfg, model = make_checkpoint()
    model.train()
    p = MultiLabelPredictor(model=model, label_names=COLOURS, cfg=cfg)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = MultiLabelPredictor(weights=weights, device="cpu")(image)
    assert p(image).labels == COLOURS
    np.testing.assert_allclose(p(image).scores, expected.scores, rtol=0, atol=1e-6)


def test_it_takes_weights_or_a_model_with_what_belongs_to_it(make_checkpoint):
    _, cfg, model = make_checkpoint()
    for arguments in ({}, {"model": model}, {"model": model, "cfg": cfg}):
        with pytest.raises(TypeError, match="weights, or model, label_names and cfg"):
            MultiLabelPredictor(**arguments)


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("ml_gcn", ()),
        ("ml_gcn", ("INPUT.FORMAT", "BGR")),
        ("asl", ("TEST.IMS_PER_BATCH", 5)),
        ("ml_agcn", ("MODEL.LABEL_EMBEDDINGS.SOURCE", "names", "MODEL.LABEL_EMBEDDINGS.DIM", 7)),
        ("ml_decoder", ("MODEL.ML_DECODER.QUERIES", "learned")),
        ("query2label", ()),
        ("ia_gcn_plus", ("MODEL.REGION_BRANCH.EVAL_SAMPLES", 3)),
        ("ia_gcn_plus", ("TEST.IMS_PER_BATCH", 4)),
    ],
)
def test_prediction_equals_evaluation(make_checkpoint, tmp_path, monkeypatch, config, opts):
    """With neither the data set nor the label embeddings there, from another folder."""
    weights, cfg, model = make_checkpoint(
        *opts, config=config, saved=("MODEL.LABEL_EMBEDDINGS.SOURCE", "gone.txt")
    )
    expected, files = evaluate(cfg, model)
    assert len(np.unique(expected)) > 30
    os.remove(cfg.DATASETS.CUSTOM.TEST)
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("custom_train", "custom_test"):
            catalog.remove(name)
    monkeypatch.chdir(tmp_path)

    p = MultiLabelPredictor(weights=weights, device="cpu")
    together = p.predict_batch(files)
    np.testing.assert_allclose([x.scores for x in together], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(p(files[3]).scores, expected[3], rtol=0, atol=1e-6)
    assert "custom_test" not in DatasetCatalog.list()


def test_a_model_is_optimised_and_in_bf16_as_asked(make_checkpoint):
    weights, _, _ = make_checkpoint()
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    optimised, plain, low = (
        MultiLabelPredictor(weights, device="cpu", **options)
        for options in ({}, {"optimize": False}, {"precision": "bf16"})
    )
    assert optimised.model.backbone.stem.conv1.norm is None
    assert plain.model.backbone.stem.conv1.norm is not None
    expected = plain(image).scores
    np.testing.assert_allclose(optimised(image).scores, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(low(image).scores, expected, rtol=0, atol=0.02)
    assert (low(image).scores != expected).any()


def test_regions_are_those_of_the_model_in_the_images_pixels(make_checkpoint, tmp_path):
    weights, _, model = make_checkpoint(config="ia_gcn_plus")
    p = MultiLabelPredictor(weights, device="cpu")
    # Held upright, it is 32 pixels wide and 48 high; the model gets 64 × 96.
    upright = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    regions = p(tmp_path / "turned.png").regions

    doubled = Image.fromarray(upright).resize((64, 96), Image.BILINEAR)
    image = torch.tensor(np.asarray(doubled)).permute(2, 0, 1)
    with torch.no_grad():
        expected = model([{"image": image}])[0]["regions"]
    assert len(regions.boxes) == len(expected) > 5
    for values, shape in zip(regions, [(4,), (), (3,)]):
        assert values.shape == (len(expected), *shape)
        assert values.dtype == np.float32
    np.testing.assert_allclose(2 * regions.boxes, expected.proposal_boxes.tensor, atol=1e-3)
    np.testing.assert_allclose(regions.weights, expected.weights, atol=1e-6)
    np.testing.assert_allclose(regions.scores, expected.scores, atol=1e-6)
    assert (regions.boxes[:, 2:] <= (32, 48)).all()


def test_regions_of_a_centre_crop_are_in_the_whole_images_pixels(make_checkpoint):
    weights, _, model = make_checkpoint("INPUT.CENTER_CROP", 0.8, config="ia_gcn_plus")
    p = MultiLabelPredictor(weights, device="cpu")
    # The model gets 64×96 pixels, from the eighth column and the twelfth row of 80×120.
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    regions = p(pixels).regions
    doubled = np.asarray(Image.fromarray(pixels).resize((80, 120), Image.BILINEAR))
    image = torch.tensor(doubled[12:108, 8:72]).permute(2, 0, 1)
    with torch.no_grad():
        expected = model([{"image": image}])[0]["regions"]
    assert len(regions.boxes) == len(expected) > 5
    boxes = 2 * regions.boxes - (8, 12, 8, 12)
    np.testing.assert_allclose(boxes, expected.proposal_boxes.tensor, atol=1e-3)


def test_a_file_an_array_and_a_pillow_image_are_the_same(make_checkpoint, tmp_path):
    p = MultiLabelPredictor(make_checkpoint("INPUT.FORMAT", "BGR")[0])
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, size, dtype=np.uint8) for size in [(9, 60, 3), (50, 7, 3)]]
    for i, array in enumerate(pixels):
        path = tmp_path / f"{i}.png"
        Image.fromarray(array).save(path)
        kinds = [str(path), path, array, Image.fromarray(array)]
        scores = [x.scores for x in p.predict_batch(kinds)]
        np.testing.assert_allclose(scores, scores[:1] * 4, rtol=0, atol=1e-6)
        channels_swapped = p(np.ascontiguousarray(array[:, :, ::-1])).scores
        assert abs(channels_swapped - scores[0]).max() > 1e-4
    both = [x.scores for x in p.predict_batch(pixels)]
    np.testing.assert_allclose(both, [p(array).scores for array in pixels], rtol=0, atol=1e-6)
    assert p.predict_batch([]) == []


def test_every_kind_of_image(make_checkpoint, tmp_path):
    p = MultiLabelPredictor(make_checkpoint()[0])
    grey = ramp(np.uint8, 255)
    dithered = np.asarray(IMAGES["black and white.png"]).astype(np.uint8) * 255
    expected, other, black_and_white = (
        p(np.stack([pixels] * 3, axis=2)).scores for pixels in (grey, grey[:, ::-1], dithered)
    )
    assert abs(other - expected).max() > 0.02
    for name, image in IMAGES.items():
        image.save(tmp_path / name)
        scores = p(tmp_path / name).scores
        likewise = black_and_white if name == "black and white.png" else expected
        np.testing.assert_allclose(scores, likewise, rtol=0, atol=0.01)
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(p(opened).scores, scores)
    exif = Image.Exif()
    exif[0x0112] = 3
    IMAGES["16 bit.png"].save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_allclose(p(tmp_path / "turned.png").scores, other, rtol=0, atol=0.01)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_smallest_and_a_large_image(make_checkpoint, tmp_path):
    p = MultiLabelPredictor(make_checkpoint(config="ia_gcn_plus")[0])
    for size in [(1, 1), (12000, 9000)]:
        # A grey that a JPEG keeps to the bit.
        Image.new("RGB", size, (128, 128, 128)).save(tmp_path / "plain.jpg")
        prediction = p(tmp_path / "plain.jpg")
        plain = p(np.full((96, 64, 3), 128, np.uint8))
        np.testing.assert_allclose(prediction.scores, plain.scores, rtol=0, atol=1e-6)
        scaled = plain.regions.boxes * np.tile(np.divide(size, (64, 96)), 2)
        np.testing.assert_allclose(prediction.regions.boxes, scaled, rtol=1e-4, atol=1e-6)


def test_above():
    prediction = Prediction(list("abcd"), np.array([0.5, 0.9, 0.2, 0.5], np.float32), None)
    half, nine = 0.5, float(np.float32(0.9))
    assert prediction.above() == [("b", nine), ("a", half), ("d", half)]
    assert prediction.above(0.500001) == [("b", nine)]
    # What is 0.9 in float32 is a little less than 0.9.
    assert prediction.above(0.9) == []
    assert [name for name, _ in prediction.above(0)] == list("badc")
    assert [name for name, _ in prediction.above(0, top_k=2)] == list("ba")
    assert [name for name, _ in prediction.above(np.array([0.6, 0, 0.1, 0.5]))] == list("bdc")


# ------------------------------------------------------------------------------------ its settings


def test_options_come_after_the_config(make_checkpoint):
    weights, cfg, model = make_checkpoint(config="ia_gcn_plus")
    assert cfg.MODEL.FUSION.GLOBAL_WEIGHT == 0.8
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    p = MultiLabelPredictor(weights, opts=["MODEL.FUSION.GLOBAL_WEIGHT", 0.25])
    with torch.no_grad():
        result = model([{"image": torch.tensor(image).permute(2, 0, 1)}])[0]
    fused = 0.25 * result["logits_global"] + 0.75 * result["logits_region"]
    np.testing.assert_allclose(p(image).scores, fused.sigmoid(), rtol=0, atol=1e-6)
    assert p.cfg.is_frozen()
    assert not p.model.training
    assert not any(parameter.requires_grad for parameter in p.model.parameters())


def test_a_config_file_takes_the_place_of_the_checkpoints(make_checkpoint, tmp_path, error_line):
    weights, cfg, model = make_checkpoint()
    expected, files = evaluate(cfg, model)
    # Its data set and its embeddings are not there.
    text = cfg.dump().replace(cfg.DATASETS.CUSTOM.TRAIN, "gone.json")
    (tmp_path / "model.yaml").write_text(text)
    change(weights, config=None)
    assert "config_file (--config-file)" in error_line(MultiLabelPredictor, weights)
    p = MultiLabelPredictor(weights, config_file=str(tmp_path / "model.yaml"))
    scores = [x.scores for x in p.predict_batch(files)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def test_the_ema_of_the_weights(make_checkpoint, error_line):
    weights, _, model = make_checkpoint()
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    ema = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    ema["module.label_head.layers.1.weight"] *= 3
    with pytest.raises(InputError, match="no EMA of the weights"):
        MultiLabelPredictor(weights, ema=True)
    change(weights, ema=ema)
    plain, mean = (MultiLabelPredictor(weights, ema=ema)(image).scores for ema in (False, True))
    # The last layer has no bias: its logits triple.
    np.testing.assert_allclose(logit(mean), 3 * logit(plain), rtol=1e-3)


def logit(scores):
    return np.log(scores.astype(np.float64) / (1 - scores.astype(np.float64)))


# ----------------------------------------------------------------------------------------- refusals


def test_a_config_that_would_run_code_is_refused(make_checkpoint, tmp_path, error_line):
    weights, cfg, _ = make_checkpoint()
    witness = tmp_path / "witness"
    for tag in ("python/object/apply:os.mkdir", "python/object/new:os.mkdir"):
        text = f"{cfg.dump()}\nBIAS: !!{tag} [{witness}]\n"
        change(weights, config=text)
        assert weights in error_line(MultiLabelPredictor, weights)
        (tmp_path / "model.yaml").write_text(text)
        with pytest.raises(InputError, match=r"model\.yaml"):
            MultiLabelPredictor(weights, config_file=str(tmp_path / "model.yaml"))
    assert not witness.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("MODEL: {NO_SUCH_KEY: 1}", "NO_SUCH_KEY"),
        ("MODEL: {META_ARCHITECTURE: NoSuchNet}", "NoSuchNet"),
        ("_BASE_: /etc/hostname", "_BASE_"),
        ("INPUT: {IMAGE_SIZE: large}", "IMAGE_SIZE"),
        ("MODEL: 5", "config"),
        ("just text", "config"),
        ("a: [", "config"),
        ("[" * 1000, "config"),
        (5, "config"),
        ("", "has no config"),
    ],
)
def test_a_config_that_can_not_be_used_is_one_line(make_checkpoint, error_line, config, message):
    weights, *_ = make_checkpoint()
    change(weights, config=config)
    assert message in error_line(MultiLabelPredictor, weights)


@pytest.mark.parametrize("names", [None, [], "red", [1, 2, 3]])
def test_label_names_are_needed(make_checkpoint, error_line, names):
    weights, *_ = make_checkpoint()
    change(weights, label_names=names)
    line = error_line(MultiLabelPredictor, weights)
    assert weights in line
    assert "label names" in line


def test_weights_that_do_not_fit_are_refused(make_checkpoint, tmp_path, error_line):
    weights, *_ = make_checkpoint()
    # There are weights for three labels.
    change(weights, label_names=["red", "green"])
    assert "of the model's tensors" in error_line(MultiLabelPredictor, weights)
    change(weights, label_names=COLOURS)
    content = torch.load(weights, weights_only=True)["model"]
    change(weights, model={k: v for k, v in content.items() if "layers.1" not in k})
    assert "lacks 1 of the model's tensors" in error_line(MultiLabelPredictor, weights)
    (tmp_path / "text.pth").write_text("text")
    for name in ("text.pth", "none.pth"):
        with pytest.raises(InputError, match=name):
            MultiLabelPredictor(tmp_path / name)


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("ml_gcn", ("MODEL.LABEL_GCN.HIDDEN_DIMS", [10**12])),
        ("ml_gcn", ("MODEL.LABEL_GCN.HIDDEN_DIMS", [20_000, 20_000])),
        ("ml_gcn", ("MODEL.LABEL_EMBEDDINGS.DIM", 10**8)),
        ("ml_gcn", ("MODEL.RESNETS.RES2_OUT_CHANNELS", 4096)),
        ("ml_gcn", ("MODEL.RESNETS.STEM_OUT_CHANNELS", 10**7)),
        ("ia_gcn_plus", ("MODEL.RPN.CONV_DIMS", [10**6])),
        ("ia_gcn_plus", ("MODEL.REGION_GCN.HIDDEN_DIMS", [10**8, 8])),
        # Many tensors, each of which is small.
        pytest.param(
            *("ia_gcn_plus", ("MODEL.RPN.CONV_DIMS", [1] * 10_000)), marks=pytest.mark.slow
        ),
    ],
)
def test_a_config_of_an_enormous_model_is_refused_before_it_is_built(
    make_checkpoint, tmp_path, config, opts
):
    weights, *_ = make_checkpoint(config=config, saved=opts)

    def read():
        MultiLabelPredictor(weights, device="cpu")

    trial = run_in_child("config", config, read, tmp_path, Limits(seconds=600, memory=2**28))
    assert (trial.outcome, weights in trial.detail) == ("refused", True), trial.detail
    assert "asks for a model of more than" in trial.detail


def test_a_checkpoint_of_half_precision_alone_is_not_too_small(make_checkpoint):
    weights, _, model = make_checkpoint()
    change(weights, model={key: value.half() for key, value in model.state_dict().items()})
    assert MultiLabelPredictor(weights, device="cpu").label_names == COLOURS


@pytest.mark.parametrize(
    "opts", [["MODEL.NO_SUCH_KEY", 1], ["INPUT.FORMAT"], ["INPUT.IMAGE_SIZE", "x"]]
)
def test_options_that_can_not_be_used_are_named(make_checkpoint, opts):
    with pytest.raises(InputError, match=opts[0]):
        MultiLabelPredictor(make_checkpoint()[0], opts=opts)


def test_a_device_that_is_not_there_is_refused(make_checkpoint):
    weights, *_ = make_checkpoint()
    for device in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=device):
            MultiLabelPredictor(weights, device=device)


def test_a_model_on_a_file_of_proposals_is_refused(make_checkpoint):
    opts = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "INPUT.WITH_BOXES", False)
    weights, *_ = make_checkpoint(*opts, config="ia_gcn_plus")
    with pytest.raises(InputError, match="PrecomputedProposals"):
        MultiLabelPredictor(weights)


def test_scores_that_are_not_finite_are_refused(make_checkpoint):
    weights, _, model = make_checkpoint()
    with torch.no_grad():
        model.label_head.layers[1].weight[0, 0] = torch.nan
    change(weights, model=model.state_dict())
    with pytest.raises(InputError, match="not finite"):
        MultiLabelPredictor(weights)(np.zeros((5, 5, 3), np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((3, 5, 5), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(5, 5, 3),
        None,
        b"photo.jpg",
    ],
)
def test_what_is_no_image_is_refused(make_checkpoint, error_line, image):
    p = MultiLabelPredictor(make_checkpoint()[0])
    assert "an image is" in error_line(p, image)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named(make_checkpoint, tmp_path, name):
    p = MultiLabelPredictor(make_checkpoint()[0])
    path = Path(tmp_path / name)
    UNREADABLE[name](path)
    with pytest.raises(UnreadableImage) as caught:
        p(path)
    assert caught.value.file_name == str(path)
