"""The evaluator: each image once, whatever the processes and the order, and what it writes."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ia_gcn.evaluation import Conventions, MultiLabelEvaluator, multi_label_metrics

LABELS = ["cat", "dog", "sea", "sky"]


@pytest.fixture
def predictions():
    """(image ids, scores (n, 4), targets (n, 4)); nothing has the label sky."""
    rng = np.random.default_rng(0)
    scores = rng.random((30, 4)).astype(np.float32).round(1)
    targets = rng.choice([1, 0, -1], (30, 4), p=[0.4, 0.5, 0.1])
    targets[targets[:, 3] == 1, 3] = 0
    return [f"image{i:02d}" for i in range(30)], scores, targets


@pytest.fixture
def data_set():
    DatasetCatalog.register("four_labels", list)
    MetadataCatalog.get("four_labels").set(thing_classes=LABELS)
    return "four_labels"


def process(evaluator, predictions, indices):
    ids, scores, targets = predictions
    inputs = [{"image_id": ids[i], "labels": torch.tensor(targets[i]).float()} for i in indices]
    evaluator.process(inputs, [{"scores": torch.tensor(scores[i])} for i in indices])


def test_results_are_those_of_the_pure_function(data_set, predictions, tmp_path):
    evaluator = MultiLabelEvaluator(data_set, str(tmp_path), threshold=0.6, top_k=2)
    process(evaluator, predictions, range(30))
    results = evaluator.evaluate()["multi_label"]
    expected = multi_label_metrics(predictions[1], predictions[2], threshold=0.6)
    top = multi_label_metrics(predictions[1], predictions[2], threshold=0.6, top_k=2)
    for key in ("CP", "CR", "CF1", "OP", "OR", "OF1"):
        assert results[key] == expected[key]
        assert results[f"{key}_top2"] == top[key]
    assert results["mAP"] == expected["mAP"]


def test_neither_order_nor_batches_nor_repetition_matter(data_set, predictions, tmp_path):
    files = []
    for name, batches in [
        ("a", [range(30)]),
        ("b", [range(20, 30), range(10), range(5, 15), range(12, 25)]),
    ]:
        evaluator = MultiLabelEvaluator(data_set, str(tmp_path / name))
        for batch in batches:
            process(evaluator, predictions, batch)
        evaluator.evaluate()
        files.append(tmp_path / name)
    assert (files[0] / "metrics.json").read_text() == (files[1] / "metrics.json").read_text()
    with np.load(files[0] / "predictions.npz") as a, np.load(files[1] / "predictions.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_what_it_writes(data_set, predictions, tmp_path, caplog):
    evaluator = MultiLabelEvaluator(data_set, str(tmp_path))
    process(evaluator, predictions, range(30))
    with caplog.at_level(logging.DEBUG):
        results = evaluator.evaluate()["multi_label"]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["images"] == 30
    assert written["dataset"] == data_set
    assert {key: written[key] for key in results} == results
    assert list(written["AP"]) == LABELS
    assert written["AP"]["sky"] is None
    with np.load(tmp_path / "predictions.npz") as file:
        assert file["image_ids"].tolist() == predictions[0]
        assert np.array_equal(file["scores"], predictions[1])
        assert np.array_equal(file["targets"], predictions[2])
        assert file["label_names"].tolist() == LABELS
    assert "1 label(s) without a positive are left out of mAP, CP and CR: sky" in caplog.text
    assert f"{results['mAP']:.2f}" in caplog.text


@pytest.mark.parametrize("ignored", ["nowhere", "everywhere"])
def test_labels_of_which_no_image_is_a_negative_are_warned_of(data_set, caplog, ignored):
    targets = np.array([[1, -1, 0, 0], [-1, 1, 1, 0], [1, 0, -1, -1]])
    evaluator = MultiLabelEvaluator(data_set, conventions=Conventions(ignored=ignored))
    process(evaluator, (range(3), np.full((3, 4), 0.5, np.float32), targets), range(3))
    evaluator.evaluate()
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    expected = (
        "four_labels: 1 label(s) are known to be absent in no image, so that their AP is 100 "
        "whatever the scores: cat"
    )
    assert warned == ([expected] if ignored == "nowhere" else [])


@pytest.mark.slow
def test_known_labels_may_count_in_f1(data_set, tmp_path):
    """Their states come with the inputs; some images have none."""
    rng = np.random.default_rng(0)
    scores, truth = rng.random((20, 4)).astype(np.float32), rng.integers(0, 2, (20, 4))
    told = rng.random((20, 4)) < 0.5
    told[:5] = False
    targets, known = np.where(told, -1, truth), np.where(told, truth, -1)
    evaluator = MultiLabelEvaluator(
        data_set, str(tmp_path), conventions=Conventions(known_in_f1=True), report={}
    )
    for i in reversed(range(20)):
        image = {"image_id": i, "labels": torch.tensor(targets[i]).float()}
        if i >= 5:
            image["label_states"] = torch.tensor(known[i]).float()
        evaluator.process([image], [{"scores": torch.tensor(scores[i])}])
    results = evaluator.evaluate()["multi_label"]
    everything = multi_label_metrics(scores, truth)
    for key in ("CP", "CR", "CF1", "OP", "OR", "OF1"):
        assert results[key] == everything[key]
    assert results["mAP"] == multi_label_metrics(scores, targets)["mAP"]
    with np.load(tmp_path / "predictions.npz") as file:
        assert np.array_equal(file["targets"], targets)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{results['OF1']:.2f}" in page
    assert "measured in all measures of the table but mAP" in page


def test_an_image_that_two_processes_have_counts_once(data_set, predictions, monkeypatch):
    evaluators = [MultiLabelEvaluator(data_set) for _ in range(2)]
    gathered = []
    monkeypatch.setattr(comm, "gather", lambda parts: [*gathered, parts])
    for evaluator, indices in zip(evaluators, (range(12, 30), range(18))):
        process(evaluator, predictions, indices)
        gathered.append(evaluator._collected.parts())
    gathered.pop()
    results = evaluators[1].evaluate()["multi_label"]
    assert results["mAP"] == multi_label_metrics(predictions[1], predictions[2])["mAP"]


def test_only_the_main_process_reports(data_set, predictions, monkeypatch, tmp_path):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    evaluator = MultiLabelEvaluator(data_set, str(tmp_path / "out"))
    process(evaluator, predictions, range(3))
    assert evaluator.evaluate() is None
    assert not (tmp_path / "out").exists()


def test_reset_forgets(data_set, predictions):
    evaluator = MultiLabelEvaluator(data_set)
    process(evaluator, predictions, range(30))
    evaluator.reset()
    process(evaluator, predictions, range(10))
    results = evaluator.evaluate()["multi_label"]
    expected = multi_label_metrics(predictions[1][:10], predictions[2][:10])
    assert results["mAP"] == expected["mAP"]


def test_no_image_at_all_is_no_crash(data_set):
    assert np.isnan(MultiLabelEvaluator(data_set).evaluate()["multi_label"]["mAP"])
