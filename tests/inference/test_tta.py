"""Test-time augmentation: the views of an image, and what a model says of them together."""

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from ia_gcn.data import MultiLabelDatasetMapper, UnreadableImage, get_multilabel_dicts
from ia_gcn.data.test_time_views import DatasetMapperTTA
from ia_gcn.engine import Trainer
from ia_gcn.inference import MultiLabelTTA

SINGLE = ("TEST.AUG.ENABLED", True, "TEST.AUG.FLIP", False)
SEVERAL = ("TEST.AUG.ENABLED", True, "TEST.AUG.SCALES", (1.0, 0.5, 1.6))


@pytest.fixture
def record(tmp_path):
    """The dict of an image of noise, 50×30 pixels, with two proposals."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return {
        "file_name": str(tmp_path / "noise.png"),
        "image_id": 7,
        "labels": [0],
        "ignored_labels": [2],
        "proposal_boxes": np.array([[5, 3, 25, 30], [0, 0, 50, 15]], np.float32),
        "proposal_objectness_logits": np.array([2.0, 1.0], np.float32),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }


def test_views_are_warped_from_the_file(make_cfg, record):
    sample = DatasetMapperTTA(make_cfg("run", *SEVERAL))(record)
    image = Image.open(record["file_name"])
    expected = []
    for side in (32, 16, 51):
        warped = np.asarray(image.resize((side, side), Image.BILINEAR))
        expected += [warped, warped[:, ::-1]]
    assert len(sample["views"]) == len(expected)
    for view, pixels in zip(sample["views"], expected):
        assert view["image"].dtype == torch.uint8
        np.testing.assert_allclose(view["image"].permute(1, 2, 0), pixels, rtol=0, atol=1)


def test_views_of_a_centre_crop(make_cfg, record):
    cfg = make_cfg("run", *SEVERAL, "INPUT.CENTER_CROP", 0.8)
    sample = DatasetMapperTTA(cfg)(record)
    image, boxes = Image.open(record["file_name"]), record["proposal_boxes"]
    # Side of the view, of the image that it is cut out of, and where.
    sizes = [(32, 40, 4), (16, 20, 2), (51, 64, 6)]
    for plain, mirrored, (side, whole, start) in zip(
        sample["views"][::2], sample["views"][1::2], sizes
    ):
        warped = np.asarray(image.resize((whole, whole), Image.BILINEAR))
        expected = warped[start : start + side, start : start + side]
        np.testing.assert_array_equal(plain["image"].permute(1, 2, 0), expected)
        np.testing.assert_array_equal(mirrored["image"].permute(1, 2, 0), expected[:, ::-1])
        scaled = boxes * np.array([whole / 50, whole / 30] * 2, np.float32) - start
        found = plain["proposals"].proposal_boxes.tensor
        np.testing.assert_allclose(found, scaled.clip(0, side), rtol=1e-5, atol=1e-5)


def test_the_rest_of_a_sample_is_as_without(make_cfg, record):
    cfg = make_cfg("run", *SEVERAL)
    plain = MultiLabelDatasetMapper(cfg, is_train=False)(record)
    sample = DatasetMapperTTA(cfg)(record)
    assert sample.keys() - {"views"} == plain.keys() - {"image", "window", "proposals"}
    assert sample["labels"].tolist() == plain["labels"].tolist() == [1, 0, -1]
    for key in ("image_id", "file_name", "height", "width"):
        assert sample[key] == plain[key]
    assert torch.equal(sample["views"][0]["image"], plain["image"])
    assert "proposal_boxes" in record


def test_proposals_go_with_the_view(make_cfg, record):
    sample = DatasetMapperTTA(make_cfg("run", *SEVERAL))(record)
    boxes = record["proposal_boxes"]
    for view, side in zip(sample["views"][::2], (32, 16, 51)):
        scaled = boxes * np.array([side / 50, side / 30] * 2, np.float32)
        assert view["proposals"].image_size == (side, side)
        np.testing.assert_allclose(view["proposals"].proposal_boxes.tensor, scaled, rtol=1e-5)
    for view, side in zip(sample["views"][1::2], (32, 16, 51)):
        x0, y0, x1, y1 = (boxes * np.array([side / 50, side / 30] * 2, np.float32)).T
        mirrored = np.stack([side - x1, y0, side - x0, y1], axis=1)
        np.testing.assert_allclose(view["proposals"].proposal_boxes.tensor, mirrored, atol=1e-4)
        assert view["proposals"].objectness_logits.tolist() == [2, 1]


def test_an_unreadable_image_is_named(make_cfg, record):
    mapper = DatasetMapperTTA(make_cfg("run", *SEVERAL))
    with pytest.raises(UnreadableImage, match=r"gone\.png"):
        mapper({**record, "file_name": "gone.png"})


@pytest.mark.parametrize("scales", [(), (1.0, 0), (-1.0,), ("large",), (float("nan"),), (1e9,)])
def test_scales_that_are_none_are_refused(make_cfg, error_line, scales):
    cfg = make_cfg("run")
    cfg.defrost()
    cfg.TEST.AUG.SCALES = scales
    assert "TEST.AUG.SCALES" in error_line(DatasetMapperTTA, cfg)


class Brightness(nn.Module):
    """Three logits that tell views apart: the mean, the first column's mean, and the height."""

    def forward(self, batched_inputs):
        images = [x["image"].float() / 255 for x in batched_inputs]
        assert len({image.shape for image in images}) == 1
        rows = [torch.stack([i.mean(), i[..., 0].mean(), i.new_tensor(i.shape[1])]) for i in images]
        return [{"logits": row, "scores": row.sigmoid(), "regions": None} for row in rows]


