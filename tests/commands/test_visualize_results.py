"""tools/visualize_results.py and the images it draws."""

import json

import numpy as np
import pytest
from PIL import Image

from ia_gcn.visualization import draw_prediction_sheet, plot_training_curve
from tests.helpers.commands import run_script

COMMAND = "visualize_results"


@pytest.fixture
def run_folder(tmp_path, tiny_coco):
    """What an evaluated training leaves behind, without the training."""
    data = tiny_coco(10)
    folder = tmp_path / "run"
    (folder / "inference/custom_test").mkdir(parents=True)
    config = {
        "DATASETS": {"CUSTOM": {"TEST": data.json_file, "IMAGE_ROOT": data.image_root}},
        "MODEL": {"DEVICE": "cpu"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    log = [{"iteration": i, "total_loss": 1 / (i + 1)} for i in range(0, 100, 20)]
    log[-1]["multi_label/mAP"] = 80.0
    (folder / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in log))
    rng = np.random.default_rng(0)
    np.savez(
        folder / "inference/custom_test/predictions.npz",
        image_ids=np.arange(1, 11),
        scores=rng.random((10, 3)),
        targets=rng.integers(-1, 2, (10, 3)),
        label_names=np.array(data.label_names),
    )
    return folder


def test_it_draws_the_curve_and_the_sheet(main, run_folder):
    status, out, err = main(run_folder, "--num-images", 7)
    assert status == 0, err
    for path in ("training_curve.png", "inference/custom_test/predictions.png"):
        assert path in out
        with Image.open(run_folder / path) as image:
            colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 50


def test_the_command(run_folder):
    (run_folder / "config.yaml").unlink()
    result = run_script("tools/visualize_results.py", run_folder)
    assert result.returncode == 1
    assert result.last_line.startswith("visualize_results: --config-file ")


def test_the_images_are_those_of_the_predictions(main, tool, run_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(tool, "draw_prediction_sheet", lambda images, *args: drawn.extend(images))
    assert main(run_folder, "--num-images", 4)[0] == 0
    with np.load(run_folder / "inference/custom_test/predictions.npz") as predictions:
        scores, targets = predictions["scores"], predictions["targets"]
    assert len({image["file_name"] for image in drawn}) == 4
    for image in drawn:
        place = int(image["file_name"][-10:-4]) - 1
        assert (image["scores"] == scores[place]).all()
        assert (image["targets"] == targets[place]).all()


def test_a_running_mean_has_a_curve_of_its_own(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, file, **options):
        name = file.name.split(".")[1]  # of .plain.123.tmp, which is renamed
        drawn[name] = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    records = [{"iteration": 1, "total_loss": 0.5, "multi_label/mAP": 70.0}]
    plot_training_curve(records, str(tmp_path / "plain"))
    both = [{**records[0], "ema/multi_label/mAP": 75.0}]
    plot_training_curve(both, str(tmp_path / "both"))
    assert drawn == {"plain": [[[0.5]], [[70.0]]], "both": [[[0.5]], [[70.0], [75.0]]]}


@pytest.mark.parametrize("log", [None, "not json\n"])
def test_what_cannot_be_drawn_is_refused_in_one_line(main, run_folder, log):
    if log is None:
        (run_folder / "config.yaml").unlink()
    else:
        (run_folder / "metrics.json").write_text(log)
    status, _, err = main(run_folder)
    assert status == 1
    # detectron2 logs that the config says no version.
    assert err.splitlines()[-1].startswith("visualize_results: ")
    assert "Traceback" not in err


def spoil(predictions, kind):
    """Write a predictions.npz again, with something in it that no evaluation writes."""
    with np.load(predictions) as content:
        arrays = dict(content)
    if kind == "pickled code":
        arrays["label_names"] = arrays["label_names"].astype(object)
    elif kind == "another image":
        arrays["image_ids"] = arrays["image_ids"] + 1
    elif kind == "no scores":
        del arrays["scores"]
    np.savez(predictions, **arrays)
    if kind == "damaged":
        predictions.write_bytes(predictions.read_bytes()[:100])


@pytest.mark.parametrize("kind", ["pickled code", "another image", "no scores", "damaged"])
def test_predictions_that_cannot_be_drawn_are_refused_in_one_line(main, run_folder, kind):
    predictions = run_folder / "inference/custom_test/predictions.npz"
    spoil(predictions, kind)
    status, _, err = main(run_folder)
    assert status == 1
    assert err.splitlines()[-1].startswith(f"visualize_results: {predictions}: ")
    assert "Traceback" not in err


VERDICTS = {"found": (26, 127, 55), "wrong": (207, 34, 46), "missed": (188, 108, 0)}


def verdicts_on_sheet(tmp_path, score, target):
    """Which of the colours are near one of the sheet's pixels; the image itself is grey."""
    grey, sheet = tmp_path / "grey.png", tmp_path / "sheet.png"
    Image.new("RGB", (32, 32), (128, 128, 128)).save(grey)
    sample = {
        "file_name": str(grey),
        "scores": np.array([score]),
        "targets": np.array([target]),
    }
    draw_prediction_sheet([sample], ["label"], 0.5, str(sheet))
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int).reshape(-1, 3)
    distances = {
        name: np.abs(pixels - colour).sum(axis=1).min() for name, colour in VERDICTS.items()
    }
    return {name for name, distance in distances.items() if distance < 60}


@pytest.mark.parametrize(
    ("score", "target", "shown"),
    [
        (0.9, 1, {"found"}),
        (0.9, 0, {"wrong"}),
        (0.1, 1, {"missed"}),
        (0.1, 0, set()),
        (0.9, -1, set()),
    ],
)
def test_a_label_has_the_colour_of_its_verdict(tmp_path, score, target, shown):
    assert verdicts_on_sheet(tmp_path, score, target) == shown
