"""Exported models: what ONNX and torch.export say is what the checkpoint says."""

import json
import os
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from ia_gcn import MultiLabelPredictor
from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.commands import export, predict
from ia_gcn.data import UnreadableImage
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.export import ExportedModel, describe, exportable, top_proposals
from ia_gcn.export.export import ENDINGS, evaluate_files, largest_difference
from ia_gcn.inference import OnnxPredictor
from ia_gcn.inference.onnx_predictor import ImageView
from tests.helpers.commands import ROOT, run_process, run_script
from tests.helpers.images import UNREADABLE

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

COMMAND = "export"
COLOURS = ["red", "green", "blue"]
SIZE = (64, 96)
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.LABEL_EMBEDDINGS.SOURCE": "names",
    "MODEL.LABEL_EMBEDDINGS.DIM": 7,
    "MODEL.LABEL_GCN.HIDDEN_DIMS": [16],
    "MODEL.LABEL_HEAD.NUM_LABELS": 3,
    "INPUT.IMAGE_SIZE": SIZE,
}
# Of models with regions.
SMALL_REGIONS = {
    "MODEL.RPN.CONV_DIMS": [8],
    "MODEL.REGION_BRANCH.NUM_REGIONS": 12,
    "MODEL.REGION_GCN.HIDDEN_DIMS": [8, 16],
}
FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.LABEL_HEAD.IN_FEATURES": ["p5"],
    "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64]],
}
# 4 regions are wanted, 2 of them are never found.
FEW = {"MODEL.RPN.POST_NMS_TOPK_TEST": 2, "MODEL.REGION_BRANCH.NUM_REGIONS": 4}


# What is exported to ONNX, once each.
KINDS = {
    "linear": ("asl", {"INPUT.FORMAT": "BGR", "INPUT.CENTER_CROP": 0.8}),
    "ml_gcn": ("ml_gcn", {"MODEL.LABEL_GCN.BIAS": True}),
    "ml_agcn": ("ml_agcn", {}),
    "c_tran": ("c_tran", {}),
    "srn": ("srn", {}),
    "cnn_rnn": ("cnn_rnn", {}),
    "ml_decoder": ("ml_decoder", {"MODEL.ML_DECODER.NUM_GROUPS": 2}),
    "query2label": ("query2label", {"MODEL.QUERY2LABEL.SELF_ATTENTION": True}),
    "add_gcn": ("add_gcn", {}),
    "ssgrl": ("kggr", {}),
    "salgl": ("salgl", {"MODEL.SALGL.POSITIONS": True}),
    "tdrg": ("tdrg", {}),
    # So picky that of many images no region is left.
    "ia_gcn": (
        "ia_gcn_plus",
        {
            "MODEL.REGION_BRANCH.EVAL_SAMPLES": 1,
            "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 50,
            "INPUT.CENTER_CROP": 0.9,
        },
    ),
    "ia_agcn": ("ia_agcn", {"MODEL.REGION_GCN.READING": "regions"}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that exports one of KINDS: (path of the ONNX file, of the checkpoint, model)."""
    done = {}

    def export_kind(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            cfg, model = build(KINDS[kind][0], **KINDS[kind][1])
            weights, output = save(folder, cfg, model), folder / "new" / "model.onnx"
            arguments = ["--weights", weights, "--format", "onnx", "--output", str(output)]
            # What it prints is not the test's that happens to be the first to ask.
            with redirect_stdout(None):
                assert export.main(arguments) == 0
            assert os.listdir(output.parent) == ["model.onnx"]
            done[kind] = output, weights, model
        return done[kind]

    return export_kind


def noise(count, seed=0, size=SIZE):
    """(count, 3, H, W) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, *size), dtype=np.uint8)


