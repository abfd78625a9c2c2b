"""Proposals from a file: reading them safely, and training on them."""

import collections
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode

from ia_gcn.data import add_proposals
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


@pytest.mark.slow
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
