"""tools/benchmark.py on networks and label graphs that take next to no time."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

TINY = [
    *("--rounds", "2", "--threads", "1", "--batch", "1", "--size", "64", "--labels", "8"),
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.LABEL_HEAD.NUM_LABELS", "5"),
    *("MODEL.LABEL_GCN.HIDDEN_DIMS", "(8, 8)", "MODEL.REGION_GCN.HIDDEN_DIMS", "(8, 8)"),
]


@pytest.fixture
def benchmark(repository):
    """A function that runs the tool with these arguments and returns what subprocess does."""

    def call(*args):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "tools/benchmark.py", *args],
            cwd=repository,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return call


@pytest.fixture(scope="module")
def tool(repository):
    """tools/benchmark.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", repository / "tools/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_comparisons(benchmark, tmp_path):
    path = tmp_path / "new" / "model.json"
    result = benchmark("model", *TINY, "--output", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == 1
    tables = {table["title"].partition(":")[0]: table["rows"] for table in content["tables"]}
    names = ["LinearHead", "ML-GCN", "IA-GCN"]
    names += ["IA-GCN, the zoo's RPN head", "IA-GCN, res5 on every region"]
    for title in ("Inference", "Training step"):
        assert [row["name"] for row in tables[title]] == names
        assert all(row["regions"] == [40, 40] for row in tables[title][2:])
    for network in ("LinearHead", "IA-GCN"):
        plain, optimised = tables[f"Optimised inference of {network}"]
        assert optimised["max_difference"] < 1e-4
        assert plain["logit_deviation"] > 0.01
    label_graph = tables["Label graph alone, forward and backward"]
    assert all(row["peak_bytes"] > row["step_bytes"] >= 0 for row in label_graph)
    for rows in tables.values():
        assert rows[0]["ratio"] == 1
        for row in rows:
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
            assert row["ratio"] == pytest.approx(row["median_s"] / rows[0]["median_s"])
            assert f"| {row['name']} " in result.stdout
    assert "1.00" in result.stdout


def test_what_is_compared_is_run_in_turn(tool):
    calls = []
    seconds = tool.measure({name: lambda n=name: calls.append(n) for name in "ab"}, 3, "test")
    assert "".join(calls) == "abababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_medians(tool):
    rows = tool.timed_rows({"a": [1.0, 2.0, 9.0], "b": [3.0, 3.0, 0.5]})
    assert [row["median_s"] for row in rows] == [2.0, 3.0]
    assert [row["ratio"] for row in rows] == [1.0, 1.5]
    assert (rows[1]["min_s"], rows[1]["max_s"]) == (0.5, 3.0)


@pytest.mark.parametrize("num_labels", [5, 40])
def test_both_forms_of_the_label_graph_agree(tool, num_labels):
    problem = tool.make_graph_problem(num_labels)
    head = problem.head.double()
    problem = problem._replace(
        head=head, x=problem.x.detach().double(), presence=problem.presence.detach().double()
    )
    rank_one, dense = (logits(problem) for logits in tool.FORMS.values())
    torch.testing.assert_close(rank_one, dense, rtol=1e-10, atol=1e-10)


def test_the_lcm_is_what_fill_would_make_of_the_counts(tool):
    graph = tool.make_graph_problem(30).head.label_graph
    before = graph.lcm.clone()
    graph.fill(graph.label_counts, graph.pair_counts, graph.embeddings)
    torch.testing.assert_close(graph.lcm, before)


def test_what_has_no_room_is_not_started(tool):
    rank_one, dense = tool.FORMS
    available = 20e9
    assert tool.refuse(tool.estimate_bytes(rank_one, 9605), available) is None
    refusal = tool.refuse(tool.estimate_bytes(dense, 9605), available)
    assert "would take about" in refusal
    assert "20 GB available" in refusal


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model", "--only", "speed"], "--only speed: must be of inference"),
        (["model", "MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(benchmark, args, message):
    result = benchmark(*args)
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("benchmark: ")
    assert message in line


# ------------------------------------------------------------------------------------ data loading


def test_loading_is_compared_on_the_same_pixels(benchmark, tmp_path):
    path = tmp_path / "loading.json"
    args = ("--pictures", "6", "--batch", "4", "--size", "96", "--rounds", "2")
    result = benchmark("loading", *args, "--output", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == 1
    assert [t["title"].partition(":")[0] for t in content["tables"]] == [
        "Training view",
        "Test view",
    ]
    for table in content["tables"]:
        peer, own, floats, tensors, decoding = table["rows"]
        assert own["name"] == "ia_gcn"
        assert peer["speed"] == 1
        for row in table["rows"]:
            assert 0 < row["min_per_second"] <= row["per_second"] <= row["max_per_second"]
            assert row["speed"] == pytest.approx(row["per_second"] / peer["per_second"])
            assert f"| {row['name']} " in result.stdout
        for row in (own, tensors):
            assert row["level_difference"] <= 1
            assert row["differing_share"] < 0.02
        assert "level_difference" not in {**peer, **floats, **decoding}


def test_rates_are_of_medians(tool):
    rows = tool.rate_rows({"a": [1.0, 2.0, 9.0], "b": [4.0, 4.0, 5.0]}, 20)
    assert [row["per_second"] for row in rows] == [10, 5]
    assert [row["speed"] for row in rows] == [1, 0.5]
    assert (rows[0]["min_per_second"], rows[0]["max_per_second"]) == (20 / 9, 20)


def test_photos_are_pictures_that_differ(tool, tmp_path):
    files = tool.write_photos(tmp_path, 8)
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert {p.shape[:2] for p in pixels} == set(tool.PHOTO_SIZES)
    assert len({p.tobytes() for p in pixels}) == 8
    assert all(p.std() > 30 for p in pixels)
    again = tool.write_photos(tmp_path, 8)
    assert [np.asarray(Image.open(f)).tobytes() for f in again] == [p.tobytes() for p in pixels]