@torch.no_grad()
def build(config, **options):
    """A model at random, whose batch norms know the statistics of noise, and its config."""
    small = {**SMALL, **(SMALL_REGIONS if config.startswith("ia_") else {}), **options}
    opts = [item for pair in small.items() for item in pair]
    cfg = setup_cfg(str(ROOT / "configs" / "DigitScenes" / f"{config}.yaml"), opts)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    if model.label_graph is not None:
        graph = model.label_graph
        pairs = torch.tensor([[100, 60, 5], [60, 90, 50], [5, 50, 80]])
        graph.fill(pairs.diagonal(), pairs, graph.embeddings)
    if hasattr(model, "proposal_generator"):
        # Boxes of many sizes rather than the anchors themselves.
        model.proposal_generator.rpn_head.objectness_logits.weight.mul_(30)
        model.proposal_generator.rpn_head.anchor_deltas.weight.mul_(100)
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    evaluate(model, noise(8, seed=1))
    for norm in norms:
        norm.eval().momentum = 0.1
    return cfg, model.requires_grad_(False)


def save(folder, cfg, model):
    """Write a checkpoint: its path."""
    MultiLabelCheckpointer(model, str(folder), label_names=COLOURS, config=cfg.dump()).save("model")
    return os.path.join(folder, "model.pth")


@torch.no_grad()
def evaluate(model, images, states=None):
    inputs = [{"image": torch.from_numpy(image)} for image in images]
    if states is not None:
        inputs = [{**x, "label_states": torch.from_numpy(s)} for x, s in zip(inputs, states)]
    return model(inputs)


def assert_same(outputs, results, atol=1e-4):
    """Exported outputs, arrays or tensors by name, of a batch, and what the model returns of it."""
    outputs = {name: np.asarray(value) for name, value in outputs.items()}
    for name in ("scores", "logits"):
        expected = torch.stack([result[name] for result in results])
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=atol)
    if "valid" in outputs:
        regions, valid = results[0]["regions"], outputs["valid"]
        count = len(regions)
        assert valid.tolist() == [i < count for i in range(len(valid))]
        for name, expected, tolerance in [
            ("boxes", regions.proposal_boxes.tensor, 10 * atol),
            ("weights", regions.weights, atol),
            ("region_scores", regions.scores, atol),
        ]:
            np.testing.assert_allclose(outputs[name][:count], expected, rtol=0, atol=tolerance)
            assert not outputs[name][count:].any()


# ------------------------------------------------------------------------------ the traceable forms


def random_levels(sizes, seed):
    """Boxes (1, K, 4), some of them empty, outside or not finite, and logits (1, K) of each."""
    generator = torch.Generator().manual_seed(seed)
    boxes, logits = [], []
    for size in sizes:
        corners = 80 * torch.rand(1, size, 2, generator=generator) - 10
        sides = 40 * torch.rand(1, size, 2, generator=generator) - 4
        boxes.append(torch.cat([corners, corners + sides], dim=2))
        logits.append(torch.randn(1, size, generator=generator))
        boxes[-1][0, 1, 2], logits[-1][0, 2] = torch.nan, torch.inf
    return boxes, logits


