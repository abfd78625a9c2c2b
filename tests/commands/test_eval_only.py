"""tools/train_net.py --eval-only: from the checkpoint and the test set, with labels by name."""

import json
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.commands import train
from ia_gcn.data import register_multilabel_coco
from ia_gcn.engine import Trainer, checkpoint_labels, match_labels
from ia_gcn.engine.label_matching import training_counts
from ia_gcn.inference import SelectLabels
from tests.helpers.commands import own_log_handlers, run_script
from tests.helpers.models import NARROW

COLOURS = ["red", "green", "blue"]
MATCH = {"DATASETS.MATCH_LABELS_BY_NAME": True}
CONFIG = ("--config-file", "configs/DigitScenes/ml_gcn.yaml", "--eval-only")


@pytest.fixture
def checkpoint(make_cfg, tmp_path):
    """The path of a checkpoint of an untrained model for red, green and blue."""
    torch.manual_seed(0)
    cfg = make_cfg("trained")
    model = Trainer.build_model(cfg)
    if model.label_graph is not None:
        graph = model.label_graph
        counts = torch.tensor([[8, 4, 3], [4, 8, 5], [3, 5, 8]])
        graph.fill(counts.diagonal(), counts, torch.randn_like(graph.embeddings))
    checkpointer = MultiLabelCheckpointer(model, str(tmp_path), label_names=COLOURS)
    checkpointer.save("model")
    return str(tmp_path / "model.pth")


@pytest.fixture
def options(tiny_coco, checkpoint, tmp_path):
    """A function that makes the command line: the checkpoint on 14 images, with changes."""
    data = tiny_coco(14, "test")

    def make(name, changes):
        values = {
            "MODEL.WEIGHTS": checkpoint,
            "MODEL.DEVICE": "cpu",
            **NARROW,
            "DATASETS.CUSTOM.TEST": data.json_file,
            "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.IMAGE_SIZE": "(32, 32)",
            "TEST.REPORT": name == "resumed",
            "OUTPUT_DIR": tmp_path / name,
        }
        values.update(changes)
        return [*CONFIG, *(str(item) for pair in values.items() for item in pair)]

    return make


@pytest.fixture
def evaluate(options, capsys, tmp_path):
    """A function that runs the tool in this process: status, last line of stderr, predictions."""

    def run(name, changes, *flags):
        with own_log_handlers():
            status = train.main([*flags, *map(str, options(name, changes))])
        lines = capsys.readouterr().err.strip().splitlines()
        return status, lines[-1] if lines else "", read_predictions(tmp_path / name)

    return run


def read_predictions(folder):
    paths = list(folder.glob("inference/*/predictions.npz"))
    if not paths:
        return None
    with np.load(paths[0]) as predictions:
        return dict(predictions)


@pytest.fixture
def other_json(tiny_coco, tmp_path):
    """A function that writes the test set with these categories only, under these names."""
    data = tiny_coco(14, "other")

    def write(names):
        with open(data.json_file, encoding="utf-8") as file:
            content = json.load(file)
        content["categories"] = [
            {"id": place, "name": new}
            for place, old in enumerate(COLOURS, start=1)
            if (new := names.get(old))
        ]
        kept = {category["id"] for category in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]
        path = tmp_path / "other.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


REORDERED = {"DATASETS.CUSTOM.LABELS": "('blue','red','green')"}


def test_labels_in_another_order(evaluate, tmp_path):
    _, _, plain = evaluate("plain", {})
    assert plain["label_names"].tolist() == COLOURS

    status, line, predictions = evaluate("refused", REORDERED)
    assert (status, predictions) == (1, None)
    assert line.startswith("train: the data set has the same labels in another order than")
    assert "model.pth; DATASETS.MATCH_LABELS_BY_NAME" in line

    status, _, predictions = evaluate("matched", {**REORDERED, **MATCH})
    assert status == 0
    assert predictions["label_names"].tolist() == ["blue", "red", "green"]
    for key in ("scores", "targets"):
        assert np.array_equal(predictions[key], plain[key][:, [2, 0, 1]])
    metrics = [
        json.loads((tmp_path / name / "inference/custom_test/metrics.json").read_text())
        for name in ("plain", "matched")
    ]
    assert metrics[0]["AP"] == metrics[1]["AP"]


