"""ONNX in int8: a smaller file that says nearly what the checkpoint says."""

import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from ia_gcn import MultiLabelPredictor
from ia_gcn.commands import export, predict
from ia_gcn.export import compare_logits
from ia_gcn.inference import OnnxPredictor
from tests.helpers.models import build_model, save_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

COMMAND = "export"


def write_images(folder, count, seed=0):
    """Paths of images of smooth random colours, which a model tells apart, unlike noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{seed}_{i:02}.png" for i in range(count)]
    for path in paths:
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96), Image.BICUBIC).save(path)
    return paths


def export_int8(folder, config, *opts):
    """(path of the int8 file, of the checkpoint) of a config's model, by the command."""
    weights = save_model(folder, *build_model(config, *opts))
    write_images(folder / "photos", 20)
    output = folder / "int8.onnx"
    arguments = ["--weights", weights, "--format", "onnx", "--output", str(output)]
    with redirect_stdout(None):
        assert export.main([*arguments, "--int8", str(folder / "photos")]) == 0
    return output, weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`export_int8` of a linear head."""
    return export_int8(tmp_path_factory.mktemp("small"), "asl")


@pytest.fixture
def others(tmp_path):
    """Images that calibrated nothing."""
    return write_images(tmp_path / "others", 8, seed=1)


def assert_close(exported, images):
    """An int8 model's scores are the checkpoint's within 0.1, and differ from image to image."""
    path, weights = exported
    predictors = OnnxPredictor(path), MultiLabelPredictor(weights, device="cpu")
    found, expected = (np.stack([p(image).scores for image in images]) for p in predictors)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1)
    difference = np.abs(found - expected).max()
    assert 0 < difference < expected.std(axis=0).max()


def test_scores_are_nearly_the_checkpoints(small, others):
    assert_close(small, others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "opts"),
    [
        *((config, ()) for config in ("ml_gcn", "csra", "ml_decoder", "query2label", "c_tran")),
        *((config, ()) for config in ("ia_gcn", "demo")),
        ("asl", ("MODEL.TIMM.NAME", "tresnet_m")),
    ],
)
def test_heads_and_backbones(tmp_path, others, config, opts):
    assert_close(export_int8(tmp_path, config, *opts), others)


def test_rows_do_not_depend_on_their_batch(small):
    predictor = OnnxPredictor(small[0])
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 96, 96), dtype=np.uint8)
    images[0] = 255
    together = predictor.run(images)["logits"]
    for image, logits in zip(images, together):
        np.testing.assert_allclose(predictor.run(image[None])["logits"][0], logits, atol=1e-5)


def test_the_backbone_is_int8_and_the_rest_is_not(small):
    """Weights have 7 bits and a scale per channel; the classifier has 32."""
    path, weights = small
    graph = onnx.load(path).graph
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 10
    for node in convolutions:
        pixels, weight = (makers[name] for name in node.input[:2])
        assert pixels.op_type == weight.op_type == "DequantizeLinear"
        integers, scales = (values[name] for name in weight.input[:2])
        assert integers.dtype == np.int8
        assert np.abs(integers.astype(int)).max() <= 64
        assert scales.shape == integers.shape[:1]
    (product,) = (node for node in graph.node if node.op_type == "Gemm")
    assert values[product.input[1]].dtype == np.float32

    state = torch.load(weights, weights_only=True)["model"]
    assert path.stat().st_size < 0.4 * 4 * sum(tensor.numel() for tensor in state.values())


def test_metadata_says_how_it_was_made(small):
    metadata = OnnxPredictor(small[0]).metadata
    assert metadata["made_by"]["int8"] == {
        "onnxruntime": onnxruntime.__version__,
        "calibration_images": 16,
    }
    assert metadata["made_by"]["label_head"] == "LinearHead"
    assert len(metadata["label_names"]) == 10


def test_predict_runs_it(small, others, capsys):
    assert predict.main(["--weights", str(small[0]), *map(str, others), "--threshold", "0"]) == 0
    records = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [len(record["labels"]) for record in records] == [10] * len(others)


@pytest.mark.slow
def test_the_command_says_how_close_it_is(main, small, tmp_path):
    paths = write_images(tmp_path / "photos", 12)
    output = tmp_path / "new" / "int8.onnx"
    status, out, err = main(
        *("--weights", small[1], "--format", "onnx", "--output", output),
        *("--int8", *paths[:6], tmp_path / "photos" / "0_0[6-9].png", *paths[10:]),
    )
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 1
    assert out.startswith(f"{output}: on images that did not calibrate it, its logits differ")
    assert OnnxPredictor(output).metadata["made_by"]["int8"]["calibration_images"] == 9
    assert [path.name for path in output.parent.iterdir()] == ["int8.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda paths: paths[3].write_text("no image"), "0_03.png"),
        (lambda paths: [path.unlink() for path in paths[9:]], "--int8: 9 images; at least 10 are"),
        # Nothing shows then that the two models agree.
        (
            lambda paths: [path.write_bytes(paths[0].read_bytes()) for path in paths],
            "is not written: in int8, logits correlate",
        ),
    ],
)
def test_what_can_not_be_calibrated_is_one_line(main, small, tmp_path, spoil, message):
    paths = write_images(tmp_path / "photos", 10)
    spoil(paths)
    status, out, err = main(
        *("--weights", small[1], "--format", "onnx"),
        *("--output", tmp_path / "out" / "int8.onnx", "--int8", tmp_path / "photos"),
    )
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("export: ")
    assert message in err
    assert not list(tmp_path.glob("out/*"))


def test_int8_is_of_onnx_alone(main, capsys):
    with pytest.raises(SystemExit):
        main("--weights", "a", "--format", "torch_export", "--output", "b.pt2", "--int8", "c.jpg")
    assert "--int8: only with --format onnx" in capsys.readouterr().err


def test_the_correlation_is_within_labels():
    """Labels of which one is always likelier than the other do not correlate by that."""
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(50, 3)) + [-100, 0, 100]
    found = expected + 0.1 * rng.normal(size=(50, 3)) + 7
    difference = compare_logits(found, expected)
    assert difference.mean == pytest.approx(np.abs(found - expected).mean())
    assert difference.max == pytest.approx(np.abs(found - expected).max())
    centred = [(logits - logits.mean(axis=0)).ravel() for logits in (found, expected)]
    assert difference.correlation == pytest.approx(np.corrcoef(*centred)[0, 1])
    unrelated = rng.normal(size=(50, 3)) + [-100, 0, 100]
    assert abs(compare_logits(unrelated, expected).correlation) < 0.3
    assert np.isnan(compare_logits(found, np.zeros_like(found)).correlation)
