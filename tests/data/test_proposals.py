"""Proposals from a file: reading them safely, and training on them."""

import collections
import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode

from ia_gcn.data import add_proposals
from ia_gcn.errors import InputError
from ia_gcn.io.plain_pickle import load_plain_pickle
from tests.helpers.commands import run_script

BOXES = [[[0, 0, 8, 8], [4, 4, 30, 20], [1, 2, 3, 4]], [], [[5, 5, 9, 9]]]
LOGITS = [[0.5, 2.0, -1.0], [], [0.0]]


def content(**changes):
    """Of a proposal file in detectron2's format, for the images 1, 2 and 3."""
    return {
        "ids": [1, 2, 3],
        "boxes": [np.array(boxes, np.float32).reshape(-1, 4) for boxes in BOXES],
        "objectness_logits": [np.array(logits, np.float32) for logits in LOGITS],
        "bbox_mode": int(BoxMode.XYXY_ABS),
        **changes,
    }


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return str(path)


def records(*image_ids):
    return [{"image_id": image_id, "file_name": f"{image_id}.png"} for image_id in image_ids]


# load_plain_pickle


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_and_arrays_are_read(tmp_path, protocol):
    value = {
        "text": "ä",
        "bytes": b"\x00\xff",
        "nested": [(1, 2.5, None, True), {"b": []}],
        "ordered": collections.OrderedDict(a=1),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "column": np.arange(6.0).reshape(2, 3)[:, 1],
        "scalar": np.float32(0.5),
    }
    with open(write(tmp_path / "a.pkl", value, protocol), "rb") as file:
        found = load_plain_pickle(file, "a.pkl")
    assert str(found) == str(value)
    assert found["array"].dtype == np.int16


def test_numpy_is_read_by_both_of_its_names(tmp_path):
    data = pickle.dumps(np.arange(3), protocol=2)
    ours = b"numpy._core.multiarray" if b"numpy._core" in data else b"numpy.core.multiarray"
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        (tmp_path / "a.pkl").write_bytes(data.replace(ours, name))
        with open(tmp_path / "a.pkl", "rb") as file:
            assert load_plain_pickle(file, "a.pkl").tolist() == [0, 1, 2]


class Runs:
    """Its pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, protocol, error_line):
    witness = str(tmp_path / "witness")
    attacks = {
        f"{os.mkdir.__module__}.mkdir": Runs(os.mkdir, witness),
        "builtins.eval" if protocol > 2 else ".eval": Runs(eval, f"open({witness!r}, 'w')"),
        ".getattr": Runs(getattr, "", "join"),
        "check_call": Runs(subprocess.check_call, ["touch", witness]),
        "ia_gcn": [np.array([InputError("in an array of objects")], dtype=object)],
    }
    for name, attack in attacks.items():
        path = write(tmp_path / "evil.pkl", attack, protocol)
        with open(path, "rb") as file:
            message = error_line(load_plain_pickle, file, "evil.pkl")
        assert "evil.pkl" in message
        assert name in message
    assert not os.path.exists(witness)


@pytest.mark.parametrize("data", [b"", b"text", pickle.dumps([1, 2])[:-3], b"\x80\x04R."])
def test_what_is_no_pickle_is_refused(tmp_path, data, error_line):
    (tmp_path / "a.pkl").write_bytes(data)
    with open(tmp_path / "a.pkl", "rb") as file:
        assert "a.pkl" in error_line(load_plain_pickle, file, "a.pkl")


# add_proposals


def test_each_image_gets_its_proposals_best_first(tmp_path):
    dicts = records(3, 1, 2)
    add_proposals(dicts, write(tmp_path / "p.pkl", content()))
    by_id = {record["image_id"]: record for record in dicts}
    assert by_id[1]["proposal_boxes"].tolist() == [BOXES[0][1], BOXES[0][0], BOXES[0][2]]
    assert by_id[1]["proposal_objectness_logits"].tolist() == [2.0, 0.5, -1.0]
    assert by_id[2]["proposal_boxes"].shape == (0, 4)
    assert by_id[3]["proposal_boxes"].tolist() == BOXES[2]
    assert all(record["proposal_bbox_mode"] == BoxMode.XYXY_ABS for record in dicts)


def test_detectron1s_names_and_ids_of_another_type_will_do(tmp_path):
    value = content(indexes=["1", "2", "3"], scores=LOGITS)
    del value["ids"], value["objectness_logits"], value["bbox_mode"]
    dicts = records(1)
    add_proposals(dicts, write(tmp_path / "p.pkl", value))
    assert len(dicts[0]["proposal_boxes"]) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "format"),
        ({"ids": [1]}, "format"),
        (content(bbox_mode=77), "format"),
        (content(ids=[7, 8, 9]), "no image 1"),
        (content(boxes=[]), "image 1"),
        (content(boxes=[[1, 2, 3]] * 3), "image 1"),
        (content(objectness_logits=[[1.0]] * 3), "image 1"),
        (content(boxes=["text"] * 3), "image 1"),
        (content(objectness_logits=[[1.0, float("nan"), 0.0]] * 3), "image 1"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, error_line, value, message):
    path = write(tmp_path / "p.pkl", value)
    line = error_line(add_proposals, records(1), path)
    assert path in line
    assert message in line


def test_a_missing_file_is_named(tmp_path, error_line):
    assert "none.pkl" in error_line(add_proposals, records(1), str(tmp_path / "none.pkl"))


# The whole way: tools/train_net.py on a file of proposals.


@pytest.fixture
def train_net(tiny_coco, tmp_path):
    """A function that trains on tiny images with these options: (result, output folder)."""
    data = tiny_coco(14)

    def call(*opts):
        options = [
            *("DATASETS.CUSTOM.TRAIN", data.json_file, "DATASETS.CUSTOM.TEST", data.json_file),
            *("DATASETS.CUSTOM.IMAGE_ROOT", data.image_root, "INPUT.IMAGE_SIZE", "(64, 64)"),
            *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "INPUT.WITH_BOXES", False),
            *("SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4),
            *("OUTPUT_DIR", tmp_path / "run", *opts),
        ]
        config = ("--config-file", "configs/DigitScenes/ia_gcn.yaml")
        return run_script("tools/train_net.py", *config, *options)

    call.data = data
    return call


def test_training_and_evaluation_on_a_file_of_proposals(train_net, tmp_path):
    boxes = collections.defaultdict(list)
    for annotation in json.loads(Path(train_net.data.json_file).read_text())["annotations"]:
        x, y, w, h = annotation["bbox"]
        boxes[annotation["image_id"]].append([x, y, x + w, y + h])
    value = {
        "ids": list(range(1, 15)),
        "boxes": [np.array(boxes[i], np.float32).reshape(-1, 4) for i in range(1, 15)],
        "objectness_logits": [np.zeros(len(boxes[i]), np.float32) for i in range(1, 15)],
    }
    path = write(tmp_path / "proposals.pkl", value)
    files = f"('{path}',)"
    proposals = ("DATASETS.PROPOSAL_FILES_TRAIN", files, "DATASETS.PROPOSAL_FILES_TEST", files)
    result = train_net("MODEL.LOAD_PROPOSALS", True, *proposals)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run/inference/custom_test/metrics.json").exists()
    for opts, message in [
        (("MODEL.LOAD_PROPOSALS", True), "0 proposal files"),
        ((), "MODEL.LOAD_PROPOSALS must be True"),
    ]:
        result = train_net(*opts)
        assert result.returncode == 1
        assert message in result.last_line