def test_some_of_the_labels(evaluate, other_json):
    _, _, plain = evaluate("plain", {})
    file = {"DATASETS.CUSTOM.TEST": other_json({"green": "green", "blue": "blue"})}
    status, line, _ = evaluate("refused", file)
    assert status == 1
    assert "lacks red" in line
    assert "DATASETS.MATCH_LABELS_BY_NAME" in line
    status, _, predictions = evaluate("matched", {**file, **MATCH})
    assert status == 0
    assert predictions["label_names"].tolist() == ["green", "blue"]
    for key in ("scores", "targets"):
        assert np.array_equal(predictions[key], plain[key][:, 1:])


def test_a_label_that_the_checkpoint_lacks_is_named(evaluate, other_json):
    file = {"DATASETS.CUSTOM.TEST": other_json({"red": "red", "green": "teal", "blue": "pink"})}
    status, line, _ = evaluate("refused", file)
    assert status == 1
    assert "has teal, pink; lacks green, blue" in line
    # It would be of no help.
    assert "MATCH_LABELS_BY_NAME" not in line
    status, line, predictions = evaluate("still", {**file, **MATCH})
    assert (status, predictions) == (1, None)
    assert "model.pth lacks 2 of the data set's labels: teal, pink" in line


@pytest.fixture
def csv_file(tmp_path):
    """A function that writes lines to a CSV and returns the option that evaluates it."""

    def write(*lines):
        path = tmp_path / "test.csv"
        path.write_text("".join(f"{line}\n" for line in lines))
        return {"DATASETS.CUSTOM.TEST": str(path), "DATASETS.CUSTOM.TRAIN": "gone.csv"}

    return write


@pytest.mark.parametrize("labels", ["green", ""])
def test_the_labels_of_a_csv_are_the_checkpoints(evaluate, csv_file, labels):
    """It needn't name all of them, nor is the training file needed."""
    _, _, plain = evaluate("plain", {})
    file = csv_file(f"000002.png,{labels}", "000001.png,")
    status, line, predictions = evaluate("csv", file)
    assert status == 0, line
    assert predictions["label_names"].tolist() == COLOURS
    assert predictions["image_ids"].tolist() == ["000001.png", "000002.png"]
    np.testing.assert_allclose(predictions["scores"], plain["scores"][:2], rtol=1e-5)
    assert predictions["targets"].tolist() == [[0, 0, 0], [0, int(labels == "green"), 0]]


def test_a_csv_with_labels_given(evaluate, csv_file):
    file = {**csv_file("000001.png,green"), "DATASETS.CUSTOM.LABELS": "('green',)"}
    file["DATASETS.CUSTOM.TRAIN"] = ""
    assert evaluate("refused", file)[0] == 1
    status, _, predictions = evaluate("matched", {**file, **MATCH})
    assert status == 0
    assert predictions["label_names"].tolist() == ["green"]


def test_a_csv_with_an_unknown_label_is_refused(evaluate, csv_file):
    status, line, _ = evaluate("csv", csv_file("000001.png,green;teal"))
    assert status == 1
    assert "test.csv: unknown label name(s): teal" in line


def test_a_registered_data_set_whatever_the_config_says(evaluate, other_json, tmp_path):
    """Neither its number of labels nor its training set is the checkpoint's."""
    _, _, plain = evaluate("plain", {})
    file = other_json({"green": "green", "blue": "blue"})
    images = str(tmp_path / "other" / "images")
    register_multilabel_coco("two_colours", file, images, ["blue", "green"])
    changes = {
        "DATASETS.CUSTOM.TEST": "",
        "DATASETS.TEST": "('two_colours',)",
        "MODEL.LABEL_HEAD.NUM_LABELS": 10,
    }
    status, line, predictions = evaluate("registered", {**changes, **MATCH})
    assert status == 0, line
    assert np.array_equal(predictions["scores"], plain["scores"][:, [2, 1]])