@pytest.mark.parametrize("sizes", [(300,), (7,), (200, 90, 40), (2000, 500)])
@pytest.mark.parametrize(
    ("pre_nms_topk", "post_nms_topk", "min_box_size", "count"),
    [(100, 20, 0, 12), (1000, 5, 0, 12), (1000, 400, 8, 400), (50, 20, 1000, 6)],
)
def test_proposals_are_detectron2s(sizes, pre_nms_topk, post_nms_topk, min_box_size, count):
    proposals, logits = random_levels(sizes, seed=len(sizes))
    image_size = (48, 64)
    options = {
        "nms_thresh": 0.5,
        "pre_nms_topk": pre_nms_topk,
        "post_nms_topk": post_nms_topk,
        "min_box_size": min_box_size,
    }
    boxes, valid = top_proposals(
        [level[0] for level in proposals],
        [level[0] for level in logits],
        image_size,
        num_regions=count,
        **options,
    )
    (expected,) = find_top_rpn_proposals(proposals, logits, [image_size], training=False, **options)
    expected = expected.proposal_boxes.tensor[:count]
    assert (len(expected) == 0) == (min_box_size == 1000)
    assert boxes.shape == (count, 4)
    assert valid.tolist() == [i < len(expected) for i in range(count)]
    torch.testing.assert_close(boxes[valid], expected, rtol=0, atol=0)
    assert not boxes[~valid].any()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("asl", {}),
        ("ml_gcn", {"MODEL.GLOBAL_POOLING.NAME": "gem", "MODEL.LABEL_GCN.BIAS": True}),
        ("ml_agcn", {}),
        ("c_tran", {"MODEL.C_TRAN.POSITIONS": True}),
        ("srn", {}),
        ("rnn_attention", {}),
        ("cnn_rnn", {}),
        ("ml_decoder", {"MODEL.ML_DECODER.QUERIES": "words"}),
        ("query2label", {}),
        ("add_gcn", {}),
        ("kggr", {}),
        ("salgl", {"MODEL.SALGL.SOFT_SCENES": True}),
        ("tdrg", {}),
        # Of a size that the backbone pads.
        ("asl", {**FPN, "INPUT.IMAGE_SIZE": (72, 40)}),
        ("query2label", {**FPN, "INPUT.IMAGE_SIZE": (72, 40)}),
        ("ml_gcn", {**FPN, "INPUT.IMAGE_SIZE": (72, 40), "MODEL.GLOBAL_POOLING.NAME": "mean"}),
        ("ia_gcn", {}),
        ("ia_gcn_plus", {"MODEL.REGION_GCN.READING": "regions"}),
        ("ia_gcn_plus", {"MODEL.REGION_BRANCH.EVAL_SAMPLES": 3}),
        ("ia_gcn_plus", FEW),
        ("ia_gcn_plus", {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 1000}),
        ("ia_gcn", {"MODEL.FUSION.GLOBAL_WEIGHT": 1.0}),
        ("ia_gcn", {"MODEL.FUSION.GLOBAL_WEIGHT": 0.0}),
        ("ia_gcn", {"MODEL.REGION_GCN.LCM": "individual", "MODEL.LABEL_HEAD.NAME": "LinearHead"}),
        ("ia_gcn", {"MODEL.LABEL_GRAPH.IMAGE_DEPENDENT": False}),
        ("ia_agcn", {"MODEL.LABEL_GRAPH.IMAGE_DEPENDENT": False}),
        ("ia_agcn", {}),
        ("ia_gcn", {"MODEL.REGION_BRANCH.VARIATIONAL": False}),
        ("ia_gcn", {"MODEL.REGION_BRANCH.RES5": True, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4}),
        ("ia_gcn_plus", FPN),
    ],
)
def test_the_exportable_form_is_the_model(config, options):
    cfg, model = build(config, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    form = exportable(model, cfg.INPUT.IMAGE_SIZE)
    images = noise(3, size=cfg.INPUT.IMAGE_SIZE)
    logits = []
    assert form.inputs == ("images", "label_states")[: 2 if config == "c_tran" else 1]
    for batch in [images] if form.dynamic_batch else images[:, None]:
        results = evaluate(model, batch)
        outputs = form(torch.from_numpy(batch))
        assert tuple(outputs) == form.outputs
        states = np.array([[-1, 0, 1]] * len(batch), np.int8)
        if "label_states" in form.inputs:
            told = form(torch.from_numpy(batch), torch.from_numpy(states))
            assert_same(told, evaluate(model, batch, states), atol=1e-5)
        assert_same(outputs, results, atol=1e-5)
        logits += [result["logits"] for result in results]
    # The images make a difference.
    assert torch.stack(logits).std(dim=0).max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "options", "key"),
    [
        ("ia_gcn", {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}, "PROPOSAL_GENERATOR"),
        ("ia_gcn", {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}, "POOLER_TYPE"),
    ],
)
def test_a_part_without_such_a_form_is_refused(error_line, config, options, key):
    cfg, model = build(config)
    if "PROPOSAL" in key:
        model.proposal_generator = None
    else:
        _, model = build(config, **options)
    assert key in error_line(exportable, model, cfg.INPUT.IMAGE_SIZE)


