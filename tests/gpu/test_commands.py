"""Training, evaluation, prediction and exported models on the GPU against the CPU."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ia_gcn import MultiLabelPredictor
from ia_gcn.inference import OnnxPredictor
from tests.helpers.commands import run_process, run_script
from tests.helpers.models import build_model, save_model

CONFIGS = ["asl", "ml_gcn", "ia_gcn_plus"]


@pytest.fixture
def options(tiny_coco, tmp_path):
    """A function that makes the options of a run on tiny images, with changes."""
    data = tiny_coco(14)

    def make(folder, **changes):
        values = {
            "DATASETS.CUSTOM.TRAIN": data.json_file,
            "DATASETS.CUSTOM.TEST": data.json_file,
            "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
            "INPUT.IMAGE_SIZE": "(64, 64)",
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.MAX_EPOCHS": 2,
            "OUTPUT_DIR": tmp_path / folder,
            **changes,
        }
        return [item for pair in values.items() for item in pair]

    return make


@pytest.fixture
def images():
    """Three images of noise, (H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60 + 20 * i, 90, 3), dtype=np.uint8) for i in range(3)]


def config_file(name):
    return ("--config-file", f"configs/DigitScenes/{name}.yaml")


def succeed(result):
    assert result.returncode == 0, result.stderr[-3000:]


def read_results(folder):
    """(metrics, scores) that an evaluation wrote."""
    folder = folder / "inference/custom_test"
    with np.load(folder / "predictions.npz") as predictions:
        return json.loads((folder / "metrics.json").read_text()), predictions["scores"]


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_trained_here_scores_the_same_on_the_cpu(
    options, device, tmp_path, config, mixed_precision
):
    changes = {"MODEL.DEVICE": device, "SOLVER.AMP.ENABLED": mixed_precision}
    train_net = ("tools/train_net.py", *config_file(config))
    succeed(run_script(*train_net, *options("run", **changes)))
    metrics, scores = read_results(tmp_path / "run")
    assert metrics["images"] == 14
    weights = tmp_path / "run/model_final.pth"
    evaluation = options("cpu", **{"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": weights})
    succeed(run_script(*train_net, "--eval-only", *evaluation))
    np.testing.assert_allclose(read_results(tmp_path / "cpu")[1], scores, atol=2e-3)


def test_a_cut_run_resumes(options, device, tmp_path):
    changes = {"MODEL.DEVICE": device, "SOLVER.AMP.ENABLED": True}
    changes |= {"SOLVER.CHECKPOINT_EPOCHS": 1, "SOLVER.MAX_EPOCHS": 3}
    train_net = ("tools/train_net.py", *config_file("ia_gcn_plus"))
    succeed(run_script(*train_net, *options("run", **changes)))
    # As if it had been cut after its first epoch.
    first = min(path.name for path in (tmp_path / "run").glob("model_0*.pth"))
    (tmp_path / "run/last_checkpoint").write_text(first)
    succeed(run_script(*train_net, "--resume", *options("run", **changes)))
    log = (tmp_path / "run/log.txt").read_text()
    assert f"Starting training from iteration {int(first[6:-4]) + 1}" in log
    assert np.isfinite(read_results(tmp_path / "run")[1]).all()


def test_two_gpus_train_and_evaluate_as_one_does(options, device, tmp_path):
    """Over nccl; with --device cpu over gloo."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    train_net = ("tools/train_net.py", *config_file("ia_gcn_plus"))
    changes = {"MODEL.DEVICE": device}
    succeed(run_process(*train_net, "--num-gpus", 2, *options("run", **changes)))
    changes["MODEL.WEIGHTS"] = tmp_path / "run/model_final.pth"
    results = []
    for count in (1, 2):
        evaluation = ("--num-gpus", count, "--eval-only", *options(f"eval{count}", **changes))
        succeed(run_process(*train_net, *evaluation))
        results.append(read_results(tmp_path / f"eval{count}"))
    (one, scores), (two, other_scores) = results
    assert one["images"] == two["images"] == 14
    np.testing.assert_allclose(other_scores, scores, atol=1e-4)
    assert two["mAP"] == pytest.approx(one["mAP"], abs=0.5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_prediction_is_that_of_the_cpu(config, device, tmp_path, images):
    weights = save_model(tmp_path, *build_model(config))
    expected = MultiLabelPredictor(weights, device="cpu").predict_batch(images)
    found = MultiLabelPredictor(weights, device=device).predict_batch(images)
    for prediction, other in zip(expected, found):
        np.testing.assert_allclose(other.scores, prediction.scores, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
def test_onnx_on_the_gpu_says_what_the_checkpoint_says(config, device, tmp_path, images):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime has no {provider} here")
    weights = save_model(tmp_path, *build_model(config))
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    options = ("--weights", weights, "--format", "onnx", "--output", tmp_path / "model.onnx")
    succeed(run_script("tools/export_model.py", *options))
    predictor = OnnxPredictor(tmp_path / "model.onnx", device=device)
    assert predictor.session.get_providers()[0] == provider
    expected = MultiLabelPredictor(weights, device="cpu")
    # From a file: an array's resizing differs by a level between the two.
    image = str(tmp_path / "image.png")
    np.testing.assert_allclose(predictor(image).scores, expected(image).scores, atol=5e-3)