def test_scores_above_the_memory_limit_are_in_files(evaluate, tmp_path):
    """An array that comes from files is not compressed."""
    found = {}
    for limit in (1024, 0):
        status, line, predictions = evaluate(f"limit{limit}", {"TEST.MEMORY_LIMIT": limit})
        assert status == 0, line
        (folder,) = (tmp_path / f"limit{limit}" / "inference").iterdir()
        metrics = (folder / "metrics.json").read_text()
        assert {file.name for file in folder.iterdir()} == {"metrics.json", "predictions.npz"}
        with zipfile.ZipFile(folder / "predictions.npz") as file:
            compressed = file.getinfo("scores.npy").compress_type == zipfile.ZIP_DEFLATED
        found[limit] = predictions, metrics, compressed
    np.testing.assert_equal(found[0][:2], found[1024][:2])
    assert (found[0][2], found[1024][2]) == (False, True)


def test_resume_takes_the_last_checkpoint(evaluate, checkpoint, csv_file, tmp_path):
    folder = tmp_path / "resumed"
    folder.mkdir()
    # As a training's.
    content = {**torch.load(checkpoint, weights_only=True), "trainer": {"iteration": 9}}
    torch.save(content, folder / "model_0000009.pth")
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    for data in ({}, csv_file("000001.png,green")):
        changes = {**data, "MODEL.WEIGHTS": "gone.pth"}
        status, line, _ = evaluate("resumed", changes)
        assert status == 1
        assert "gone.pth" in line
        status, line, predictions = evaluate("resumed", changes, "--resume")
        assert status == 0, line
        assert predictions["label_names"].tolist() == COLOURS
    (report,) = folder.glob("inference/*/report.html")
    assert str(folder / "model_0000009.pth") in report.read_text("utf-8")


def test_a_bare_state_dict_has_the_data_sets_labels(evaluate, checkpoint):
    _, _, plain = evaluate("plain", {})
    torch.save(torch.load(checkpoint, weights_only=True)["model"], checkpoint)
    assert checkpoint_labels(checkpoint) == []
    status, line, predictions = evaluate("bare", REORDERED)
    assert status == 0, line
    assert predictions["label_names"].tolist() == ["blue", "red", "green"]
    assert np.array_equal(predictions["scores"], plain["scores"])
    status, line, _ = evaluate("matched", {**REORDERED, **MATCH})
    assert status == 1
    assert "model.pth holds no label names" in line


def test_the_checkpoint_knows_how_frequent_its_labels_are(evaluate, checkpoint, tmp_path):
    def frequency(name):
        (path,) = (tmp_path / name).glob("inference/*/metrics.json")
        return json.loads(path.read_text())["frequency"]

    bounds = {"TEST.FREQUENCY_GROUPS": "(10, 100)"}
    status, _, predictions = evaluate("unknown", bounds)
    assert status == 0
    log = (tmp_path / "unknown/log.txt").read_text()
    assert "does not say how many training images have each label" in log
    assert "label_counts" not in predictions
    assert frequency("unknown")["counted"] == "test"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "label_counts": [7, 2000, 40]}, checkpoint)
    status, line, predictions = evaluate("known", {**REORDERED, **MATCH, **bounds})
    assert (status, line) == (0, "")
    assert predictions["label_counts"].tolist() == [40, 7, 2000]
    found = frequency("known")
    assert found["counted"] == "training"
    assert {name: (g["labels"], g["most"]) for name, g in found["groups"].items()} == {
        "frequent": (1, 2000),
        "middle": (1, 40),
        "rare": (1, 7),
    }