# -------------------------------------------------------------------------------------------- ONNX


SLOW_KINDS = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in (
        *("linear", "ml_agcn", "ml_decoder", "query2label", "c_tran", "srn", "cnn_rnn"),
        *("add_gcn", "ssgrl", "salgl", "tdrg"),
    )
]


@pytest.mark.parametrize("kind", ["ml_gcn", *SLOW_KINDS])
def test_onnx_is_the_model_for_any_batch(exported, kind):
    path, _, model = exported(kind)
    predictor = OnnxPredictor(path)
    for count in (1, 3):
        images = noise(count)
        outputs = predictor.run(images)
        assert set(outputs) == {"scores", "logits"}
        assert outputs["logits"].shape == (count, 3)
        assert_same(outputs, evaluate(model, images))


@pytest.mark.slow
def test_onnx_is_told_what_is_known(exported, tmp_path):
    path, weights, model = exported("c_tran")
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["images", "label_states"]
    exact, p = MultiLabelPredictor(weights, device="cpu"), OnnxPredictor(path)
    assert p.takes_known_labels
    states = np.array([[1, -1, 0], [-1, -1, -1], [0, 1, 1]], np.int8)
    images = noise(3)
    outputs = p.run(images, states)
    assert_same(outputs, evaluate(model, images, states))
    assert np.abs(outputs["logits"] - p.run(images)["logits"])[[0, 2]].max(axis=1).min() > 1e-3
    photos, known = load_sample_images().images, [{"red": True, "blue": False}, None]
    for found, expected in zip(p.predict_batch(photos, known), exact.predict_batch(photos, known)):
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)
        assert found.known == expected.known
    assert p(photos[0], known={"red": True}).scores[0] == 1
    stored = {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props}
    assert stored["label_states"].startswith("int8 (B, C): ")

    changed = onnx.load(path)
    changed.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(changed, tmp_path / "float.onnx")
    with pytest.raises(InputError, match=r"float\.onnx"):
        OnnxPredictor(tmp_path / "float.onnx")


@pytest.mark.slow
def test_a_file_without_label_states_is_told_nothing(monkeypatch, tmp_path, error_line):
    """As they were written before there was this input."""
    cfg, model = build("c_tran")
    weights = save(tmp_path, cfg, model)
    monkeypatch.setattr(type(model), "takes_known_labels", False)
    output = tmp_path / "model.onnx"
    with redirect_stdout(None):
        assert export.main(["--weights", weights, "--format", "onnx", "--output", str(output)]) == 0
    monkeypatch.undo()
    p = OnnxPredictor(output)
    assert not p.takes_known_labels
    images = noise(2)
    assert_same(p.run(images), evaluate(model, images))
    assert "makes no use of known labels" in error_line(p, images[0].T, {"red": True})


@pytest.mark.slow
def test_onnx_is_the_model_with_few_and_without_regions(exported):
    path, _, model = exported("ia_gcn")
    predictor, counts = OnnxPredictor(path), set()
    for image in noise(6):
        outputs = predictor.run(image[None])
        results = evaluate(model, [image])
        assert_same(outputs, results)
        counts.add(len(results[0]["regions"]))
    assert 0 in counts
    assert 0 < max(counts) < 12


@pytest.mark.slow
def test_onnx_is_the_model_with_all_regions(exported):
    path, _, model = exported("ia_agcn")
    predictor = OnnxPredictor(path)
    for image in noise(3):
        outputs = predictor.run(image[None])
        assert outputs["valid"].all()
        assert_same(outputs, evaluate(model, [image]))


