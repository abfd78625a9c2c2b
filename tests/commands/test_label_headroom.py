"""tools/label_headroom.py, and what it measures."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ia_gcn.analysis.label_headroom import measure_headroom
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.evaluation.bootstrap import resampled_map
from ia_gcn.modeling.label_prior_fit import LabelSets, calibrate, fit_themes
from tests.helpers.commands import load_command

LABELS = ["red", "green", "blue", "small", "large", "round"]


def draw(count, seed, correlated=True):
    """Labels of two themes, and probabilities from Gaussian evidence; (count, 6) each."""
    random = np.random.RandomState(seed)
    theme = random.randint(2, size=count)
    chances = np.array([[0.8, 0.7, 0.7, 0.05, 0.05, 0.1], [0.05, 0.05, 0.1, 0.7, 0.7, 0.6]])
    chances = chances[theme] if correlated else np.tile(chances.mean(axis=0), (count, 1))
    targets = (random.rand(count, 6) < chances).astype(np.int64)
    logits = 1.2 * (random.randn(count, 6) + 1.2 * targets - 0.6) - 0.4
    return targets, 1 / (1 + np.exp(-logits))


def write(path, targets, scores, first_id=0, labels=LABELS):
    ids = np.arange(first_id, first_id + len(targets))
    np.savez(path, image_ids=ids, scores=scores, targets=targets, label_names=labels)
    return str(path)


@pytest.fixture
def files(tmp_path):
    test = write(tmp_path / "test.npz", *draw(400, 1))
    val = write(tmp_path / "val.npz", *draw(600, 2), first_id=1000)
    return test, val, tmp_path


def run(capsys, *argv):
    status = load_command("label_headroom").main(list(map(str, argv)))
    return status, capsys.readouterr()


def test_figures_plot_and_advice(files, capsys):
    test, val, folder = files
    status, printed = run(
        capsys, test, "--labels-from", val, "--json", folder / "a.json", "--plot", folder / "a.png"
    )
    assert status == 0, printed.err
    figures = json.loads((folder / "a.json").read_text())
    content = np.load(test)
    own = multi_label_metrics(content["scores"], content["targets"])["mAP"]
    assert figures["map"]["value"] == pytest.approx(own)
    for name in ("map", "map_with_prior", "map_ceiling"):
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]
    assert list(figures["map_known"]) == ["0.25", "0.5", "0.75"]
    known = [figures["map_known"][share]["value"] for share in figures["map_known"]]
    values = [figures["map_with_prior"]["value"], *known, figures["map_ceiling"]["value"]]
    # What is known of the others only helps.
    assert figures["map"]["value"] + 3 < values[0]
    assert all(b > a - 2 for a, b in zip(values, values[1:]))
    assert figures["advice"] in printed.out
    assert figures["advice"].startswith("A label graph can help")
    assert sum(group["labels"] for group in figures["by_frequency"].values()) == len(LABELS)
    with Image.open(folder / "a.png") as image:
        assert min(image.size) > 300


def test_independent_labels_have_nothing_to_gain(tmp_path, capsys):
    test = write(tmp_path / "t.npz", *draw(500, 1, correlated=False))
    val = write(tmp_path / "v.npz", *draw(800, 2, correlated=False), first_id=1000)
    status, printed = run(capsys, test, "--labels-from", val, "--json", tmp_path / "a.json")
    assert status == 0, printed.err
    figures = json.loads((tmp_path / "a.json").read_text())
    assert abs(figures["headroom"]["value"]) < 2
    assert "can't help" in figures["advice"] or "not likely to help" in figures["advice"]


def test_with_a_data_set_a_share_is_set_aside_and_not_measured(tmp_path, capsys, make_cfg):
    make_cfg("run")  # which registers custom_train
    random = np.random.RandomState(0)
    targets = random.randint(2, size=(40, 3))
    scores = np.clip(targets * 0.4 + 0.6 * random.rand(40, 3), 0, 1)
    # Columns are put in order by the labels' names.
    path = write(tmp_path / "p.npz", targets, scores, labels=["blue", "red", "green"])
    status, printed = run(capsys, path, "--labels-from", "custom_train", "--share", "0.25")
    assert status == 0, printed.err
    assert "p.npz: 30 images, 3 labels" in printed.out
    assert (tmp_path / "label_headroom.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels", r"has other labels \(6 against 6; has square; lacks round\)"),
        ("images", "has 400 of the images of .*test.npz: nothing may be chosen"),
        ("missing", "no such file|No such file"),
        ("dataset", "is not registered|no data set"),
    ],
)
def test_what_can_t_be_used(files, capsys, change, message):
    test, _val, folder = files
    source = {
        "labels": lambda: write(
            folder / "l.npz", *draw(9, 3), first_id=2000, labels=[*LABELS[:5], "square"]
        ),
        "images": lambda: test,
        "missing": lambda: "nowhere.npz",
        "dataset": lambda: "nowhere",
    }[change]()
    status, printed = run(capsys, test, "--labels-from", source)
    assert status == 1
    assert re.search(message, printed.err), printed.err
    assert "Traceback" not in printed.err


def test_what_does_not_fit_into_memory_is_refused(files, capsys, monkeypatch):
    test, val, _ = files
    monkeypatch.setattr("ia_gcn.memory.available_memory", lambda: 1000)
    status, printed = run(capsys, test, "--labels-from", val)
    assert status == 1
    assert "with all scores of 600 images × 6 labels, needs 0 GB" in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.filterwarnings("error::UserWarning")
def test_scores_may_stay_in_the_file(files, capsys, monkeypatch):
    test, val, folder = files
    for path in (test, val):
        with np.load(path) as content:
            np.savez(path, **{name: np.asfortranarray(content[name]) for name in content})
    figures = []
    for size in (2**28, 1):
        monkeypatch.setattr("ia_gcn.evaluation.predictions.MAPPED_FROM", size)
        status, printed = run(capsys, test, "--labels-from", val, "--json", folder / "a.json")
        assert status == 0, printed.err
        figures.append((folder / "a.json").read_text())
    assert figures[0] == figures[1]


def test_other_images_may_have_the_same_ids(tmp_path, capsys):
    """Many data sets count from 1."""
    test = write(tmp_path / "test.npz", *draw(200, 1))
    val = write(tmp_path / "val.npz", *draw(300, 2), labels=LABELS)
    status, printed = run(capsys, test, "--labels-from", val)
    assert status == 0, printed.err


def test_known_entries_are_not_measured(monkeypatch):
    """With -1 among the targets, and whatever is said of entries that are known."""
    measured = []

    def keep(scores, targets, *args):
        measured.append(targets)
        return resampled_map(scores, targets, *args)

    monkeypatch.setattr("ia_gcn.analysis.label_headroom.resampled_map", keep)
    targets, scores = draw(300, 4)
    targets[::7, 2] = -1
    prior = fit_themes(LabelSets.of_targets(draw(2000, 5)[0]), 2)
    logits = torch.logit(torch.from_numpy(scores)).float()
    calibrate(prior, logits, torch.from_numpy(targets))
    headroom = measure_headroom(prior, logits, targets)
    assert [(t >= 0).sum() / (targets >= 0).sum() for t in measured[3::2]] == pytest.approx(
        [0.75, 0.5, 0.25], abs=0.1
    )
    assert headroom == measure_headroom(prior, logits, targets)
    states = torch.from_numpy(targets)
    expected = multi_label_metrics(prior(logits, states).double().sigmoid().numpy(), targets)
    assert headroom.map_ceiling.value == pytest.approx(expected["mAP"])
