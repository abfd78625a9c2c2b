"""Evaluations whose scores are in files: the same figures and files, and nothing that is left."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.evaluation import (
    Conventions,
    MultiLabelEvaluator,
    collected,
    html_report,
    label_blocks,
    multi_label_metrics,
    read_predictions,
)
from ia_gcn.io.files import remove_unfinished
from tests.helpers.commands import ROOT, run_process
from tests.helpers.strategies import predictions as random_predictions

FILES = {"metrics.json", "per_label.csv", "predictions.npz", "report.html"}


def data_set(num_labels):
    name = f"{num_labels}_labels_in_files"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).thing_classes = [f"label {i}" for i in range(num_labels)]
    return name


def process(evaluator, found, images):
    """Give an evaluator some images of scores, targets, and, where they are there, known labels."""
    keys = "scores", "labels", "label_states"
    batch = [dict(zip(keys, (torch.tensor(rows[i]) for rows in found))) for i in images]
    inputs = [{**row, "image_id": int(i), "file_name": f"{i}.jpg"} for i, row in zip(images, batch)]
    evaluator.process(inputs, batch)


def evaluate(found, folder, *, order, limit, at_once=2**22, processes=1, batch=3, **settings):
    """Evaluate in `processes` processes, and return what the main process does."""
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_blocks, "SCORES_AT_ONCE", at_once)
        patch.setattr(comm, "get_world_size", lambda: processes)
        patch.setattr(html_report, "to_svg", lambda figure: b"")
        for rank in reversed(range(processes)):
            evaluator = MultiLabelEvaluator(
                data_set(found[0].shape[1]), folder, memory_limit=limit, report={}, **settings
            )
            mine = order[rank::processes]
            for start in range(0, len(mine), batch):
                process(evaluator, found, mine[start : start + batch])
            patch.setattr(comm, "is_main_process", lambda rank=rank: rank == 0)
            # What is sent to another process is pickled.
            patch.setattr(comm, "gather", lambda own: parts.append(own) or pickled(parts))
            results = evaluator.evaluate()
            # A process may be done, and gone, while the main process still reads its files.
            del evaluator
    return results


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def read_files(folder):
    """By name: what stands in the files, but for the date."""
    content = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    content["report.html"] = re.sub(rb"<dt>Date<dd>.*", b"", content["report.html"])
    with np.load(Path(folder, "predictions.npz")) as file:
        content["predictions.npz"] = {name: file[name] for name in file}
    return content


# ------------------------------------------------------------------------------------ the figures


@pytest.mark.slow
@settings(max_examples=25)
@given(random_predictions(max_images=14), st.data())
def test_figures_are_the_same_to_the_bit_as_in_memory(prediction, data):
    """Whatever the processes, batches and parts, with ties, ignored and known labels."""
    scores, targets = prediction[0].astype(np.float32), prediction[1]
    drawn = st.lists(st.integers(-1, 1), min_size=targets.size, max_size=targets.size)
    known = np.where(targets == -1, np.reshape(data.draw(drawn), targets.shape), -1)
    found = scores, targets, known
    conventions = Conventions(known_in_f1=data.draw(st.booleans()))
    images = list(range(len(scores)))
    with tempfile.TemporaryDirectory() as folder:
        ways = [
            {"limit": 1024, "order": images},
            {
                "limit": 0,
                "order": data.draw(st.permutations(images + images[:3])),
                "at_once": data.draw(st.integers(1, 40)),
                "processes": data.draw(st.integers(1, 3)),
                "batch": data.draw(st.integers(1, 5)),
            },
        ]
        results, files = [], []
        for i, way in enumerate(ways):
            path = f"{folder}/{i}"
            results.append(evaluate(found, path, conventions=conventions, **way))
            files.append(read_files(path))
        np.testing.assert_equal(results[1], results[0])
        np.testing.assert_equal(files[1], files[0])
        assert set(files[1]) == FILES


def test_figures_are_those_of_the_pure_function(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.random((50, 7)).astype(np.float32).round(1)
    targets = rng.integers(-1, 2, (50, 7))
    results = evaluate(
        (scores, targets), str(tmp_path), order=range(50), limit=0, at_once=60, threshold=0.3
    )
    expected = multi_label_metrics(scores, targets, 0.3)
    top = multi_label_metrics(scores, targets, 0.3, 3)
    for name in ("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"):
        assert results["multi_label"][name] == expected[name]
        assert name == "mAP" or results["multi_label"][f"{name}_top3"] == top[name]
    ap = json.loads((tmp_path / "metrics.json").read_text())["AP"]
    assert list(ap.values()) == expected["AP"].tolist()
    predictions = read_predictions(str(tmp_path / "predictions.npz"))
    np.testing.assert_array_equal(predictions.scores, scores)
    np.testing.assert_array_equal(predictions.targets, targets)
    assert predictions.image_ids.tolist() == list(range(50))


@pytest.mark.parametrize("processes", [1, 3])
def test_only_what_is_above_the_limit_is_in_files(tmp_path, monkeypatch, processes):
    """Of all processes together, in MiB of 5 bytes for a label of an image."""
    found = np.zeros((300, 999), np.float32), np.zeros((300, 999), np.int8)
    stored = []
    monkeypatch.setattr(
        collected, "append_bytes", lambda *args, real=collected.append_bytes: (
            stored.append(args) or real(*args)
        )
    )  # fmt: skip
    for limit, is_stored in ((2, False), (1, True)):
        stored.clear()
        folder = str(tmp_path / str(limit))
        evaluate(found, folder, order=range(300), limit=limit, processes=processes, at_once=10**5)
        assert bool(stored) == is_stored


def test_an_evaluation_without_a_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = np.full((9, 4), 0.5, np.float32), np.ones((9, 4), np.int8)
    results = evaluate(found, None, order=range(9), limit=0)
    assert results["multi_label"]["mAP"] == 100
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_number_of_scores(tmp_path, monkeypatch):
    num_images, num_labels = 600, 5000
    monkeypatch.setattr(label_blocks, "SCORES_AT_ONCE", 2**14)
    row = np.linspace(0, 1, num_labels, dtype=np.float32)
    target = (row > 0.9).astype(np.int8)
    tracemalloc.start()
    try:
        evaluator = MultiLabelEvaluator(data_set(num_labels), str(tmp_path), memory_limit=1)
        for i in range(num_images):
            image = {"image_id": i, "labels": torch.from_numpy(target)}
            evaluator.process([image], [{"scores": torch.from_numpy(np.roll(row, i))}])
        assert evaluator.evaluate()["multi_label"]["mAP"] > 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The matrices are of 15 MB. What is there for each label, such as its name, takes some.
    assert peak < 6e6


EVALUATING = """
import sys

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ia_gcn.engine import launch
from ia_gcn.evaluation import MultiLabelEvaluator, label_blocks


