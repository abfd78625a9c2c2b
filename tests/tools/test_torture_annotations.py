"""tools/torture.py annotations: a small form of it, and holes that it has to find."""

import argparse
import os

import pytest
from tortures import annotations as torture

from ia_gcn.data.datasets import coco, custom, voc


def trials(output, number, seed=0):
    args = argparse.Namespace(seed=seed, trials=number, output=output)
    done = list(torture.run(args))
    assert len(done) == number
    return done


@pytest.mark.slow
def test_damaged_annotations_do_no_harm(tmp_path):
    done = trials(tmp_path, 200)
    assert not [trial for trial in done if trial.is_finding]
    for kind in torture.KINDS:
        assert {trial.outcome for trial in done if trial.kind == kind} == {"read", "refused"}
    assert not list(tmp_path.iterdir())


def join(root, file_name, source):
    return os.path.join(root, "..", str(file_name))


HOLES = {
    "names that lead out": ("COCO JSON", coco, "join_inside", join),
    "files that are there twice": ("CSV", custom, "check_files_differ", lambda *_: None),
    "any label name": ("COCO JSON", coco, "check_label_name", lambda name, place: None),
    "messages of many lines": ("COCO JSON", coco, "excerpt", lambda value: "a\nb"),
    "any box": (
        "VOC",
        voc,
        "_box",
        lambda item, label, file: {"bbox": [float("nan")] * 4, "category_id": label},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("hole", HOLES)
def test_a_hole_is_found(tmp_path, monkeypatch, hole):
    kind, module, name, instead = HOLES[hole]
    monkeypatch.setattr(module, name, instead)
    monkeypatch.setattr(torture, "KINDS", {kind: torture.KINDS[kind]})
    found = [trial for trial in trials(tmp_path, 60) if trial.is_finding]
    assert found
    assert len(list((tmp_path / "annotations-found").iterdir())) == len(found)


RECORD = {"file_name": "photos/a.png", "image_id": 1, "labels": [0, 2]}


@pytest.mark.parametrize(
    "change",
    [
        {"file_name": "photos/../a.png"},
        {"file_name": "other/a.png"},
        {"image_id": 2**63},
        {"labels": [2, 0]},
        {"labels": [3]},
        {"labels": [True]},
        {"labels": [0], "ignored_labels": [0]},
        {"annotations": [{"bbox": [0, 0, float("inf"), 1], "category_id": 0}]},
        {"annotations": [{"bbox": [0, 0, 1, 1], "category_id": 1}]},
    ],
)
def test_what_a_data_set_must_not_have(change):
    torture.check_dicts([RECORD], "photos", 3)
    with pytest.raises(AssertionError):
        torture.check_dicts([{**RECORD, **change}], "photos", 3)


def test_the_same_file_or_id_twice_is_found():
    for other in ({"image_id": 2}, {"file_name": "photos/b.png"}):
        with pytest.raises(AssertionError, match="twice"):
            torture.check_dicts([RECORD, {**RECORD, **other}], "photos", 3)
