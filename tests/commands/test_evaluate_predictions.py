"""tools/evaluate_predictions.py, and the pure functions behind it."""

import csv
import io
import json
import math
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from PIL import Image
from sklearn import metrics as sklearn_metrics

from ia_gcn.errors import InputError
from ia_gcn.evaluation import (
    Conventions,
    average_precision,
    best_f1_points,
    interpolated_precision,
    measure_calibration,
    multi_label_metrics,
    precision_recall_curve,
    read_predictions,
)
from tests.helpers.commands import load_command, run_script
from tests.helpers.strategies import predictions as random_predictions

COMMAND = "evaluate_predictions"
# A mean of nothing or a division by zero must not reach the user as a warning.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
quick = settings(max_examples=60)

# ------------------------------------------------------------------------------ pure functions


def known(scores, targets):
    """A label's scores, as Python's numbers, and whether it is there, without what is ignored."""
    return [(s, t == 1) for s, t in zip(scores.tolist(), targets.tolist()) if t != -1]


def figures(pairs, threshold):
    """Precision, recall and F1 in percent, from 0 to 1 predicted at a threshold."""
    correct = sum(present for score, present in pairs if score >= threshold)
    predicted = sum(score >= threshold for score, _ in pairs)
    positives = sum(present for _, present in pairs)
    return (
        100 * correct / predicted,
        100 * correct / positives if positives else math.nan,
        100 * 2 * correct / (predicted + positives),
    )


@quick
@given(random_predictions())
def test_best_f1_equals_trying_every_threshold(prediction):
    scores, targets = prediction
    points = best_f1_points(scores, targets)
    for c, (label_scores, label_targets) in enumerate(zip(scores.T, targets.T)):
        pairs = known(label_scores, label_targets)
        point = [field[c] for field in points]
        assert point[4] == sum(present for _, present in pairs)
        if not point[4]:
            assert np.isnan(point[:4]).all()
            continue
        # The highest threshold first: it wins among equals.
        candidates = sorted({score for score, _ in pairs}, reverse=True)
        best = max(candidates, key=lambda threshold: figures(pairs, threshold)[2])
        assert point[0] == best
        assert point[1:4] == pytest.approx(figures(pairs, best), abs=1e-9)


@quick
@given(random_predictions(ignored=False, max_images=30))
def test_no_threshold_of_scikit_learns_is_better(prediction):
    scores, targets = prediction
    scores = scores.astype(np.float64)
    points = best_f1_points(scores, targets)
    for c in np.flatnonzero(points.positives):
        precision, recall, _ = sklearn_metrics.precision_recall_curve(targets[:, c], scores[:, c])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert points.f1[c] == pytest.approx(100 * f1.max(), abs=1e-9)
        predicted = scores[:, c] >= points.threshold[c]
        expected = sklearn_metrics.f1_score(targets[:, c], predicted)
        assert points.f1[c] == pytest.approx(100 * expected, abs=1e-9)


@quick
@given(random_predictions())
def test_the_measures_with_best_thresholds_are_those_of_the_points(prediction):
    scores, targets = prediction
    points = best_f1_points(scores, targets)
    metrics = multi_label_metrics(scores, targets, points.threshold)
    present = points.positives > 0
    if present.any():
        assert metrics["CP"] == pytest.approx(points.precision[present].mean(), abs=1e-9)
        assert metrics["CR"] == pytest.approx(points.recall[present].mean(), abs=1e-9)
    else:
        assert metrics["CF1"] == metrics["OF1"] == 0


@quick
@given(random_predictions(max_labels=1))
def test_the_curve_has_a_point_for_each_score(prediction):
    scores, targets = prediction[0][:, 0], prediction[1][:, 0]
    pairs = known(scores, targets)
    curve = precision_recall_curve(scores, targets)
    assert curve.threshold.tolist() == sorted({score for score, _ in pairs}, reverse=True)
    for threshold, *point in zip(*curve):
        assert point == pytest.approx(figures(pairs, threshold)[:2], abs=1e-9, nan_ok=True)


def test_the_curve_equals_scikit_learns():
    rng = np.random.default_rng(0)
    scores, targets = rng.random(500).round(2), rng.integers(0, 2, 500)
    curve = precision_recall_curve(scores, targets)
    precision, recall, threshold = sklearn_metrics.precision_recall_curve(targets, scores)
    np.testing.assert_array_equal(curve.threshold, threshold[::-1])
    # scikit-learn adds a point at which nothing is predicted.
    np.testing.assert_allclose(curve.precision, 100 * precision[-2::-1])
    np.testing.assert_allclose(curve.recall, 100 * recall[-2::-1])