def test_it_is_the_mean_of_the_logits_over_the_views(make_cfg, record):
    sample = DatasetMapperTTA(make_cfg("run", *SEVERAL))(record)
    outputs = MultiLabelTTA(Brightness())([sample])
    assert len(outputs) == 1
    assert outputs[0].keys() == {"scores", "logits"}
    expected = np.zeros(3)
    for view in sample["views"]:
        pixels = view["image"].numpy() / 255
        expected += np.array([pixels.mean(), pixels[:, :, 0].mean(), pixels.shape[1]]) / 6
    np.testing.assert_allclose(outputs[0]["logits"], expected, rtol=1e-5)
    np.testing.assert_allclose(outputs[0]["scores"], 1 / (1 + np.exp(-expected)), rtol=1e-5)


def build_model(cfg):
    """A model with random weights and a label graph that says something."""
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    if model.label_graph is not None:
        graph = model.label_graph
        counts = torch.tensor([[8, 4, 3], [4, 8, 5], [3, 5, 8]])
        graph.fill(counts.diagonal(), counts, torch.randn_like(graph.embeddings))
    return model


@torch.no_grad()
def test_neither_the_batch_nor_a_mirror_makes_a_difference(make_cfg):
    cfg = make_cfg("run", *SEVERAL)
    model = MultiLabelTTA(build_model(cfg))
    samples = [DatasetMapperTTA(cfg)(d) for d in get_multilabel_dicts(cfg.DATASETS.TEST)[:4]]
    together = torch.stack([output["logits"] for output in model(samples)])
    alone = torch.stack([model([sample])[0]["logits"] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    mirrored = [
        {"views": [{"image": view["image"].flip(-1)} for view in sample["views"]]}
        for sample in samples
    ]
    of_mirrors = torch.stack([output["logits"] for output in model(mirrored)])
    torch.testing.assert_close(together, of_mirrors, rtol=1e-5, atol=1e-5)
    plain = MultiLabelDatasetMapper(cfg, is_train=False)
    first = model.model([plain(get_multilabel_dicts(cfg.DATASETS.TEST)[0])])[0]["logits"]
    assert (first - together[0]).abs().max() > 1e-3


def scores_of(cfg):
    with np.load(f"{cfg.OUTPUT_DIR}/inference/custom_test/predictions.npz") as predictions:
        return predictions["scores"]


@pytest.mark.parametrize("config", ["ml_gcn", "ia_gcn"])
def test_one_view_is_exactly_plain_evaluation(make_cfg, config):
    plain, single = make_cfg("plain", config=config), make_cfg("single", *SINGLE, config=config)
    several = make_cfg("several", *SEVERAL, config=config)
    model = build_model(plain)
    for cfg in (plain, single, several):
        Trainer.test(cfg, model)
    np.testing.assert_array_equal(scores_of(single), scores_of(plain))
    assert np.abs(scores_of(several) - scores_of(plain)).max() > 1e-5


def test_evaluation_during_training_stays_plain(make_cfg):
    cfg = make_cfg("run", *SEVERAL)
    trainer = Trainer(cfg)
    trainer.evaluate()
    plain = make_cfg("plain")
    Trainer.test(plain, trainer.model)
    np.testing.assert_array_equal(scores_of(cfg), scores_of(plain))
    assert trainer.cfg.TEST.AUG.ENABLED
