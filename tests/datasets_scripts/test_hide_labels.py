"""datasets/hide_labels.py as a user runs it, and what DATASETS.CUSTOM makes of its files."""

import json
import shlex

import pytest
from detectron2.data import DatasetCatalog

from ia_gcn.data import get_label_names, register_multilabel_coco, register_multilabel_voc
from ia_gcn.data.dataset_mapper import read_image, target_vector
from ia_gcn.data.datasets import (
    load_multilabel_coco,
    load_multilabel_csv,
    load_multilabel_shards,
)
from ia_gcn.data.datasets.common import register_multilabel
from ia_gcn.data.hidden_labels import hide_labels, keep_of_each_image, keep_one_positive
from ia_gcn.engine import setup_cfg
from tests.helpers.commands import run_script
from tests.helpers.shards import tiny_shards

SCRIPT = "datasets/hide_labels.py"


def targets_of(dicts, num_labels=3):
    return {d["image_id"]: target_vector(d, num_labels).tolist() for d in dicts}


def custom_targets(path, root):
    """By file name."""
    keys = {"TRAIN": path, "IMAGE_ROOT": root, "HOLD_OUT": 0.0, "UNLABELED": "unknown"}
    setup_cfg("", [part for k, v in keys.items() for part in (f"DATASETS.CUSTOM.{k}", str(v))])
    labels = get_label_names(["custom_train"])
    dicts = DatasetCatalog.get("custom_train")
    return {
        d["file_name"]: dict(zip(labels, target_vector(d, len(labels)).tolist())) for d in dicts
    }


def test_a_registered_data_set(tiny_coco, tmp_path):
    data = tiny_coco(21)
    register_multilabel_coco("tiny", data.json_file, data.image_root, data.label_names)
    out = tmp_path / "known.json"
    result = run_script(SCRIPT, "tiny", out, "--known", 0.34, "--seed", 3)
    assert result.returncode == 0, result.stderr
    assert "21 images, 3 labels; 33.3% of the entries are known" in result.stdout
    assert f"DATASETS.CUSTOM.IMAGE_ROOT {data.image_root}" in result.stdout
    assert "UNLABELED" not in result.stdout

    found = load_multilabel_coco(str(out), data.image_root, data.label_names)
    whole = DatasetCatalog.get("tiny")
    expected = hide_labels(whole, 3, keep_of_each_image(0.34), 3)
    assert targets_of(found) == targets_of(expected)
    assert [d["file_name"] for d in found] == [d["file_name"] for d in whole]
    # Boxes stay with the labels that do.
    assert [d["annotations"] for d in found] == [d["annotations"] for d in expected]
    assert sum(len(d["annotations"]) for d in found) < sum(len(d["annotations"]) for d in whole)


def test_tar_shards(tiny_coco, tmp_path):
    """Their images stay in them."""
    index, out = tiny_shards(tiny_coco(9), tmp_path / "shards"), tmp_path / "known.json"
    result = run_script(SCRIPT, index, out, "--single-positive")
    assert result.returncode == 0, result.stderr
    root = f"tar://{index.parent}"
    assert f"DATASETS.CUSTOM.IMAGE_ROOT {root}" in result.stdout
    whole = load_multilabel_shards(str(index), "", ["red", "green", "blue"])
    names = {record["file_name"] for record in whole}
    found = load_multilabel_coco(str(out), root, ["red", "green", "blue"])
    assert {record["file_name"] for record in found} == names
    assert all(read_image(name).shape == (24, 32, 3) for name in names)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_csv(tmp_path, ending):
    table, out = tmp_path / "train.csv", tmp_path / f"out.{ending}"
    lines = [f"sub/{i:02d}.png,{'cat;dog;emu' if i % 2 else 'dog'}\n" for i in range(12)]
    table.write_text("".join(lines))
    result = run_script(SCRIPT, table, out, "--single-positive")
    assert result.returncode == 0, result.stderr
    assert "12 present of 24, 0 absent" in result.stdout
    whole = load_multilabel_csv(str(table), "photos", ["cat", "dog", "emu"])
    expected = hide_labels(whole, 3, keep_one_positive(), 0)
    found = custom_targets(out, "photos")
    assert [list(targets.values()) for targets in found.values()] == list(
        targets_of(expected).values()
    )
    assert list(found) == [d["file_name"] for d in whole]
    # The order of the lines makes no difference.
    table.write_text("".join(lines[::-1]))
    again = tmp_path / f"again.{ending}"
    assert run_script(SCRIPT, table, again, "--single-positive").returncode == 0
    assert custom_targets(again, "photos") == found


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_the_printed_training_has_a_test_set_with_known_negatives(tmp_path, ending):
    names = {"train.csv": "a.png,cat;dog\nb.png,cat\n", "test.csv": "c.png,cat;!dog\nd.png,dog\n"}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    out = tmp_path / f"out.{ending}"
    result = run_script(SCRIPT, tmp_path / "train.csv", out, "--single-positive")
    words = shlex.split(result.stdout.splitlines()[-1])
    assert words[:2] == ["tools/train_net.py", "--config-file"]
    files = {"TEST": str(tmp_path / "test.csv"), "IMAGES": "photos"}
    labels = ["DATASETS.CUSTOM.LABELS", "('cat', 'dog')"]
    setup_cfg(words[2], [files.get(word, word) for word in words[3:]] + labels)
    # With UNLABELED unknown, a test file's silence is unknown, too.
    silence = -1 if ending == "csv" else 0
    test = targets_of(DatasetCatalog.get("custom_test"), 2)
    assert test == {"c.png": [1, 0], "d.png": [silence, 1]}
    for target in targets_of(DatasetCatalog.get("custom_train"), 2).values():
        assert sorted(target) == [-1, 1]


