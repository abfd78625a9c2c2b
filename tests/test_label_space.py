"""Thousands of labels, all the way of a user: training, evaluation, export, prediction."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from ia_gcn.inference import MultiLabelPredictor, OnnxPredictor
from tests.helpers.commands import ROOT, run_script

NUM_LABELS, NUM_TRAIN, NUM_TEST = 3000, 48, 24


def write_split(folder, name, first, count):
    """Images of noise, with 12 labels each on average, as JSON in COCO's format."""
    random = np.random.RandomState(first)
    frequency = 1 / np.arange(1, NUM_LABELS + 1)
    images, annotations = [], []
    for image_id in range(first, first + count):
        file_name = f"{image_id:03}.png"
        pixels = random.randint(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / file_name)
        images.append({"id": image_id, "file_name": file_name, "height": 24, "width": 32})
        drawn = random.choice(NUM_LABELS, 12, p=frequency / frequency.sum())
        annotations += [{"image_id": image_id, "category_id": label + 1} for label in drawn]
    for number, annotation in enumerate(annotations):
        annotation.update(id=number, category_id=int(annotation["category_id"]))
    categories = [{"id": i + 1, "name": f"label number {i}"} for i in range(NUM_LABELS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def run(script, *options):
    """What a command says, which ends well."""
    done = run_script(script, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_all_the_way_with_thousands_of_labels(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    train = write_split(photos, "train", 0, NUM_TRAIN)
    test = write_split(photos, "test", NUM_TRAIN, NUM_TEST)
    output = tmp_path / "run"
    config = ["--config-file", ROOT / "configs/DigitScenes/asl.yaml"]
    data = ["DATASETS.CUSTOM.TEST", test, "DATASETS.CUSTOM.IMAGE_ROOT", photos]
    size = ["INPUT.IMAGE_SIZE", "(32, 32)", "MODEL.DEVICE", "cpu"]
    opts = [*data, *size, "DATASETS.CUSTOM.TRAIN", train, "SOLVER.MAX_EPOCHS", 2]
    said = run("tools/train_net.py", *config, *opts, "OUTPUT_DIR", output)

    # What is read by people stays short; a file by programs has some bytes for each label.
    results = output / "inference/custom_test"
    assert len(said) < 10_000
    assert "the 12 lowest AP of" in said
    lengths = {file.name: file.stat().st_size for file in (*results.iterdir(), *output.iterdir())}
    assert lengths["log.txt"] < 60_000
    assert lengths["report.html"] < 10**6
    assert lengths["metrics.json"] < 100 * NUM_LABELS

    # The measures are scikit-learn's, of the scores in the file.
    with np.load(results / "predictions.npz") as file:
        names, scores, targets = (file[key] for key in ("label_names", "scores", "targets"))
    assert scores.shape == targets.shape == (NUM_TEST, NUM_LABELS)
    metrics = json.loads((results / "metrics.json").read_text())
    given = [i for i in range(NUM_LABELS) if targets[:, i].any()]
    assert 50 < len(given) < NUM_LABELS
    expected = {names[i]: 100 * average_precision_score(targets[:, i], scores[:, i]) for i in given}
    assert metrics["mAP"] == pytest.approx(np.mean(list(expected.values())))
    found = {name: ap for name, ap in metrics["AP"].items() if ap is not None}
    assert found == pytest.approx(expected)

    # An evaluation of the checkpoint with scores in files finds the same.
    weights = output / "model_final.pth"
    again = tmp_path / "again"
    limit = ["TEST.MEMORY_LIMIT", 0, "OUTPUT_DIR", again, "MODEL.WEIGHTS", weights]
    run("tools/train_net.py", *config, "--eval-only", *data, *size, *limit)
    measured = json.loads((again / "inference/custom_test/metrics.json").read_text())
    assert measured["AP"] == metrics["AP"]

    # ONNX says what the checkpoint says.
    exported = tmp_path / "model.onnx"
    run("tools/export_model.py", "--weights", weights, "--format", "onnx", "--output", exported)
    files = sorted(photos.glob("*.png"))[NUM_TRAIN:]
    images = [np.asarray(Image.open(file)) for file in files]
    predictors = MultiLabelPredictor(str(weights), device="cpu"), OnnxPredictor(str(exported))
    by_torch, by_onnx = (
        np.stack([result.scores for result in predictor.predict_batch(images)])
        for predictor in predictors
    )
    np.testing.assert_allclose(by_torch, scores, atol=1e-5)
    np.testing.assert_allclose(by_onnx, by_torch, atol=1e-4)
    lists = []
    for number, file in enumerate((weights, exported)):
        path = tmp_path / f"{number}.jsonl"
        options = ["--weights", file, "--threshold", 0, "--top-k", 5, "--output", path]
        run("tools/predict.py", *files, *options)
        lists.append([[label["label"] for label in r["labels"]] for r in records(path)])
    assert lists[0] == lists[1]
    assert lists[0] == [names[np.argsort(-row, kind="stable")[:5]].tolist() for row in scores]