@quick
@given(random_predictions(max_images=25))
def test_interpolated_precision_equals_the_definition(prediction):
    scores, targets = prediction
    curves = interpolated_precision(scores, targets)
    assert curves.shape == (scores.shape[1], 101)
    for curve, label_scores, label_targets in zip(curves, scores.T, targets.T):
        eleven = average_precision(label_scores, label_targets, "eleven_points")
        assert curve[::10].mean() == pytest.approx(eleven, abs=1e-9, nan_ok=True)
        if math.isnan(eleven):
            assert np.isnan(curve).all()
            continue
        pairs = known(label_scores, label_targets)
        points = [figures(pairs, threshold) for threshold, _ in pairs]
        for level in (0, 1, 37, 99, 100):
            expected = max(p for p, recall, _ in points if recall >= level - 1e-9)
            assert curve[level] == pytest.approx(expected, abs=1e-9)


@quick
@given(random_predictions(), st.integers(1, 20))
def test_calibration_equals_a_loop(prediction, bins):
    scores, targets = prediction
    result = measure_calibration(scores, targets, bins)
    pairs = [pair for c in range(scores.shape[1]) for pair in known(scores[:, c], targets[:, c])]
    error = 0.0
    for b in range(bins):
        members = [
            (score, present)
            for score, present in pairs
            if b / bins <= score and (score < (b + 1) / bins or b == bins - 1)
        ]
        assert result.count[b] == len(members)
        if not members:
            assert np.isnan([result.score[b], result.present[b]]).all()
            continue
        score, present = np.mean(members, axis=0)
        assert result.score[b] == pytest.approx(100 * score, abs=1e-9)
        assert result.present[b] == pytest.approx(100 * present, abs=1e-9)
        error += 100 * len(members) / len(pairs) * abs(score - present)
    assert result.error == pytest.approx(error if pairs else math.nan, abs=1e-9, nan_ok=True)


def test_calibration_by_hand():
    scores = np.array([[0.0, 0.1], [0.5, 1.0], [0.5, 0.7]])
    targets = np.array([[0, 1], [1, 1], [0, -1]])
    result = measure_calibration(scores, targets, bins=2)
    assert result.count.tolist() == [2, 3]
    # |0.05 - 1/2| of two pairs, |2/3 - 2/3| of three.
    assert result.error == pytest.approx(100 * 2 / 5 * 0.45)


@quick
@given(random_predictions(), st.sampled_from([0, 0.5, 1]))
def test_what_is_ignored_may_score_anything(prediction, value):
    scores, targets = prediction
    other = scores.copy()
    other[targets == -1] = value
    for function in (best_f1_points, interpolated_precision, measure_calibration):
        np.testing.assert_equal(function(other, targets), function(scores, targets))