@pytest.mark.slow
def test_a_graph_has_what_its_model_needs_and_nothing_else(exported):
    """Regions are found inside of it; classifiers that follow from no image are constants."""

    def operators(kind):
        model = onnx.load(exported(kind)[0])
        onnx.checker.check_model(model)
        assert {opset.domain for opset in model.opset_import} == {""}
        return [node.op_type for node in model.graph.node]

    assert {"NonMaxSuppression", "RoiAlign"} <= set(operators("ia_gcn"))
    for kind in ("linear", "ml_gcn", "ml_agcn"):
        products = [name for name in operators(kind) if name in ("Gemm", "MatMul", "Einsum")]
        assert len(products) == 1


def test_metadata(exported):
    path, weights, _ = exported("linear")
    stored = {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props}
    assert stored["label_names"] == COLOURS
    preprocessing = stored["preprocessing"]
    cfg = MultiLabelPredictor(weights, device="cpu").cfg
    assert preprocessing["size"] == list(SIZE)
    assert (preprocessing["resize"], preprocessing["crop"]) == ([80, 120], [8, 12])
    assert preprocessing["format"] == "BGR"
    assert preprocessing["mean"] == cfg.MODEL.PIXEL_MEAN
    assert preprocessing["deviation"] == cfg.MODEL.PIXEL_STD
    assert preprocessing["interpolation"] == "bilinear"
    made_by = stored["made_by"]
    assert made_by["weights"] == "model.pth"
    assert made_by["meta_architecture"] == "MultiLabelRecognizer"
    assert made_by["torch"] == torch.__version__
    assert OnnxPredictor(path).metadata == {key: stored[key] for key in stored}


