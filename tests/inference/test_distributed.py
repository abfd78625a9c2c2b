"""What a worker has of a cluster, and what it makes of a part; without Ray."""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from ia_gcn import MultiLabelPredictor
from ia_gcn.inference import find_images, predict_files
from ia_gcn.inference.distributed import (
    PartPredictor,
    Share,
    check_free,
    choose_share,
    import_ray,
)
from ia_gcn.inference.parts import Job
from ia_gcn.io.parquet import ParquetRows
from tests.helpers.checkpoints import COLOURS, save_checkpoint
from tests.helpers.commands import run_script

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def machine(cpus, gpus=0):
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        # A predictor per share of the cores; no cores are left over, and none is used twice.
        ([machine(1)], {}, (1, 1, 0)),
        ([machine(2)], {}, (1, 2, 0)),
        ([machine(8)], {}, (1, 8, 0)),
        ([machine(12)], {}, (2, 6, 0)),
        ([machine(64), machine(64)], {}, (16, 8, 0)),
        ([machine(64), machine(4)], {}, (17, 4, 0)),
        ([machine(2)], {"cpus": 1}, (2, 1, 0)),
        ([machine(2)], {"cpus": 0.1}, (20, 0.1, 0)),
        ([machine(16)], {"workers": 1}, (1, 8, 0)),
        # A predictor per GPU, with its share of the cores.
        ([machine(96, 8)], {}, (8, 12, 1)),
        ([machine(96, 8), machine(16, 2), machine(64)], {}, (10, 8, 1)),
        ([machine(16, 1)], {"gpus": 0.25}, (4, 4, 0.25)),
        ([machine(16, 1)], {"gpus": 0}, (2, 8, 0)),
        # Machines without a core of its own only begin the work.
        ([machine(0), machine(4)], {}, (1, 4, 0)),
    ],
)
def test_shares(nodes, options, expected):
    assert choose_share(nodes, **options) == expected


@pytest.mark.parametrize(
    ("nodes", "options", "part"),
    [
        ([machine(2)], {"workers": 3, "cpus": 1}, "1 CPUs each, 2 fit into the cluster and not 3"),
        ([machine(2), machine(2)], {"cpus": 4}, "4 CPUs each, 0 fit"),
        ([machine(2)], {"gpus": 1}, "1 CPUs and 1 GPUs each, 0 fit"),
        ([machine(16, 2)], {"workers": 3}, "8 CPUs and 1 GPUs each, 2 fit"),
        ([machine(0)], {}, "0 fit"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_waited_for(error_line, nodes, options, part):
    message = error_line(partial(choose_share, nodes, **options))
    assert part in message
    assert "--cpus-per-worker" in message


def test_what_others_use_is_not_waited_for(error_line):
    check_free(Share(4, 2, 1), {"CPU": 8, "GPU": 4})
    message = error_line(check_free, Share(4, 2, 1), {"CPU": 8, "GPU": 1})
    assert message.startswith("4 workers need 4 GPUs, of which others leave 1")


def test_without_ray_it_says_what_to_install(monkeypatch, error_line):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'pip install -e ".[ray]"' in error_line(import_ray)


# ------------------------------------------------------------------------------------------- parts


@pytest.fixture
def job(make_cfg):
    return Job(save_checkpoint(make_cfg)[0], tuple(COLOURS), (0.3,) * 3, batch_size=4)


@pytest.fixture
def files(tiny_coco, tmp_path):
    """11 images, and one that can't be read."""
    files = find_images(tiny_coco(11, "photos").image_root)
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    return [*files[:5], str(bad), *files[5:]]


def read(content):
    return pq.read_table(pa.BufferReader(content)).to_pylist()


def worker(job, threads=1):
    return PartPredictor(job, Share(1, threads, 0), None)


def test_a_part_has_the_rows_of_predict_files(job, files):
    rows = read(worker(job).predict(files))
    predictor = MultiLabelPredictor(job.weights)
    # One thread, and batches of the same images: the same bits.
    expected = [x.record(0.3) for x in predict_files(predictor, files, batch_size=4, num_workers=1)]
    assert len(rows) == len(expected) == 12
    for row, record in zip(rows, expected):
        labels = record.get("labels")
        assert (row["file"], row["error"]) == (record["file"], record.get("error"))
        assert row["labels"] == (labels and [x["label"] for x in labels])
        found = row["probabilities"] and [round(x, 6) for x in row["probabilities"]]
        assert found == (labels and [x["probability"] for x in labels])
    assert [row["error"] for row in rows].count(None) == 11
    assert any(row["labels"] for row in rows)


def test_threads_and_earlier_parts_change_no_bit(job, files):
    one, three = worker(job), worker(job, threads=3)
    three.predict(files[:3])
    assert one.predict(files) == three.predict(files)


def test_images_in_parquet_are_the_same(job, files, tmp_path):
    path = str(tmp_path / "images.parquet")
    columns = {"image": [Path(file).read_bytes() for file in files], "file": files}
    pq.write_table(pa.table(columns), path, row_group_size=5)
    predictor = worker(job)
    halves = [ParquetRows(path, 0, 6), *files[6:]]
    assert predictor.predict([ParquetRows(path, 0, 12)]) == predictor.predict(halves)
    assert read(predictor.predict(halves)) == read(predictor.predict(files))


@pytest.mark.slow
def test_an_exported_model(job, files, tmp_path):
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    outcome = run_script(
        *("tools/export_model.py", "--weights", job.weights, "--format", "onnx"),
        *("--output", path),
    )
    assert outcome.returncode == 0, outcome.stderr
    exported = job._replace(weights=str(path))
    content = worker(exported).predict(files)
    assert content == worker(exported, threads=3).predict(files)
    for row, expected in zip(read(content), read(worker(job).predict(files))):
        assert row["labels"] == expected["labels"]
        if row["labels"] is not None:
            assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def test_what_is_wrong_with_the_model_is_a_line_and_no_trace(job, monkeypatch):
    """Of a worker on a machine where the file is not."""
    begun = Counter()

    def begin(part):
        begun[part] += 1
        return begun[part] - 1

    ray = type("Ray", (), {"get": staticmethod(lambda value: value)})
    monkeypatch.setitem(sys.modules, "ray", ray)
    tries = type("Tries", (), {"begin": type("Method", (), {"remote": staticmethod(begin)})})
    predictor = PartPredictor(job._replace(weights="gone.pth"), Share(1, 1, 0), tries)
    row = {"part": 3, "sources": '["a.jpg"]'}
    result = predictor(row)
    assert "gone.pth" in result["error"]
    assert (result["part"], result["content"], result["lost"]) == (3, b"", 0)
    # As often as TRIES, it was tried; then it says over which part.
    results = [predictor(row) for _ in range(3)]
    assert [x["lost"] for x in results] == [1, 2, 3]
    assert results[-1]["error"] == "part 3, of a.jpg and what follows"