@pytest.mark.parametrize("counts", [5, [1, 2], [1, 2, -3], [1, 2, 3.0], [1, 2, "3"], {"red": 1}])
def test_label_counts_that_are_none_are_refused(error_line, checkpoint, counts):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "label_counts": counts}, checkpoint)
    line = error_line(training_counts, checkpoint, COLOURS)
    assert "model.pth has label_counts that are not a number of images" in line


def test_a_label_that_was_not_trained_has_no_training_image(checkpoint):
    assert training_counts(checkpoint, COLOURS) is None
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "label_counts": [7, 2000, 40]}, checkpoint)
    assert training_counts(checkpoint, ["teal", "blue", "red"]) == [0, 40, 7]


@pytest.mark.parametrize("label_names", [5, "red", {"red": 1}, [1, 2, 3]])
def test_label_names_that_are_none_are_refused(evaluate, checkpoint, label_names):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "label_names": label_names}, checkpoint)
    status, line, _ = evaluate("broken", {})
    assert status == 1
    assert "model.pth has label_names that are not" in line


@pytest.mark.parametrize("test_set", ["json", "csv"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("", "MODEL.WEIGHTS is empty"),
        ("gone.pth", "gone.pth"),
        ("setup.py", "setup.py: not a .pth file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(evaluate, csv_file, test_set, weights, message):
    data = csv_file("000001.png,green") if test_set == "csv" else {}
    status, line, _ = evaluate("refused", {**data, "MODEL.WEIGHTS": weights})
    assert status == 1
    assert line.startswith("train: ")
    assert message in line


def test_where_each_label_is():
    assert match_labels(["a", "b"], ["a", "b"], False, "x.pth") == [0, 1]
    assert match_labels(["c", "a"], ["a", "b", "c"], True, "x.pth") == [2, 0]


def test_only_what_is_selected_is_handed_out():
    class Model(nn.Module):
        def forward(self, batched_inputs):
            values = [torch.tensor([0.0, 1.0, 2.0]) + x["image"] for x in batched_inputs]
            return [{"logits": v, "scores": v.sigmoid(), "presence": v} for v in values]

    outputs = SelectLabels(Model(), [2, 0])([{"image": 0}, {"image": 10}])
    assert [output["logits"].tolist() for output in outputs] == [[2, 0], [12, 10]]
    for output in outputs:
        assert output.keys() == {"scores", "logits"}
        assert torch.equal(output["scores"], output["logits"].sigmoid())


def test_a_model_is_told_of_its_own_labels_in_its_own_order():
    class Model(nn.Module):
        num_labels = 4

        def forward(self, batched_inputs):
            values = [torch.as_tensor(x["label_states"]) for x in batched_inputs]
            return [{"logits": v, "scores": v} for v in values]

    told = torch.tensor([1.0, 0.0])
    (output,) = SelectLabels(Model(), [2, 0])([{"image": 0, "label_states": told}])
    assert output["logits"].tolist() == [1, 0]
    (output,) = SelectLabels(Model(), [0, 1, 2, 3])([{"label_states": [1, -1, 0, -1]}])
    assert output["logits"].tolist() == [1, -1, 0, -1]
    (output,) = SelectLabels(Model(), [3, 1])([{"label_states": told}])
    assert output["logits"].tolist() == [1, 0]


def test_the_command(options, tmp_path):
    """Labels by name and several views at once."""
    views = {"TEST.AUG.ENABLED": True, "TEST.AUG.SCALES": "(1.0, 1.5)"}
    changes = {**REORDERED, **MATCH, **views}
    result = run_script("tools/train_net.py", *options("whole", changes))
    assert result.returncode == 0, result.stderr[-3000:]
    predictions = read_predictions(tmp_path / "whole")
    assert predictions["label_names"].tolist() == ["blue", "red", "green"]
    assert "mAP" in result.stdout