# ------------------------------------------------------------------------------------- predictions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "ia_gcn"])
def test_the_predictor_says_what_the_checkpoints_says(exported, tmp_path, kind):
    path, weights, _ = exported(kind)
    exact, p = MultiLabelPredictor(weights, device="cpu"), OnnxPredictor(path)
    photos = load_sample_images().images
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    images = [*photos, str(tmp_path / "photo.png"), tmp_path / "photo.png"]
    images += [Image.fromarray(photos[1][:50, ::-1]), np.ascontiguousarray(noise(1)[0].T)]
    found, counts = p.predict_batch(images), set()
    for prediction, expected in zip(found, exact.predict_batch(images)):
        assert prediction.labels == expected.labels
        np.testing.assert_allclose(prediction.scores, expected.scores, rtol=0, atol=1e-4)
        chosen, right = prediction.above(0.3, 2), expected.above(0.3, 2)
        assert dict(chosen) == pytest.approx(dict(right), abs=1e-4)
        assert (prediction.regions is None) == (expected.regions is None)
        if expected.regions is not None:
            counts.add(len(expected.regions.boxes))
            for values, right in zip(prediction.regions, expected.regions):
                assert values.dtype == right.dtype
                np.testing.assert_allclose(values, right, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(p(photos[0]).scores, found[0].scores, rtol=0, atol=1e-6)
    assert p.predict_batch([]) == []
    assert p.has_regions == (kind == "ia_gcn")


def test_the_view_refuses_what_the_checkpoints_refuses(exported, tmp_path):
    path, weights, _ = exported("linear")
    exact, view = MultiLabelPredictor(weights, device="cpu").view, OnnxPredictor(path).view
    for name, write in UNREADABLE.items():
        write(tmp_path / name)
        with pytest.raises(UnreadableImage) as caught:
            view(tmp_path / name)
        with pytest.raises(UnreadableImage) as right:
            exact(tmp_path / name)
        assert str(caught.value) == str(right.value)
    for source in (np.zeros((5, 5), np.uint8), None):
        with pytest.raises(InputError, match="an image is"):
            view(source)


@pytest.mark.parametrize("any_batch", [True, False])
def test_the_check_starts_from_files(checkpoint, tmp_path, any_batch):
    """An exported model that says the same of pixels, but prepares a file differently, differs."""
    p = MultiLabelPredictor(checkpoint, device="cpu")
    files = [tmp_path / "a.jpg", tmp_path / "b.png"]
    for file, photo in zip(files, load_sample_images().images):
        Image.fromarray(photo).save(file)
    states = np.full((2, 3), -1, np.int8)
    expected = evaluate_files(p, files, states)
    preprocessing = describe(p.cfg, p.label_names)["preprocessing"]

    def run(images, label_states):
        return np.stack([result["logits"].numpy() for result in evaluate(p.model, images)])

    def difference(**changed):
        exported = ExportedModel(ImageView({**preprocessing, **changed}), run)
        return largest_difference(exported, files, states, expected, any_batch)

    assert difference() <= 1e-5
    for changed in ({"interpolation": "nearest"}, {"interpolation": "box"}, {"format": "BGR"}):
        assert difference(**changed) > 1e-3


@pytest.fixture
def run_predict(capsys):
    """A function that runs tools/predict.py in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        status = predict.main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return run


# Forbids what an exported model does without, then runs a script as if it were started.
WITHOUT = """
import runpy, sys
for name in ("torch", "torchvision", "detectron2", "fvcore", "yacs", "timm", "cv2", "matplotlib"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def predict_without(*arguments):
    """(exit status, records, stderr) of tools/predict.py in a process without detectron2."""
    result = run_process("-c", WITHOUT, ROOT / "tools/predict.py", *arguments)
    return result.returncode, list(map(json.loads, result.stdout.splitlines())), result.stderr


@pytest.mark.slow
def test_predict_runs_onnx_without_detectron2(exported, run_predict, tmp_path):
    path, weights, _ = exported("ia_agcn")
    for i, image in enumerate(noise(5)):
        Image.fromarray(image.T).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("no image")
    options = [tmp_path, "--regions", "--threshold", "0", "--device", "cpu", "--batch-size", "2"]
    status, found, stderr = predict_without("--weights", path, *options)
    assert stderr.splitlines()[-1] == "predict: 6 images, 1 could not be read"
    right_status, out, _ = run_predict("--weights", weights, *options, "--num-workers", 0)
    right = list(map(json.loads, out.splitlines()))
    assert status == right_status == 1
    assert len(found) == len(right) == 6
    regions = 0
    for record, expected in zip(found, right):
        assert record["file"] == expected["file"]
        if "error" in expected:
            assert record == expected
            continue
        labels, expected_labels = (
            {label["label"]: label["probability"] for label in r["labels"]}
            for r in (record, expected)
        )
        assert labels == pytest.approx(expected_labels, abs=1e-4)
        assert len(record["regions"]) == len(expected["regions"])
        for region, expected_region in zip(record["regions"], expected["regions"]):
            regions += 1
            assert region.pop("box") == pytest.approx(expected_region.pop("box"), abs=0.011)
            assert region.pop("label") == expected_region.pop("label")
            assert region == pytest.approx(expected_region, abs=1e-4)
    assert regions

    status, _, stderr = predict_without("--weights", path, tmp_path, "--draw", tmp_path / "drawn")
    assert status == 1
    assert stderr.startswith("predict: --draw needs torch and detectron2")
    status, _, stderr = predict_without("--weights", weights, tmp_path)
    assert status == 1
    assert stderr == f"predict: --weights {weights} needs torch and detectron2; " + (
        "a .onnx file does not\n"
    )


def test_the_package_says_what_it_misses():
    code = "import sys; sys.modules['detectron2'] = None; from ia_gcn import MultiLabelPredictor"
    result = run_process("-c", code)
    line = "ModuleNotFoundError: ia_gcn.MultiLabelPredictor needs detectron2"
    assert result.stderr.splitlines()[-1] == line


# ------------------------------------------------------------------------- the command and refusals


@pytest.mark.slow
def test_torch_export(main, tmp_path):
    cfg, model = build("ia_gcn_plus")
    weights, output = save(tmp_path, cfg, model), tmp_path / "model.pt2"
    status, out, err = main("--weights", weights, "--format", "torch_export", "--output", output)
    assert (status, err) == (0, "")
    assert out.startswith(f"{output}: its logits equal the model's within ")
    extra = {"metadata.json": ""}
    module = torch.export.load(output, extra_files=extra).module()
    content = json.loads(extra["metadata.json"])
    assert content["label_names"] == COLOURS
    assert content["preprocessing"]["size"] == list(SIZE)
    for image in noise(2):
        assert_same(module(torch.from_numpy(image[None])), evaluate(model, [image]))


@pytest.mark.slow
def test_torch_export_is_told_what_is_known(main, tmp_path):
    weights, output = save(tmp_path, *build("c_tran")), tmp_path / "model.pt2"
    status, _, err = main("--weights", weights, "--format", "torch_export", "--output", output)
    assert (status, err) == (0, "")
    extra = {"metadata.json": ""}
    module = torch.export.load(output, extra_files=extra).module()
    assert "label_states" in json.loads(extra["metadata.json"])
    model = MultiLabelPredictor(weights, device="cpu").model
    for states in ([[1, -1, 0]], [[-1, -1, -1], [0, 0, 1]]):
        states = np.array(states, np.int8)
        images = noise(len(states))
        outputs = module(torch.from_numpy(images), torch.from_numpy(states))
        assert_same(outputs, evaluate(model, images, states))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Path of the checkpoint of a model with a linear head."""
    return save(tmp_path_factory.mktemp("checkpoint"), *build("asl"))


def test_the_command(checkpoint, tmp_path):
    """As a user runs it, with images of their own, over a file that is there."""
    output = tmp_path / "model.pt2"
    output.write_text("older")
    for name in ("a.png", "b.jpg"):
        Image.fromarray(load_sample_images().images[0][:60, :80]).save(tmp_path / name)
    result = run_script(
        *("tools/export_model.py", "--weights", checkpoint, "--format", "torch_export"),
        *("--output", output, "--check", tmp_path / "a.png", tmp_path / "b.jpg"),
    )
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert len(result.stdout.splitlines()) == 1
    module = torch.export.load(output).module()
    model = MultiLabelPredictor(checkpoint, device="cpu").model
    for count in (1, 3):
        images = noise(count)
        assert_same(module(torch.from_numpy(images)), evaluate(model, images))
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.jpg", "model.pt2"]


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("onnx", lambda bias: bias.add_(2e-4)),
        ("torch_export", lambda bias: bias[1].fill_(torch.nan)),
    ],
)
@pytest.mark.slow
def test_a_file_that_differs_from_the_model_is_not_left(
    main, monkeypatch, checkpoint, tmp_path, format, change
):
    output = tmp_path / f"model{ENDINGS[format]}"
    output.write_text("older")

    def damaged(*arguments):
        form = exportable(*arguments)
        change(form.model.label_head.classifier.bias)
        return form

    monkeypatch.setattr("ia_gcn.export.export.exportable", damaged)
    status, out, err = main("--weights", checkpoint, "--format", format, "--output", output)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"export: {output} is not written: its logits differ")
    assert os.listdir(tmp_path) == [output.name]
    assert output.read_text() == "older"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "model.onxx"], "--output model.onxx: the name must end in .onnx"),
        (["--weights", "none.pth"], "none.pth"),
        (["--config-file", "none.yaml"], "none.yaml"),
        (["--check", "none.jpg"], "none.jpg"),
        (["--opset", "17"], "--opset must be 18 to "),
        (["--opset", "99"], "--opset must be 18 to "),
        (["--output", "file/model.onnx"], "file"),
    ],
)
def test_what_can_not_be_exported_is_one_line(
    main, monkeypatch, checkpoint, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    wanted = {"--weights": checkpoint, "--format": "onnx", "--output": "model.onnx"}
    wanted.update(zip(arguments[::2], arguments[1::2]))
    status, out, err = main(*[item for pair in wanted.items() for item in pair])
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("export: ")
    assert message in err
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("asl", {"INPUT.FORMAT": "YUV-BT.601"}, "INPUT.FORMAT"),
        ("ia_gcn", {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}, "POOLER_TYPE"),
    ],
)
def test_models_that_can_not_be_exported_are_one_line(main, tmp_path, config, options, message):
    weights = save(tmp_path, *build(config, **options))
    output = tmp_path / "model.onnx"
    status, out, err = main("--weights", weights, "--format", "onnx", "--output", output)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not output.exists()


def test_opsets_are_of_onnx_alone(main, capsys):
    with pytest.raises(SystemExit):
        main(*("--weights", "a", "--format", "torch_export", "--output", "b", "--opset", 18))
    assert "--opset: only ONNX has operator sets" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_files_that_can_not_be_used_are_one_line(exported, tmp_path, error_line):
    path, _, _ = exported("linear")
    assert "no such file" in error_line(OnnxPredictor, tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("text")
    assert "text.onnx" in error_line(OnnxPredictor, tmp_path / "text.onnx")
    model = onnx.load(path)
    broken = [("preprocessing", text) for text in ("{}", "[", "5")]
    for key, value in [(None, None), *broken, ("label_names", '["red"]'), ("label_names", "5")]:
        stranger = onnx.ModelProto()
        stranger.CopyFrom(model)
        entries = {prop.key: prop for prop in stranger.metadata_props}
        if key is None:
            del stranger.metadata_props[:]
        else:
            entries[key].value = value
        onnx.save(stranger, tmp_path / "stranger.onnx")
        line = error_line(OnnxPredictor, tmp_path / "stranger.onnx")
        assert "stranger.onnx was not written by tools/export_model.py" in line
    (images,) = model.graph.input
    images.type.tensor_type.elem_type = onnx.TensorProto.INT32
    onnx.save(model, tmp_path / "int.onnx")
    assert "int.onnx" in error_line(OnnxPredictor, tmp_path / "int.onnx")
    with pytest.raises(InputError, match="device abacus"):
        OnnxPredictor(path, device="abacus")
    with pytest.raises(InputError, match="can't run it"):
        OnnxPredictor(path).run(noise(1)[:, :, :-1])


def test_scores_that_are_not_finite_are_refused(exported, tmp_path):
    model = onnx.load(exported("linear")[0])
    (bias,) = (x for x in model.graph.initializer if x.name.endswith("classifier.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="not finite"):
        OnnxPredictor(tmp_path / "model.onnx")(np.zeros((5, 5, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regions"], "--regions: the model in {path} has no region branch"),
        (
            ["--config-file", "a.yaml"],
            "--config-file: has no effect on {path}, which has a config of its own",
        ),
    ],
)
def test_predict_refuses_what_an_exported_model_has_not(exported, run_predict, options, message):
    path = exported("linear")[0]
    status, out, err = run_predict("--weights", path, *options, "a.jpg")
    assert (status, out, err) == (1, "", f"predict: {message.format(path=path)}\n")


@pytest.mark.parametrize("workers", [0, 3])
def test_predict_keeps_the_order_and_draws(exported, run_predict, tmp_path, workers):
    path, _, _ = exported("linear")
    files = [tmp_path / f"{i}.png" for i in range(17)]
    for file, image in zip(files, noise(17)):
        Image.fromarray(image.T).save(file)
    options = ["--batch-size", 2, "--num-workers", workers, "--threshold", 0]
    drawn = tmp_path / "drawn"
    status, out, _ = run_predict("--weights", path, *options, "--draw", drawn, *files)
    assert status == 0
    assert sorted(os.listdir(drawn)) == sorted(file.name for file in files)
    found = list(map(json.loads, out.splitlines()))
    assert [record["file"] for record in found] == list(map(str, files))
    p = OnnxPredictor(path)
    for file, record in zip(files, found):
        scores = {label["label"]: label["probability"] for label in record["labels"]}
        assert scores == pytest.approx(dict(zip(COLOURS, p(file).scores)), abs=1e-5)
