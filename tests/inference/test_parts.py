"""Parts of the input, the folder of results, and what is in a file of it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.inference import FilePrediction, Prediction
from ia_gcn.inference.parts import (
    Job,
    ResultFolder,
    count_images,
    decode_part,
    describe_job,
    encode_part,
    encode_results,
    find_sources,
    split_sources,
)
from ia_gcn.io.parquet import Columns, ParquetRows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LABELS = ("red", "green", "blue")

rows = st.tuples(st.integers(0, 9), st.integers(0, 30)).map(
    lambda x: ParquetRows("a.parquet", x[0], x[0] + x[1])
)
names = st.text(st.characters(exclude_categories=()), max_size=3)


def one_by_one(sources):
    """Each image, by a plain loop."""
    for source in sources:
        if isinstance(source, ParquetRows):
            yield from ((source.path, row) for row in range(source.start, source.stop))
        else:
            yield source


# ------------------------------------------------------------------------------------------- parts


@given(st.lists(names | rows), st.integers(1, 20))
def test_parts_have_the_images_in_order_and_are_of_one_size(sources, size):
    parts = list(split_sources(sources, size))
    images = list(one_by_one(sources))
    assert [image for part in parts for image in one_by_one(part)] == images
    counts = [count_images(part) for part in parts if count_images(part)]
    assert counts == [len(images[i : i + size]) for i in range(0, len(images), size)]


@settings(max_examples=30)
@given(st.lists(names | rows))
def test_a_part_is_written_and_read(sources):
    assert decode_part(encode_part(sources)) == sources


def test_a_folder_is_of_parquet_if_it_has_some(tmp_path):
    for name in ("b.parquet", "sub/a.parquet", "_x.parquet", ".y.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / name)
    (tmp_path / "c.jpg").touch()
    paths = [str(tmp_path / name) for name in ("b.parquet", "sub/a.parquet")]
    both = [ParquetRows(path, 0, 2) for path in paths]
    assert find_sources(str(tmp_path), Columns()) == both
    assert find_sources(str(tmp_path / "[b]*.parquet"), Columns()) == both[:1]
    assert find_sources(str(tmp_path / "*.jpg"), Columns()) == [str(tmp_path / "c.jpg")]


# ------------------------------------------------------------------------------------------ results


@pytest.fixture
def job(tmp_path):
    weights = tmp_path / "model.pth"
    weights.write_text("weights")
    return Job(str(weights), LABELS, (0.5, 0.4, 0.3))


def test_a_row_for_each_result(job):
    scores = np.array([0.45, 0.4, 0.9], np.float32)
    results = [
        FilePrediction("a.jpg", Prediction(list(LABELS), scores, None), None),
        FilePrediction("caf\udce9.jpg", None, "no image"),
        FilePrediction("b.jpg", Prediction(list(LABELS), scores * 0, None), None),
    ]
    content = encode_results(results, job._replace(with_scores=True))
    table = pq.read_table(pa.BufferReader(content))
    float32 = [float(score) for score in scores]
    assert table.to_pylist() == [
        {
            "file": "a.jpg",
            "labels": ["blue", "green"],
            "probabilities": [float32[2], float32[1]],
            "error": None,
            "scores": float32,
        },
        {
            "file": "caf\\udce9.jpg",
            "labels": None,
            "probabilities": None,
            "error": "no image",
            "scores": None,
        },
        {
            "file": "b.jpg",
            "labels": [],
            "probabilities": [],
            "error": None,
            "scores": [0.0, 0.0, 0.0],
        },
    ]
    about = json.loads(table.schema.metadata[b"ia_gcn"])
    assert about["label_names"] == list(LABELS)
    assert (about["weights"], about["unreadable"]) == ("model.pth", 1)
    (first, *_) = pq.read_table(
        pa.BufferReader(encode_results(results, job._replace(top_k=1)))
    ).to_pylist()
    assert (first["labels"], set(first)) == (
        ["blue"],
        {"file", "labels", "probabilities", "error"},
    )


def test_a_folder_goes_on_with_what_is_missing(job, tmp_path):
    description = describe_job(job, ["a", "b", "c"], 3)
    folder = ResultFolder(tmp_path / "out", description)
    assert folder.missing() == [0, 1, 2]
    folder.write(1, encode_results([FilePrediction("a", None, "bad")], job))
    (tmp_path / "out" / ".part-00002.parquet.123.tmp").touch()
    again = ResultFolder(tmp_path / "out", description)
    assert again.missing() == [0, 2]
    assert again.unreadable(1) == 1
    # What a killed process has left is gone.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("_job.json", "part-00001.parquet"),
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"thresholds": (0.5, 0.5, 0.5)}, "thresholds"),
        ({"top_k": 2, "with_scores": True}, "top k, scores"),
        ({"part_size": 7}, "part size"),
        ({"columns": Columns("x")}, "columns"),
    ],
)
def test_another_job_is_refused(job, tmp_path, error_line, change, what):
    out = tmp_path / "out"
    ResultFolder(out, describe_job(job, ["a"], 1))
    message = error_line(ResultFolder, out, describe_job(job._replace(**change), ["a"], 1))
    assert message == (
        f"--output {out}: has predictions of another job ({what}); name another folder, or remove "
        "this one"
    )


def test_other_weights_and_images_are_another_job(job, tmp_path, error_line):
    out = tmp_path / "out"
    ResultFolder(out, describe_job(job, ["a"], 1))
    assert "(input)" in error_line(ResultFolder, out, describe_job(job, ["b"], 1))
    moved = tmp_path / "moved.pth"
    moved.write_text("weights")
    ResultFolder(out, describe_job(job._replace(weights=str(moved)), ["a"], 1))
    moved.write_text("other")
    other = describe_job(job._replace(weights=str(moved)), ["a"], 1)
    assert "(weights)" in error_line(ResultFolder, out, other)


def test_a_folder_of_other_parquet_files_is_refused(job, tmp_path, error_line):
    (tmp_path / "mine.parquet").touch()
    description = describe_job(job, ["a"], 1)
    assert "has Parquet files" in error_line(ResultFolder, tmp_path, description)
