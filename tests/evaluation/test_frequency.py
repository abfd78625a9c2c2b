"""mAP of frequent, middle and rare labels against scikit-learn and plain loops."""

import json
import math
import re

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ia_gcn.evaluation import (
    MultiLabelEvaluator,
    frequency_table,
    measure_by_frequency,
    metrics_tables,
    multi_label_metrics,
)
from tests.helpers.strategies import predictions

RNG = np.random.default_rng(0)
TARGETS = (RNG.random((200, 7)) < [0.5, 0.1, 0.3, 0.05, 0.4, 0.2, 0.0]).astype(np.int8)
SCORES = np.clip(RNG.random((200, 7)) * 0.8 + 0.2 * TARGETS, 0, 1).astype(np.float32)
COUNTS = [100, 101, 10, 11, 0, 5000, 7]
# scikit-learn's; the last label is in no image.
AP = [*(100 * average_precision_score(TARGETS[:, i], SCORES[:, i]) for i in range(6)), math.nan]


def mean_ap(labels):
    return pytest.approx(np.mean([AP[label] for label in labels]), abs=1e-9)


def found_ap():
    return multi_label_metrics(SCORES, TARGETS)["AP"]


def test_the_groups_of_lvis():
    found = measure_by_frequency(found_ap(), TARGETS, COUNTS, (10, 100))
    assert found.counted == "training"
    assert list(found.groups) == ["frequent", "middle", "rare"]
    assert found.groups["rare"] == (2, 0, 10, mean_ap([2, 4]))
    assert found.groups["middle"] == (2, 11, 100, mean_ap([0, 3]))
    assert found.groups["frequent"] == (2, 101, 5000, mean_ap([1, 5]))
    assert measure_by_frequency(found_ap(), TARGETS, COUNTS, (100, 10)) == found


def test_thirds_of_the_labels_that_are_measured():
    found = measure_by_frequency(found_ap(), TARGETS, COUNTS)
    assert found.groups["rare"] == (2, 0, 10, mean_ap([4, 2]))
    assert found.groups["middle"] == (2, 11, 100, mean_ap([3, 0]))
    assert found.groups["frequent"] == (2, 101, 5000, mean_ap([1, 5]))
    parts = [group.mAP for group in found.groups.values()]
    assert np.mean(parts) == pytest.approx(multi_label_metrics(SCORES, TARGETS)["mAP"])


def test_without_counts_the_images_that_are_measured_count():
    found = measure_by_frequency(found_ap(), TARGETS, bounds=(10, 100))
    assert found.counted == "test"
    images = TARGETS.sum(axis=0).tolist()
    assert found.groups["rare"] == (2, images[3], images[1], mean_ap([3, 1]))
    assert found.groups["frequent"] == (2, images[4], images[0], mean_ap([4, 0]))


@settings(max_examples=60)
@given(predictions(), st.data())
def test_every_label_with_an_ap_is_in_one_group(prediction, data):
    scores, targets = prediction
    ap, num_labels = multi_label_metrics(scores, targets)["AP"], targets.shape[1]
    sizes = st.lists(st.integers(0, 6), min_size=num_labels, max_size=num_labels)
    counts = data.draw(st.none() | sizes)
    bounds = data.draw(st.just(()) | st.tuples(st.integers(0, 6), st.integers(0, 6)))
    found = measure_by_frequency(ap, targets, counts, bounds)
    images = counts or [column.count(1) for column in targets.T.tolist()]
    measured = [label for label in range(num_labels) if 1 in targets[:, label]]
    assert sum(group.labels for group in found.groups.values()) == len(measured)
    if counts and bounds:
        for label_counts, group in (
            (range(min(bounds) + 1), found.groups["rare"]),
            (range(min(bounds) + 1, max(bounds) + 1), found.groups["middle"]),
            (range(max(bounds) + 1, 10), found.groups["frequent"]),
        ):
            inside = [label for label in measured if images[label] in label_counts]
            assert group.labels == len(inside)
            if inside:
                assert group.mAP == pytest.approx(sum(ap[i] for i in inside) / len(inside))
    else:
        sizes = [group.labels for group in found.groups.values()]
        assert sizes == sorted(sizes)
        assert sizes[2] - sizes[0] <= 1
    ranges = [group[1:3] for group in reversed(found.groups.values()) if group.labels]
    flat = [images for pair in ranges for images in pair]
    assert flat == sorted(flat)
    assert found.summary().keys() == {
        f"mAP_{name}" for name, group in found.groups.items() if group.labels
    }


def test_an_empty_group_has_no_figure():
    found = measure_by_frequency(found_ap(), TARGETS, [200] * 7, (10, 100))
    assert found.summary().keys() == {"mAP_frequent"}
    rows = [
        [cell.strip() for cell in line.split("|")] for line in frequency_table(found).split("\n")
    ]
    assert rows[0][1:5] == ["", "labels", "training images of each", "mAP"]
    assert rows[2][1:5] == ["frequent", "6", "200", f"{np.mean(AP[:6]):.2f}"]
    assert rows[4][1:5] == ["rare", "0", "–", ""]


@pytest.mark.parametrize(("counts", "counted"), [(COUNTS, "training"), (None, "test")])
def test_an_evaluation_reports_them(tmp_path, counts, counted):
    DatasetCatalog.register("seven", list)
    MetadataCatalog.get("seven").thing_classes = list("abcdefg")
    evaluator = MultiLabelEvaluator(
        "seven", str(tmp_path), label_counts=counts, frequency_groups=(10, 100)
    )
    for image_id, (scores, targets) in enumerate(zip(SCORES, TARGETS)):
        image = {"image_id": image_id, "labels": torch.tensor(targets)}
        evaluator.process([image], [{"scores": torch.tensor(scores)}])
    results = evaluator.evaluate()["multi_label"]
    found = measure_by_frequency(found_ap(), TARGETS, counts, (10, 100))
    assert {key: results[key] for key in results if key.startswith("mAP_")} == found.summary()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["frequency"]["counted"] == counted
    assert metrics["frequency"]["groups"]["rare"] == found.groups["rare"]._asdict()
    assert metrics["mAP_rare"] == found.groups["rare"].mAP
    assert frequency_table(found) in metrics_tables(metrics, 3)
    with np.load(tmp_path / "predictions.npz") as file:
        assert file["label_counts"].tolist() == counts if counts else "label_counts" not in file


def test_the_tables_of_many_labels_are_short():
    ap = {f"label {i}": i / 100 for i in range(9605)} | {f"none {i}": None for i in range(400)}
    groups = {"counted": "test", "groups": {}}
    summary = dict.fromkeys(("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"), 50.0)
    text = metrics_tables({**summary, "AP": ap, "frequency": groups}, None)
    assert len(text) < 4000
    for i in (0, 11, 9593, 9604):
        assert re.search(rf"\| label {i} +\| +{i / 100:.2f} ", text)
    assert not re.search(r"\| label (12|9592) ", text)
    assert "AP of 9,605 labels; all are in metrics.json" in text
    assert "400 label(s) without a positive" in text
    assert text.endswith("none 9 and 390 more")
    # Of a hundred, all are there.
    few = {name: value for name, value in ap.items() if name in list(ap)[:100]}
    text = metrics_tables({**summary, "AP": few, "frequency": groups}, None)
    assert all(re.search(rf"\| {name} ", text) for name in few)