def test_thresholds_of_each_label():
    scores = np.array([[0.4, 0.4, 0.9], [0.6, 0.6, 0.9]])
    targets = np.ones((2, 3), int)
    metrics = multi_label_metrics(scores, targets, np.array([0.4, 0.6, np.nan]))
    assert metrics["CR"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert metrics["OR"] == pytest.approx(100 * 3 / 6)


@pytest.mark.parametrize(
    "function", [best_f1_points, interpolated_precision, measure_calibration, average_precision]
)
def test_scores_that_are_no_probabilities_are_refused(function):
    with pytest.raises(ValueError, match=r"finite and in \[0, 1\]|D and of the same shape"):
        function(np.full((2, 2), 1.5), np.zeros((2, 2)))


# ------------------------------------------------------------------------------ predictions.npz

LABELS = ["cat", "dog, small", "$sea$", "sky"]


def make_predictions(seed=0, **changes):
    """The arrays of a file with 60 images; nothing has the label sky."""
    rng = np.random.default_rng(seed)
    targets = rng.choice([1, 0, -1], (60, 4), p=[0.3, 0.6, 0.1]).astype(np.int8)
    targets[targets[:, 3] == 1, 3] = 0
    scores = np.clip(rng.random((60, 4)) * 0.7 + 0.3 * (targets == 1), 0, 1).astype(np.float32)
    arrays = {
        "image_ids": np.arange(60),
        "scores": scores,
        "targets": targets,
        "label_names": np.array(LABELS),
    }
    return {**arrays, **changes}


@pytest.fixture
def write(tmp_path):
    """A function that writes such a file and returns its path."""

    def save(name="predictions.npz", seed=0, **changes):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        arrays = make_predictions(seed, **changes)
        np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
        return str(path)

    return save


def test_what_is_read(write):
    arrays = make_predictions()
    predictions = read_predictions(write())
    for name in ("image_ids", "scores", "targets"):
        np.testing.assert_array_equal(getattr(predictions, name), arrays[name])
    assert predictions.label_names == LABELS
    assert predictions.label_counts is None
    counts = np.array([5, 0, 2, 9])
    assert read_predictions(write(label_counts=counts)).label_counts.tolist() == counts.tolist()


A = make_predictions()
REFUSALS = {
    "scores": [
        (A["scores"][:, :3], "the shapes do not agree"),
        (A["scores"][0], "the shapes do not agree"),
        (A["scores"] * 2, "finite and in"),
        (A["scores"] * np.nan, "finite and in"),
        (A["scores"] > 0.5, "floating-point"),
        (A["scores"].astype(object), "allow_pickle"),
        (None, "scores"),
    ],
    "targets": [
        (A["targets"] + 1, "1, 0 or -1"),
        (A["targets"][:50], "same shape"),
        (A["targets"].astype(str), "real numbers"),
        (None, "targets"),
    ],
    "image_ids": [
        (A["image_ids"][:59], "the shapes do not agree"),
        (A["image_ids"] // 2, "image_ids has 0 twice"),
        (A["image_ids"] / 3, "integers or text"),
        (A["image_ids"].astype(object), "allow_pickle"),
    ],
    "label_names": [
        (np.array(LABELS[:3]), "the shapes do not agree"),
        (np.array([*LABELS[:3], "cat"]), "label_names has cat twice"),
        (np.arange(4), "label_names text"),
        (np.array(LABELS).reshape(2, 2), "the shapes do not agree"),
    ],
    "label_counts": [
        (np.arange(3), "a number of images for each label"),
        (np.array([1, 2, 3, -1]), "a number of images for each label"),
        (np.arange(4) / 2, "a number of images for each label"),
        (np.array(LABELS), "a number of images for each label"),
        (np.array(LABELS, dtype=object), "allow_pickle"),
    ],
}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [(name, array, message) for name, cases in REFUSALS.items() for array, message in cases],
)
def test_what_is_refused(write, error_line, name, array, message):
    path = write(**{name: array})
    line = error_line(read_predictions, path)
    assert line.startswith(path)
    assert message in line


def test_no_image_is_refused(write, error_line):
    empty = {name: A[name][:0] for name in ("image_ids", "scores", "targets")}
    assert "no prediction" in error_line(read_predictions, write(**empty))


def test_files_of_another_kind_are_refused(tmp_path, error_line):
    contents = {"text": b"file,label\n", "empty": b"", "pickle": b"\x80\x04N."}
    single = io.BytesIO()
    np.save(single, np.zeros((2, 2)))
    contents["array"] = single.getvalue()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("scores.npy", "no array")
    contents["zip"] = other.getvalue()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in error_line(read_predictions, str(tmp_path / name))
    assert "No such file" in error_line(read_predictions, str(tmp_path / "gone.npz"))


@quick
@given(st.integers(0, 2**32), st.integers(1, 255), st.booleans())
def test_damaged_files_are_read_or_refused(tmp_path_factory, place, change, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez_compressed(path, **A)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] ^= change
    path.write_bytes(content[:place] if cut else content)
    with suppress(InputError):
        assert read_predictions(str(path)).scores.shape == (60, 4)


# -------------------------------------------------------------------------------------- the tool


def table_rows(text):
    """The cells of the rows of all tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def row_of(metrics, first):
    names = ("CP", "CR", "CF1", "OP", "OR", "OF1")
    ap = f"{metrics['mAP']:.2f}" if first == "all" else ""
    return [first, ap, *(f"{metrics[name]:.2f}" for name in names)]


def test_it_measures_again_at_other_thresholds(main, write):
    status, out, _ = main(write(), "--threshold", 0.3, "--threshold", 0.6, "--top-k", 2)
    assert status == 0
    assert "60 images, 4 labels" in out
    scores, targets = A["scores"], A["targets"]
    points = best_f1_points(scores, targets)
    # A label without a positive keeps the first threshold.
    own = [*points.threshold[:3], 0.3]
    rows = table_rows(out)
    expected = []
    for threshold in (0.3, 0.6, np.array(own)):
        expected.append(row_of(multi_label_metrics(scores, targets, threshold), "all"))
        expected.append(row_of(multi_label_metrics(scores, targets, threshold, top_k=2), "top 2"))
    assert [row for row in rows if row and row[0] in ("all", "top 2")] == expected
    assert "chosen on the same data" in out
    assert "1 label(s) without a positive are left out of mAP, CP and CR: sky" in out
    error = measure_calibration(scores, targets).error
    assert f"expected calibration error: {error:.2f}\n" in out


def test_without_options_it_is_the_evaluation(main, write):
    status, out, _ = main(write(), "--top-k", 0, "--ap", "eleven_points")
    assert status == 0
    metrics = multi_label_metrics(
        A["scores"], A["targets"], conventions=Conventions("eleven_points")
    )
    rows = table_rows(out)
    assert row_of(metrics, "all") in rows
    assert not any(row and row[0].startswith("top") for row in rows)
    assert f"{metrics['AP'][0]:.2f}" in out


def test_frequent_middle_and_rare_labels(main, write, tmp_path):
    ap = multi_label_metrics(A["scores"], A["targets"])["AP"]
    counted = write(label_counts=np.array([5, 50, 500, 5000]))
    groups = ("--frequency-groups", 10, 100)
    status, out, _ = main(counted, *groups)
    assert status == 0
    rows = [["frequent", "1", "500"], ["middle", "1", "50"], ["rare", "1", "5"]]
    for row, value in zip(rows, ap[[2, 1, 0]]):
        assert [*row, f"{value:.2f}"] in table_rows(out)
    # Without the numbers of a training, by the images of the file.
    _, out, _ = main(write())
    images = (A["targets"] == 1).sum(axis=0)
    rarest = min(range(3), key=lambda label: images[label])
    assert ["rare", "1", str(images[rarest]), f"{ap[rarest]:.2f}"] in table_rows(out)
    status, _, err = main(write(), *groups)
    assert status != 0
    assert "has no label_counts" in err


def read_operating_points(folder):
    with open(folder / "operating_points.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    return json.loads((folder / "operating_points.json").read_text()), table


def test_operating_points_are_written_to_the_bit(main, write, tmp_path):
    assert main(write(), "--output", tmp_path / "out")[0] == 0
    points = best_f1_points(A["scores"], A["targets"])
    thresholds, table = read_operating_points(tmp_path / "out")
    assert thresholds == dict(zip(LABELS[:3], points.threshold))
    assert [row["label"] for row in table] == LABELS
    for i, row in enumerate(table):
        assert int(row["positives"]) == points.positives[i]
        for name in ("threshold", "precision", "recall", "f1"):
            assert row[name] == "" if i == 3 else float(row[name]) == getattr(points, name)[i]


def test_the_prediction_tool_takes_the_thresholds(main, write, repository, tmp_path):
    assert main(write())[0] == 0
    predict = load_command("predict")
    taken = predict.read_thresholds(str(tmp_path / "operating_points.json"), LABELS)
    points = best_f1_points(A["scores"], A["targets"])
    assert taken == dict(zip(LABELS[:3], points.threshold))


def test_thresholds_of_other_data(main, write, tmp_path):
    other = write("val/predictions.npz", seed=1)
    status, out, _ = main(write(), "--select-on", other, "--top-k", 0, "--output", tmp_path / "out")
    assert status == 0
    assert "chosen on the same data" not in out
    assert f"each label's best F1 on {other}" in out
    chosen = make_predictions(seed=1)
    points = best_f1_points(chosen["scores"], chosen["targets"])
    own = np.append(points.threshold[:3], 0.5)
    assert row_of(multi_label_metrics(A["scores"], A["targets"], own), "all") in table_rows(out)
    thresholds, _ = read_operating_points(tmp_path / "out")
    assert thresholds == dict(zip(LABELS[:3], points.threshold))


def test_other_data_must_have_the_same_labels(main, write):
    other = write("val/predictions.npz", label_names=np.array(["cat", "cow", "sea", "sky"]))
    status, _, err = main(write(), "--select-on", other)
    assert status == 1
    assert err.startswith(f"evaluate_predictions: --select-on {other} has other labels")


@pytest.mark.parametrize("labels", [1, 4, 30])
def test_images(main, write, tmp_path, labels):
    rng = np.random.default_rng(0)
    names = [f"${i}$ " + "long " * (i % 9) for i in range(labels)]
    file = write(
        scores=rng.random((60, labels), dtype=np.float32),
        targets=rng.integers(-1, 2, (60, labels)),
        label_names=np.array(names),
    )
    before = pyplot.get_fignums()
    status, out, err = main(file)
    assert (status, err) == (0, "")
    assert pyplot.get_fignums() == before
    for name in ("precision_recall.png", "reliability.png"):
        assert str(tmp_path / name) in out
        with Image.open(tmp_path / name) as image:
            image.load()
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_no_label_with_a_positive_is_no_crash(main, write):
    status, out, err = main(write(targets=np.zeros((60, 4), np.int8)))
    assert (status, err) == (0, "")
    assert "4 label(s) without a positive" in out


@pytest.mark.parametrize(
    "arguments", [["--threshold", "1.5"], ["--threshold", "nan"], ["--top-k", "-1"], ["--top-k"]]
)
def test_options_out_of_range_are_refused(main, write, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(write(), *arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_command(write, tmp_path):
    result = run_script("tools/evaluate_predictions.py", write(), "--threshold", 0.4)
    assert result.returncode == 0, result.stderr
    assert "at a threshold of 0.4:" in result.stdout
    assert (tmp_path / "reliability.png").exists()


def test_a_missing_file_is_said_in_one_line(main):
    status, out, err = main("gone.npz")
    assert (status, out) == (1, "")
    assert err.startswith("evaluate_predictions: gone.npz: ")
    assert len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_said_in_one_line(main, write, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = main(write(), "--output", tmp_path / "file" / "out")
    assert status == 1
    assert err.startswith("evaluate_predictions: ")
    assert len(err.splitlines()) == 1


def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    text = capsys.readouterr().out
    for word in ("--select-on val/predictions.npz", "too high", "operating_points.json", "15 bins"):
        assert word in text


def test_scores_that_stay_in_the_file_are_measured_as_in_memory(main, write, tmp_path, monkeypatch):
    compressed = write()
    columns = {name: np.asfortranarray(array) for name, array in make_predictions().items()}
    np.savez(tmp_path / "plain.npz", **columns)
    results = []
    for path, size in ((compressed, 2**28), (tmp_path / "plain.npz", 1)):
        monkeypatch.setattr("ia_gcn.evaluation.predictions.MAPPED_FROM", size)
        status, out, err = main(path, "--output", tmp_path / "out")
        assert (status, err) == (0, "")
        files = [file.read_bytes() for file in sorted((tmp_path / "out").iterdir())]
        results.append((out.replace(str(path), "FILE"), files))
    assert results[0] == results[1]


def test_of_many_labels_a_few_are_printed_and_all_are_in_a_file(main, write, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"label {i}" for i in range(300)]
    targets = (rng.random((60, 300)) < 0.3).astype(np.int8)
    targets[:, 280:] = 0
    file = write(
        scores=rng.random((60, 300), np.float32), targets=targets, label_names=np.array(names)
    )
    status, out, _ = main(file)
    assert status == 0
    assert len(out) < 6000
    ap = multi_label_metrics(*(np.load(file)[name] for name in ("scores", "targets")))["AP"]
    ranked = sorted(range(280), key=lambda i: -ap[i])
    printed = [cell for row in table_rows(out) for cell in row if cell.startswith("label ")]
    assert printed == [names[i] for i in ranked[:12] + ranked[-12:]]
    assert "12 highest and the 12 lowest AP of 280 labels; all are in average_precision.csv" in out
    without = f"mAP, CP and CR: {', '.join(names[280:290])} and 10 more\n"
    assert without in out
    with open(tmp_path / "average_precision.csv", newline="") as content:
        head, *rows = csv.reader(content)
    assert head == ["label", "AP"]
    assert rows == [[name, "" if math.isnan(x) else repr(float(x))] for name, x in zip(names, ap)]
