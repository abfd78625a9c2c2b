"""tools/find_label_errors.py, run as a user would, on images whose labels can be seen."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.data.datasets.common import register_multilabel
from ia_gcn.engine import Trainer, setup_cfg
from tests.helpers.commands import run_script

COMMAND = "find_label_errors"
LABELS = ["red", "green", "blue"]
IMAGES = 84
# (image, label) that the CSV has otherwise.
WRONG = {("000010.png", "red"), ("000033.png", "blue"), ("000058.png", "green")}
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.OUT_FEATURES": ["res2"],
    "MODEL.LABEL_HEAD.NAME": "LinearHead",
    "INPUT.IMAGE_SIZE": "(48, 64)",
    "MODEL.GLOBAL_POOLING.NAME": "max",
}


@pytest.fixture
def data(tiny_coco, tmp_path):
    """Config keys of a CSV with wrong labels."""
    coco = tiny_coco(IMAGES)
    content = json.loads(Path(coco.json_file).read_text())
    labels = {image["id"]: set() for image in content["images"]}
    for box in content["annotations"]:
        labels[box["image_id"]].add(LABELS[box["category_id"] - 1])
    lines = ["file,labels"]
    for image in content["images"]:
        flipped = {label for name, label in WRONG if name == image["file_name"]}
        lines.append(f"{image['file_name']},{';'.join(sorted(labels[image['id']] ^ flipped))}")
    path = tmp_path / "wrong.csv"
    path.write_text("\n".join(lines) + "\n")
    return {"DATASETS.CUSTOM.TRAIN": path, "DATASETS.CUSTOM.IMAGE_ROOT": coco.image_root}


@pytest.fixture
def arguments(data, repository, tmp_path):
    """The tool's arguments, for a network whose random filters tell the colours apart."""
    config_file = repository / "configs/DigitScenes/ml_gcn.yaml"
    opts = [str(item) for pair in {**SMALL, **data}.items() for item in pair]
    cfg = setup_cfg(str(config_file), [*opts, "DATASETS.CUSTOM.LABELS", str(LABELS)])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    MultiLabelCheckpointer(model, str(tmp_path), label_names=sorted(LABELS)).save("model")
    where = ["--weights", tmp_path / "model.pth", "--output", tmp_path / "found"]
    return ["--config-file", config_file, *where, *opts]


def read(tmp_path):
    with open(tmp_path / "found/label_errors.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_labels_come_first(main, arguments, tmp_path, data):
    status, out, err = main(*arguments)
    assert (status, err) == (0, "")
    rows = read(tmp_path)
    first = rows[: len(WRONG)]
    root = Path(data["DATASETS.CUSTOM.IMAGE_ROOT"])
    assert {(row["file"], row["label"]) for row in first} == {
        (str(root / name), label) for name, label in WRONG
    }
    assert [row["rank"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    for row in first:
        assert (float(row["probability"]) < 0.5) == (row["given"] == "present")
    assert f"custom_train: {len(rows)} of {3 * IMAGES} entries are probably wrong" in out
    assert out.endswith(
        f"{tmp_path / 'found/label_errors.csv'}\n{tmp_path / 'found/label_errors.html'}\n"
    )
    page = (tmp_path / "found/label_errors.html").read_text()
    assert "000010.png" in page
    assert str(tmp_path / "model.pth") in page


def test_the_order_of_the_file_changes_nothing(main, arguments, tmp_path, data):
    main(*arguments)
    before = (tmp_path / "found/label_errors.csv").read_bytes()
    header, *lines = data["DATASETS.CUSTOM.TRAIN"].read_text().splitlines()
    data["DATASETS.CUSTOM.TRAIN"].write_text("\n".join([header, *lines[::-1]]) + "\n")
    main(*arguments, "TEST.IMS_PER_BATCH", 50)
    assert (tmp_path / "found/label_errors.csv").read_bytes() == before


def test_unknown_entries_are_not_doubted_and_rare_labels_are_named(main, arguments, tmp_path, data):
    """A registered data set; its unknown entries are given as the image does not have them."""
    setup_cfg("", [item for pair in data.items() for item in map(str, pair)])
    dicts = DatasetCatalog.get("custom_train")
    rng = np.random.default_rng(0)
    for record in dicts:
        unknown = set(np.flatnonzero(rng.random(3) < 0.2).tolist()) - {0}
        record["labels"] = [label for label in record["labels"] if label not in {0, *unknown}]
        record["ignored_labels"] = sorted(unknown)
    dicts[0]["labels"].append(0)
    register_multilabel("mine", lambda: dicts, sorted(LABELS))
    keys = arguments.index("DATASETS.CUSTOM.TRAIN")
    options = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]
    options += ["MODEL.LABEL_HEAD.NUM_LABELS", 3]
    status, out, err = main(*arguments[:keys], *options)
    assert (status, err) == (0, "")
    assert "1 label(s) are not judged" in out
    assert "fewer than 5 images: blue\n" in out
    unknown = {
        (record["file_name"], sorted(LABELS)[label])
        for record in dicts
        for label in record["ignored_labels"]
    }
    rows = read(tmp_path)
    assert unknown
    assert not unknown & {(row["file"], row["label"]) for row in rows}
    assert "blue" not in {row["label"] for row in rows}


def fails(result):
    """The one line on stderr of a command that fails."""
    status, _, err = result
    assert status == 1
    assert err.startswith("find_label_errors: ")
    assert err.count("\n") == 1
    return err


def test_errors_are_one_line(main, arguments, tmp_path):
    assert "DATASETS.TRAIN is empty" in fails(
        main(*arguments[: arguments.index("DATASETS.CUSTOM.TRAIN")], "DATASETS.TRAIN", "()")
    )
    assert "--folds 85: custom_train has 84 images" in fails(main(*arguments, "--folds", 85))
    assert "model.pth" in fails(main(*arguments, "--output", tmp_path / "model.pth"))
    weights = arguments.index("--weights")
    without = arguments[:weights] + arguments[weights + 2 :]
    assert "MODEL.WEIGHTS is empty" in fails(main(*without))
    other = ["DATASETS.CUSTOM.LABELS", str(["cat", *LABELS])]
    assert "cat" in fails(main(*arguments, *other))
    with pytest.raises(SystemExit):
        main(*arguments, "--folds", 1)


def test_errors_end_the_command_with_status_1(repository):
    config = repository / "configs/DigitScenes/ml_gcn.yaml"
    result = run_script(
        "tools/find_label_errors.py", "--config-file", config, "DATASETS.TRAIN", "()"
    )
    assert result.returncode == 1
    assert result.last_line.startswith("find_label_errors: ")