@pytest.mark.parametrize(
    ("names", "root", "written"),
    [
        (["s3://photos/a/1.png", "s3://photos/b/1.png"], "s3://photos", ["a/1.png", "b/1.png"]),
        (["/data/ab/1.png", "/data/ac/1.png"], "/data", ["ab/1.png", "ac/1.png"]),
        (["sub/1.png", "2.png"], "IMAGES", ["sub/1.png", "2.png"]),
    ],
)
def test_the_images_of_a_registered_data_set_may_be_anywhere(tmp_path, names, root, written):
    dicts = [{"file_name": name, "image_id": name, "labels": [0]} for name in names]
    register_multilabel("anywhere", lambda: dicts, ["cat"])
    result = run_script(SCRIPT, "anywhere", tmp_path / "out.csv", "--known", 1)
    assert f"IMAGE_ROOT {root} " in result.stdout
    lines = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert lines == [f"{name},cat" for name in written]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["/data/1.png", "2.png"], "is not in this folder"),
        (["photos/ 1.png", "photos/2.png"], "' 1.png' can't be in a CSV"),
        (["1.png ", "2.png"], "'1.png ' can't be in a CSV"),
        (['"1".png', "2.png"], "can't be in a CSV"),
    ],
)
def test_file_names_that_can_not_be_read_again_are_refused(tmp_path, names, says):
    dicts = [{"file_name": name, "image_id": name, "labels": [0]} for name in names]
    register_multilabel("anywhere", lambda: dicts, ["cat"])
    result = run_script(SCRIPT, "anywhere", tmp_path / "out.csv", "--known", 1)
    assert result.returncode == 1
    assert says in result.last_line
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("by", ["image", "entry", "label"])
def test_all_known_is_what_it_was(tiny_coco, tmp_path, by):
    data = tiny_coco(8)
    for ending in ("csv", "json"):
        out = tmp_path / f"{by}.{ending}"
        result = run_script(SCRIPT, data.json_file, out, "--known", 1, "--by", by)
        assert result.returncode == 0, result.stderr
        whole = load_multilabel_coco(data.json_file, data.image_root, data.label_names)
        expected = {
            d["file_name"]: dict(zip(data.label_names, target_vector(d, 3).tolist())) for d in whole
        }
        assert custom_targets(out, data.image_root) == expected


def test_ignored_labels_become_unknown(tmp_path):
    """VOC's difficult objects; and boxes of the corner format."""
    root = tmp_path / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>1</xmin>"
        "<ymin>2</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object>"
        for name, difficult in (("dog", 0), ("cat", 1))
    )
    (root / "Annotations/000001.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets/Main/trainval.txt").write_text("000001\n")
    register_multilabel_voc("tiny_voc", str(root), "trainval", 2007)
    out = tmp_path / "known.json"
    assert run_script(SCRIPT, "tiny_voc", out, "--known", 1).returncode == 0
    (targets,) = custom_targets(out, root / "JPEGImages").values()
    states = {"dog": 1, "cat": -1}
    assert targets == {name: states.get(name, 0) for name in targets}
    (box,) = json.loads(out.read_text())["annotations"]
    assert box["bbox"] == [0, 1, 5, 8]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("none.json", "out.json", "--known", "0.5"), "none.json"),
        (("train.csv", "out.txt", "--known", "0.5"), "out.txt"),
        (("train.csv", "train.csv", "--known", "0.5"), "train.csv"),
        (("train.csv", "train.csv/out.csv", "--known", "0.5"), "train.csv"),
        (("odd.json", "out.csv", "--known", "0.5"), "'cat;dog'"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, says):
    (tmp_path / "train.csv").write_text("a.png,cat\n")
    images = [{"id": 1, "file_name": "a.png"}]
    odd = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat;dog"}]}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    result = run_script(SCRIPT, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("hide_labels: ")
    assert says in result.last_line
    assert (tmp_path / "train.csv").read_text() == "a.png,cat\n"


@pytest.mark.parametrize(
    "options", [(), ("--known", "2"), ("--single-positive", "--by", "label"), ("--known",)]
)
def test_options_that_do_not_fit(options):
    assert run_script(SCRIPT, "train.csv", "out.csv", *options).returncode == 2


def test_help_names_the_protocols():
    result = run_script(SCRIPT, "--help")
    assert result.returncode == 0
    assert "Durand" in result.stdout
    assert "Cole" in result.stdout