def main(folder, limit, size):
    assert comm.get_world_size() == size
    label_blocks.SCORES_AT_ONCE = 500
    DatasetCatalog.register("many", list)
    MetadataCatalog.get("many").thing_classes = [f"label {i}" for i in range(40)]
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.random((101, 40)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(-1, 2, (101, 40))).float()
    evaluator = MultiLabelEvaluator("many", folder, memory_limit=limit)
    for i in range(comm.get_rank(), 101, size):
        evaluator.process([{"image_id": i, "labels": labels[i]}], [{"scores": scores[i]}])
    evaluator.evaluate()


if __name__ == "__main__":
    sys.exit(launch(main, 1, args=(sys.argv[1], *map(int, sys.argv[2:]))))
"""


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does_in_memory(tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATING)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    for name, command, limit, size in (("one", (), 1024, 1), ("two", torchrun, 0, 2)):
        result = run_process(*command, script, tmp_path / name, limit, size)
        assert result.returncode == 0, result.stderr[-3000:]
        assert set(os.listdir(tmp_path / name)) == {"metrics.json", "predictions.npz"}
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "metrics.json").read_bytes() == (two / "metrics.json").read_bytes()
    with np.load(one / "predictions.npz") as a, np.load(two / "predictions.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------- what is left


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """An evaluator that has files in tmp_path."""
    monkeypatch.setattr(label_blocks, "SCORES_AT_ONCE", 8)
    evaluator = MultiLabelEvaluator(data_set(4), str(tmp_path), memory_limit=0)
    found = np.full((6, 4), 0.5, np.float32), np.ones((6, 4), np.int8)
    process(evaluator, found, range(6))
    assert len(os.listdir(tmp_path)) == 1
    return evaluator


def test_files_are_removed_if_the_evaluation_fails(filled, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("of the measures")

    monkeypatch.setattr("ia_gcn.evaluation.multi_label_evaluation.measure_predictions", fail)
    with pytest.raises(KeyError, match="of the measures"):
        filled.evaluate()
    # What was predicted is there.
    assert os.listdir(tmp_path) == ["predictions.npz"]
    assert read_predictions(str(tmp_path / "predictions.npz")).scores.shape == (6, 4)


def test_files_of_another_process_are_left_alone(filled, tmp_path):
    """It may be alive: an evaluation takes no lock, and may run beside a training."""
    (tmp_path / ".scores.other.tmp").mkdir()
    (tmp_path / ".scores.other.tmp" / "matrices").write_bytes(b"half of")
    (tmp_path / ".predictions.npz.1.tmp").write_bytes(b"half of")
    filled.evaluate()
    left = {".predictions.npz.1.tmp", ".scores.other.tmp", "metrics.json", "predictions.npz"}
    assert set(os.listdir(tmp_path)) == left
    assert os.listdir(tmp_path / ".scores.other.tmp") == ["matrices"]


def test_files_are_removed_if_the_disk_is_full(filled, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        filled.evaluate()
    assert caught.value.filename == str(tmp_path / "predictions.npz")
    assert not os.listdir(tmp_path)


def test_files_are_removed_with_an_evaluation_that_is_given_up(filled, tmp_path):
    filled.reset()
    assert not os.listdir(tmp_path)


def test_scores_that_are_no_numbers_are_refused(filled, tmp_path):
    found = np.full((7, 4), np.nan, np.float32), np.ones((7, 4), np.int8)
    process(filled, found, [6])
    with pytest.raises(ValueError, match=r"finite and in \[0, 1\]"):
        filled.evaluate()
    assert os.listdir(tmp_path) == ["predictions.npz"]


@pytest.mark.parametrize("limit", [0, 1024])
@pytest.mark.parametrize("name", ["scores", "targets", "known"])
@pytest.mark.parametrize("shape", [(3,), (6,), (8,), (1, 4)])
def test_another_number_of_labels_is_refused(tmp_path, monkeypatch, limit, name, shape):
    """Of a data set of 4 labels, even where all the matrices agree in it."""
    monkeypatch.setattr(label_blocks, "SCORES_AT_ONCE", 8)
    found = {"scores": np.zeros((6, 4), np.float32), "labels": np.ones((6, 4), np.int8)}
    found["label_states"] = found["labels"]
    found[{"targets": "labels", "known": "label_states"}.get(name, name)] = np.zeros((6, *shape))
    settings = {"memory_limit": limit, "conventions": Conventions(known_in_f1=True)}
    evaluator = MultiLabelEvaluator(data_set(4), str(tmp_path), **settings)
    process(evaluator, tuple(found.values()), range(6))
    with pytest.raises(ValueError, match=rf"^{name} of .* labels, of a data set of 4$"):
        evaluator.evaluate()
    assert not os.listdir(tmp_path)


def test_files_of_another_machine_are_missed(filled, tmp_path, error_line):
    (folder,) = tmp_path.iterdir()
    os.remove(folder / "matrices")
    line = error_line(lambda _: filled.evaluate(), None)
    assert line.startswith(f"TEST.MEMORY_LIMIT: {folder}")
    assert "file system that all machines share" in line
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_files_are_removed_if_the_process_is_ended(tmp_path, number):
    """After SIGKILL, by the next training there."""
    program = textwrap.dedent("""
        import sys, time
        import torch
        from ia_gcn.commands.common import run
        from ia_gcn.evaluation import MultiLabelEvaluator

        def work():
            evaluator = MultiLabelEvaluator("none", sys.argv[1], memory_limit=0)
            image = {"image_id": 0, "labels": torch.zeros(2**22)}
            evaluator.process([image], [{"scores": torch.zeros(2**22)}])
            print("in files", flush=True)
            time.sleep(60)

        sys.exit(run("evaluation", work))
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "in files\n"
        assert len(os.listdir(tmp_path)) == 1
        time.sleep(0.1)
        child.send_signal(number)
        status = child.wait(60)
    finally:
        child.kill()
        child.stdout.close()
    if number == signal.SIGKILL:
        assert len(os.listdir(tmp_path)) == 1
        remove_unfinished(tmp_path)
    else:
        assert status == 128 + number
    assert not os.listdir(tmp_path)
