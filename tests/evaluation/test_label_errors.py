"""Which entries are doubted, against cleanlab's own functions; the CSV and the page of them."""

import csv
import importlib.util
import re
from html import unescape

import numpy as np
import pytest
from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
from PIL import Image

from ia_gcn.evaluation.label_errors import (
    MAX_IMAGES,
    Doubt,
    find_label_errors,
    judged_labels,
    render_label_errors,
    write_label_errors,
)

HOSTILE = "<script>alert(1)</script>"


def draw(n=200, num_labels=4, seed=0):
    """Probabilities of a good model, targets of which some are wrong, and which: (n, C) each."""
    rng = np.random.default_rng(seed)
    true = rng.random((n, num_labels)) < 0.3
    logits = np.where(true, 2.0, -2.0) + rng.normal(size=true.shape)
    wrong = rng.random(true.shape) < 0.05
    return 1 / (1 + np.exp(-logits)), (true ^ wrong).astype(np.float32), wrong


def entries(doubts):
    return {(doubt.image, doubt.label) for doubt in doubts}


def test_they_are_what_cleanlab_finds_where_all_is_known():
    probabilities, targets, wrong = draw()
    doubts = find_label_errors(probabilities, targets)
    lists = [np.flatnonzero(row).tolist() for row in targets]
    issues, _, _ = find_multilabel_issues_per_class(
        lists,
        probabilities,
        return_indices_ranked_by="self_confidence",
        filter_by="low_self_confidence",
        n_jobs=1,
    )
    assert entries(doubts) == {(i, label) for label, found in enumerate(issues) for i in found}
    for label, found in enumerate(issues):
        assert [doubt.image for doubt in doubts if doubt.label == label] == list(found)
    right = [wrong[doubt.image, doubt.label] for doubt in doubts]
    assert np.mean(right) > 0.5
    assert np.mean(right[:10]) > 0.9


def test_the_least_likely_given_label_comes_first():
    probabilities, targets, _ = draw()
    doubts = find_label_errors(probabilities, targets)
    for doubt in doubts:
        p = probabilities[doubt.image, doubt.label]
        assert doubt.given == (targets[doubt.image, doubt.label] == 1)
        assert doubt.probability == p
        assert doubt.score == pytest.approx(p if doubt.given else 1 - p)
        assert doubt.prior is None
    assert [doubt.score for doubt in doubts] == sorted(doubt.score for doubt in doubts)


def test_unknown_entries_are_not_there():
    """The others are judged as if the data set had nothing else."""
    probabilities, targets, _ = draw()
    unknown = np.random.default_rng(1).random(targets.shape) < 0.3
    targets[unknown] = -1
    doubts = find_label_errors(probabilities, targets)
    assert doubts
    assert not any(unknown[doubt.image, doubt.label] for doubt in doubts)
    changed = np.where(unknown, 1 - probabilities, probabilities)
    assert find_label_errors(changed, targets) == doubts
    rows = np.flatnonzero(~unknown[:, 2])
    alone = find_label_errors(probabilities[rows][:, [2]], targets[rows][:, [2]])
    assert {(rows[doubt.image], 2) for doubt in alone} == {
        entry for entry in entries(doubts) if entry[1] == 2
    }


def test_the_order_of_labels_and_images_does_not_matter():
    probabilities, targets, _ = draw()
    doubts = find_label_errors(probabilities, targets)
    images, labels = np.random.default_rng(1).permutation(200), np.array([2, 0, 3, 1])
    shuffled = find_label_errors(probabilities[images][:, labels], targets[images][:, labels])
    back = {(images[doubt.image], labels[doubt.label]) for doubt in shuffled}
    assert back == entries(doubts)


def test_labels_of_few_images_are_not_judged():
    probabilities, targets, _ = draw()
    targets[:, 0] = np.arange(200) < 4
    targets[:, 1] = np.arange(200) >= 4
    targets[:, 2] = -1
    probabilities[:, :3] = 1 - targets[:, :3].clip(0)
    assert judged_labels(targets, 5).tolist() == [3]
    assert judged_labels(targets, 4).tolist() == [0, 1, 3]
    assert {doubt.label for doubt in find_label_errors(probabilities, targets)} == {3}
    targets[:, 3] = -1
    assert find_label_errors(probabilities, targets) == []


def test_what_the_labels_alone_say_is_a_column(tmp_path):
    probabilities, targets, _ = draw()
    prior = np.random.default_rng(1).random(targets.shape)
    plain = find_label_errors(probabilities, targets)
    doubts = find_label_errors(probabilities, targets, prior)
    assert [doubt._replace(prior=None) for doubt in doubts] == plain
    files, names = [f"{i}.jpg" for i in range(200)], list("abcd")
    write_label_errors(tmp_path / "with.csv", doubts, files, names)
    write_label_errors(tmp_path / "without.csv", plain, files, names)
    with_prior, without = (
        list(csv.DictReader((tmp_path / name).open())) for name in ("with.csv", "without.csv")
    )
    assert len(with_prior) == len(doubts)
    for rank, (row, doubt) in enumerate(zip(with_prior, doubts), start=1):
        assert row.pop("labels_alone") == f"{prior[doubt.image, doubt.label]:.6f}"
        assert row == {
            "rank": str(rank),
            "file": files[doubt.image],
            "label": names[doubt.label],
            "given": "present" if doubt.given else "absent",
            "probability": f"{doubt.probability:.6f}",
            "score": f"{doubt.score:.6f}",
        }
    assert without == with_prior


def test_without_cleanlab_it_says_what_to_install(monkeypatch, error_line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "ia_gcn[clean]"' in error_line(find_label_errors, *draw()[:2])


# ------------------------------------------------------------------------------------- the page


def test_the_page_shows_the_first_images(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(MAX_IMAGES + 20)]
    for name in files[1:]:
        Image.new("RGB", (40, 30), "red").save(name)
    targets = np.zeros((len(files), 3), np.float32)
    targets[0] = [1, 1, -1]
    doubts = [Doubt(0, 0, True, 0.0125, 0.0125, 0.5)]
    doubts += [Doubt(i, 1, False, 0.9, 0.1, 0.25) for i in range(1, len(files))]
    names = [HOSTILE, "dog", "犬"]
    html = render_label_errors(doubts, targets, files, names, "mine & yours", {"Folds": "5"})
    assert "<script>alert" not in html
    assert HOSTILE in unescape(html)
    assert "mine &amp; yours" in html
    # The first image is missing, and named.
    assert html.count('src="data:image/jpeg;base64,') == MAX_IMAGES - 1
    assert f"{files[0]}\n" in html
    assert f"<b>{MAX_IMAGES}. dog</b>" in html
    assert f"<b>{MAX_IMAGES + 1}." not in html
    assert "<dd>1.2 %" in html
    assert "according to its other labels<dd>50.0 %" in html
    assert re.search(rf"{len(files)} of {3 * len(files) - 1} known entries", html)
    # Present and doubted, absent and doubted.
    assert re.search(rf"dog<td>1<td>0<td>{len(files) - 1}<td>{len(files) - 1}\n", html)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)


def test_a_page_without_doubts_and_without_a_prior(tmp_path):
    targets = np.zeros((3, 2), np.float32)
    html = render_label_errors([], targets, ["a", "b", "c"], ["cat", "dog"], "mine", {})
    assert "0 of 6 known entries" in html
    assert "other labels" not in html
