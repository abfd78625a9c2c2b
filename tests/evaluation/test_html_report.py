"""The report of an evaluation: its figures, its images, and that names stay text in it."""

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import tracemalloc
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from ia_gcn.engine import Trainer
from ia_gcn.engine.trainer import describe_model
from ia_gcn.evaluation import (
    Conventions,
    MultiLabelEvaluator,
    Predictions,
    confusion,
    html_report,
    measure_predictions,
)
from ia_gcn.evaluation.confusion import confused_pairs, count_confusions
from ia_gcn.evaluation.html_report import (
    MAX_LABELS_IN_TABLE,
    MAX_LABELS_WITH_IMAGES,
    write_report,
)
from ia_gcn.evaluation.metrics import label_measures

# A mean of nothing or a division by zero must not reach the user as a warning.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://example.com/x onerror=alert(1)>',
    "</style></title></table><b>&amp;",
    "{{ 7 * 7 }}",
    "$x$ \\frac",
    "nul \0 line\nhalf \ud800",
    "犬 🐕 '",
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """What a browser finds in a page.

    Attributes:
        tags: (tag, its attributes) in order.
        text: what is to be read, without scripts and styles.
        tables: rows of cells by the table's id, the head first.
    """

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.tables, self._open, self._rows = [], "", {}, None, None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag
        if tag == "table":
            self._rows = self.tables[dict(attributes)["id"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        self._open = None
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        if self._open in ("script", "style"):
            return
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.rstrip("\n")

    def images(self):
        """The attributes of the images that are no plots."""
        return [a for tag, a in self.tags if tag == "img" and a.get("class") != "plot"]

    def plots(self):
        """The SVGs, as their root elements."""
        head = "data:image/svg+xml;base64,"
        sources = [a["src"] for tag, a in self.tags if tag == "img" and a.get("class") == "plot"]
        assert all(source.startswith(head) for source in sources)
        return [ElementTree.fromstring(base64.b64decode(source[len(head) :])) for source in sources]


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes longer than all else, and most tests don't look at it."""
    monkeypatch.setattr(html_report, "to_svg", lambda figure: b"")


def render_report(predictions, data_set, facts, find_file=lambda image_id: None, **settings):
    """The page of `write_report`."""
    results = measure_predictions(predictions, **settings)
    with tempfile.TemporaryDirectory() as folder:
        write_report(folder, predictions, results, data_set, facts, find_file)
        assert sorted(os.listdir(folder)) == ["per_label.csv", "report.html"]
        return Path(folder, "report.html").read_text("utf-8")


def number(text):
    return math.nan if text == "–" else float(text)


def make_predictions(n=60, num_labels=4, seed=0, names=None):
    """Some is ignored; the last label is in no image, and the first one is never predicted."""
    rng = np.random.default_rng(seed)
    targets = rng.choice([1, 0, -1], (n, num_labels), p=[0.3, 0.6, 0.1])
    scores = (rng.random((n, num_labels)) * 0.7 + 0.3 * (targets == 1)).astype(np.float32)
    targets[targets[:, -1] == 1, -1] = 0
    scores[:, 0] *= 0.4
    ids = np.arange(100, 100 + n)
    return Predictions(ids, scores, targets, names or [f"label {i}" for i in range(num_labels)])


# ------------------------------------------------------------------------------------- figures


def test_each_labels_figures_are_those_of_scikit_learn(no_plots):
    predictions = make_predictions()
    page = Page(render_report(predictions, "a", {}, threshold=0.5))
    head, *rows = page.tables["labels"]
    assert head == ["label", "images", *("AP", "P", "R", "F1"), "best threshold", "F1 there", "ECE"]
    assert [row[0] for row in rows] == predictions.label_names
    for i, (_, *cells) in enumerate(rows):
        known = predictions.targets[:, i] != -1
        truth = predictions.targets[known, i]
        score = predictions.scores[known, i].astype(np.float64)
        images, ap, p, r, f1, threshold, best_f1, ece = map(number, cells)
        assert images == truth.sum()
        share, mean = calibration_curve(truth, score, n_bins=15)
        counts, _ = np.histogram(score, 15, (0, 1))
        gaps = np.abs(share - mean) * counts[counts > 0]
        assert ece == pytest.approx(100 * gaps.sum() / len(truth), abs=0.006)
        if not truth.any():
            assert all(map(math.isnan, (ap, p, r, f1, threshold, best_f1)))
            continue
        (sk_p,), (sk_r,), (sk_f1,), _ = sklearn_metrics.precision_recall_fscore_support(
            truth, score >= 0.5, labels=[1], zero_division=0
        )
        expected = [sklearn_metrics.average_precision_score(truth, score), sk_p, sk_r, sk_f1]
        assert [ap, p, r, f1] == pytest.approx([100 * x for x in expected], abs=0.006)
        curve = sklearn_metrics.precision_recall_curve(truth, score)
        f1s = 2 * curve[0] * curve[1] / np.maximum(curve[0] + curve[1], 1e-9)
        assert best_f1 == pytest.approx(100 * f1s.max(), abs=0.006)
        assert threshold == pytest.approx(curve[2][f1s[:-1].argmax()], abs=0.0006)


def test_the_summary_is_that_of_scikit_learn(no_plots):
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, (50, 5))
    scores = rng.random((50, 5)).astype(np.float32)
    page = Page(
        render_report(Predictions(np.arange(50), scores, targets, list("abcde")), "a", {}, top_k=2)
    )
    ranks = (-scores).argsort(axis=1).argsort(axis=1)
    for (_, *cells), predicted in zip(
        page.tables["summary"][1:], [scores >= 0.5, (scores >= 0.5) & (ranks < 2)]
    ):
        expected = []
        for average in ("macro", "micro"):
            p, r, _, _ = sklearn_metrics.precision_recall_fscore_support(
                targets, predicted, average=average, zero_division=0
            )
            expected += [100 * p, 100 * r, 200 * p * r / (p + r)]
        assert list(map(float, cells[1:])) == pytest.approx(expected, abs=0.006)
    (first, second) = (row[1] for row in page.tables["summary"][1:])
    m_ap = 100 * sklearn_metrics.average_precision_score(targets, scores)
    assert float(first) == pytest.approx(m_ap, abs=0.006)
    assert second == "–"
    wrong = int(((scores >= 0.5) != targets).sum())
    assert f"{wrong} of 250 decisions" in page.text
    assert f"mAP{first}" in page.text.replace("\n", "")


def test_frequent_middle_and_rare_labels_are_compared(no_plots):
    predictions = make_predictions(num_labels=5)._replace(label_counts=np.array([7, 900, 40, 3, 1]))
    page = Page(render_report(predictions, "a", {}, frequency_groups=(10, 100)))
    head, *rows = page.tables["frequency"]
    assert head == ["frequency", "labels", "training images of each", "mAP"]
    ap = [row[2] for row in page.tables["labels"][1:]]
    assert rows[:2] == [["frequent", "1", "900", ap[1]], ["middle", "1", "40", ap[2]]]
    # The last label has no AP.
    assert rows[2][:3] == ["rare", "2", "3 to 7"]
    assert float(rows[2][3]) == pytest.approx((float(ap[0]) + float(ap[3])) / 2, abs=0.011)


def test_what_is_evaluated_is_said(no_plots):
    facts = {"Checkpoint": "output/model_final.pth", "Date": "today"}
    conventions = Conventions("eleven_points", "mean_of_labels", True, "in_f1")
    predictions = make_predictions()
    page = Page(render_report(predictions, "birds", facts, threshold=0.35, conventions=conventions))
    said = ("11 points", "mean of the labels' F1", "below the threshold too", "but AP")
    for text in (*facts, *facts.values(), "of birds", "Images60", "0.35", "label 3", *said):
        assert text in page.text.replace("\n", "")
    assert ("title", {}) in page.tags


def test_measures_of_labels_count_mistakes():
    predictions = make_predictions(200, 6)
    measures = label_measures(predictions.scores, predictions.targets, 0.6)
    for i in range(6):
        known = predictions.targets[:, i] != -1
        table = sklearn_metrics.confusion_matrix(
            predictions.targets[known, i],
            predictions.scores[known, i].astype(np.float64) >= 0.6,
            labels=[0, 1],
        )
        (_, wrong), (missed, found) = table.tolist()
        counts = (measures.wrong[i], measures.missed[i], measures.positives[i])
        assert counts == (wrong, missed, missed + found)


def test_labels_are_found_that_are_taken_for_each_other():
    """Half of the cats are taken for dogs; dogs, and all else, are right."""
    targets = np.zeros((100, 4), np.int8)
    for label in range(4):
        targets[25 * label : 25 * (label + 1), label] = 1
    scores = np.where(targets == 1, 0.9, 0.1)
    scores[:12, 0], scores[:12, 1] = 0.2, 0.8
    # One more that is predicted wrongly, and of which it isn't known whether it is there.
    scores[99, 2], targets[98, 1], scores[98, 1] = 0.7, -1, 0.9
    (pair, other) = confused_pairs(scores, targets, 0.5, 10)
    assert pair[:5] == (0, 1, 25, 12, 12)
    # A label's own images are not without it: 25 dogs, and the ignored image.
    assert pair.expected == pytest.approx(25 * 12 / 74)
    assert other[:5] == (3, 2, 25, 1, 0)
    names = ["cat", "dog", "car", "sea"]
    page = Page(render_report(Predictions(np.arange(100), scores, targets, names), "a", {}))
    assert page.tables["pairs"][1] == ["cat", "dog", "12", f"{25 * 12 / 74:.1f}", "25", "12"]
    assert len(page.plots()) == 3
    (heat_map,) = [
        plot for plot in page.plots() if "label predicted wrongly" in "".join(plot.itertext())
    ]
    assert ".48" in "".join(heat_map.itertext())


def test_confusions_are_counted_image_by_image():
    _, scores, targets, *_ = make_predictions(80, 5, seed=3)
    rows, columns = [4, 1, 2], [0, 2, 3]
    found = count_confusions(scores, targets, 0.4, rows, columns)
    predicted = scores.astype(np.float64) >= 0.4
    for a, i in enumerate(rows):
        for b, j in enumerate(columns):
            images = [n for n in range(80) if targets[n, i] == 1 and targets[n, j] == 0]
            wrong = [n for n in images if predicted[n, j]]
            missed = [n for n in wrong if not predicted[n, i]]
            counts = (found.images[a, b], found.wrong[a, b], found.missed[a, b])
            assert counts == (len(images), len(wrong), len(missed))
    absent = targets[:, columns] == 0
    np.testing.assert_allclose(found.rate, (absent & predicted[:, columns]).sum(0) / absent.sum(0))


def test_confusions_take_no_more_memory_with_more_images(monkeypatch):
    """And are the same counts, however many images are counted at once."""
    rng = np.random.default_rng(0)
    scores = np.asfortranarray(rng.random((20_000, 30)).astype(np.float32))
    targets = np.asfortranarray(rng.integers(-1, 2, (20_000, 30), np.int8))
    rows, columns = range(30), range(29, -1, -1)
    expected = count_confusions(scores, targets, 0.4, rows, columns)
    monkeypatch.setattr(confusion, "IMAGES_AT_ONCE", 300)
    tracemalloc.start()
    try:
        found = count_confusions(scores, targets, 0.4, rows, columns)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_equal(found, expected)
    # A byte for each of them would take 0.6 MB.
    assert peak < 300_000


def test_a_model_without_mistakes_has_no_confused_labels():
    targets = np.eye(6, dtype=np.int8)
    page = Page(
        render_report(Predictions(np.arange(6), targets * 0.9, targets, list("abcdef")), "a", {})
    )
    assert "pairs" not in page.tables
    assert "0 of 36 decisions" in page.text
    assert len(page.plots()) == 2


@pytest.mark.parametrize(("n", "num_labels"), [(0, 3), (1, 1)])
def test_next_to_nothing_is_no_crash(n, num_labels):
    predictions = make_predictions(n, num_labels)
    page = Page(render_report(predictions, "a", {}))
    assert len(page.tables["labels"]) == num_labels + 1
    assert f"Images{n}" in page.text.replace("\n", "")


# -------------------------------------------------------------------------------------- images


@pytest.fixture
def photos(tmp_path):
    """Files by image id: a colour each, of which that of 103 is cut off and that of 104 missing."""
    files = {}
    for image_id in range(100, 110):
        files[image_id] = str(tmp_path / f"photo {image_id}.png")
        if image_id != 104:
            Image.new("RGB", (600, 300), (20 * (image_id - 100), 99, 200)).save(files[image_id])
    with open(files[103], "r+b") as file:
        file.truncate(200)
    return files


def test_the_most_telling_images_are_shown(no_plots, photos):
    targets = np.array([[1]] * 6 + [[0]] * 3 + [[-1]])
    scores = np.array([[0.2, 0.9, 0.6, 0.99, 0.95, 0.1, 0.3, 0.8, 0.7, 1.0]]).T
    predictions = Predictions(np.arange(100, 110), scores, targets, ["cat"])
    html = render_report(predictions, "a", {}, find_file=photos.get)
    groups = [re.findall(r"\(image (\d+)\)\" src", part) for part in html.split("<h4>")[1:]]
    # The two best, 103 and 104, can't be read. Nothing is shown twice.
    assert groups == [["101"], ["105", "100", "102"], ["107", "108", "106"]]
    assert re.findall(r"<figure class=\"(\w+)\"", html) == [
        *("found", "missed", "missed", "found", "wrong", "wrong", "rejected"),
    ]
    page = Page(html)
    assert all(score in page.text for score in ("90.0 %", "10.0 %", "20.0 %", "80.0 %"))
    for image in page.images():
        image_id = int(re.search(r"image (\d+)", image["alt"])[1])
        assert f"photo {image_id}.png" in image["title"]
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as thumbnail:
            assert thumbnail.size == (128, 64)
            expected = (20 * (image_id - 100), 99, 200)
            assert np.abs(np.subtract(thumbnail.getpixel((60, 30)), expected)).max() <= 3


def test_images_are_upright_and_of_any_kind(no_plots, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((400, 800, 3), np.uint8)
    pixels[:, :400] = 255
    Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=exif)
    Image.new("I;16", (300, 200), 65535).save(tmp_path / "1.png")
    Image.new("RGBA", (300, 200), (255, 255, 255, 255)).save(tmp_path / "2.png")
    Image.new("CMYK", (300, 200)).save(tmp_path / "3.jpg")
    Image.new("L", (5, 4), 255).save(tmp_path / "4.gif")
    files = sorted(map(str, tmp_path.iterdir()))
    predictions = Predictions(np.arange(5), np.full((5, 1), 0.5), np.ones((5, 1)), ["a"])
    images = Page(render_report(predictions, "a", {}, find_file=files.__getitem__)).images()
    shown = {}
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as thumbnail:
            shown[image["title"][0]] = np.asarray(thumbnail.convert("L"))
    assert {name: pixels.shape for name, pixels in shown.items()} == {
        **{"0": (128, 64), "1": (85, 128), "2": (85, 128), "3": (85, 128), "4": (4, 5)}
    }
    # What was on the left is above.
    assert shown["0"][:50].min() > 230
    assert shown["0"][80:].max() < 25
    assert min(shown[name].min() for name in "1234") > 250


def test_without_files_there_are_no_images(no_plots):
    for find_file in (lambda image_id: None, lambda image_id: "no/such.jpg"):
        page = Page(render_report(make_predictions(), "a", {}, find_file=find_file))
        assert not page.images()
        assert "Present, highest" not in page.text


# ------------------------------------------------------------------------------------ the file


def test_names_are_text_whatever_they_are(tmp_path):
    plain = make_predictions(40, len(HOSTILE), names=list("abcdefgh"))
    names = sorted(
        {name.replace("/", "\\").replace("\0", "").replace("\ud800", "") for name in HOSTILE}
    )
    files = {}
    for i, image_id in enumerate(plain.image_ids.tolist()):
        files[image_id] = str(tmp_path / f"{names[i % len(names)]}.png")
        Image.new("RGB", (9, 9)).save(files[image_id], "PNG")

    def tags_of(page):
        return [(tag, set(attributes)) for tag, attributes in page.tags]

    keys = [f"key {i}" for i in range(len(HOSTILE))]
    harmless = Page(render_report(plain, "a", dict(zip(keys, keys)), find_file=files.get))
    html = render_report(
        plain._replace(label_names=HOSTILE),
        HOSTILE[0],
        dict(zip(HOSTILE, HOSTILE)),
        find_file=files.get,
    )
    page = Page(html.encode("utf-8", "replace").decode())
    # No name has become a tag or an attribute.
    assert tags_of(page) == tags_of(harmless)
    assert len(page.images()) > 20
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    shown = [row[0] for row in page.tables["labels"][1:]]
    assert shown == [*HOSTILE[:5], "nul \ufffd line\ufffdhalf \ufffd", *HOSTILE[6:]]
    titles = " ".join(image["title"] for image in page.images())
    assert all(name in titles for name in names)
    texts = "".join("".join(plot.itertext()) for plot in page.plots())
    for name in ("<script>alert(1)<", "{{ 7 * 7 }}", "$x$ \\frac", "犬 🐕 '"):
        assert name in texts


def test_nothing_is_loaded_from_elsewhere(photos):
    predictions = make_predictions(10)
    html = render_report(predictions, "a", {}, find_file=photos.get)
    page = Page(html)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "data", "poster", "background"} & set(attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.findall(r"url\(|@import|https?:|//[a-z]", re.sub(r"base64,[\w+/=]+", "", html))
    for plot in page.plots():
        for element in plot.iter():
            links = [value for name, value in element.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;")) for link in links)
            assert not element.tag.endswith(("script", "foreignObject"))
    # Nor would a browser, should a name ever slip through: only the page's own script is run.
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    script = re.search(r"<script>(.*)</script>", html, re.S)[1].encode()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )


@pytest.mark.slow
def test_the_page_of_many_labels_is_small(no_plots, tmp_path):
    """And shows images of a few labels only."""
    rng = np.random.default_rng(0)
    n, num_labels = 40, 9605
    targets = (rng.random((n, num_labels)) < 0.02).astype(np.int8)
    scores = rng.random((n, num_labels), np.float32)
    path = str(tmp_path / "noise.png")
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(path)
    names = [f"a label of some words, {i}" for i in range(num_labels)]
    predictions = Predictions(np.arange(n), scores, targets, names)
    html = render_report(predictions, "a", {}, find_file=lambda image_id: path)
    assert len(html.encode()) < 1e6
    assert html.count("<section") == MAX_LABELS_WITH_IMAGES
    assert 0 < html.count("data:image/jpeg;") <= 9 * MAX_LABELS_WITH_IMAGES
    # Heads, all labels, by their frequency, some labels, and confused pairs.
    assert html.count("<tr>") <= 4 + 2 + 3 + MAX_LABELS_IN_TABLE + 20
    assert "Of the labels with the most wrong decisions" in html


def test_of_many_labels_the_best_and_the_worst_are_shown(no_plots, monkeypatch, tmp_path):
    """And all are in a file beside the page."""
    monkeypatch.setattr(html_report, "MAX_LABELS_IN_TABLE", 6)
    names = [*"abcdefgh", 'i, "x"', "\ud800"]
    predictions = make_predictions(80, 10, names=names)
    results = measure_predictions(predictions)
    write_report(str(tmp_path), predictions, results, "a", {})
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    ranked = sorted(range(9), key=lambda i: -results.ap[i])
    shown = page.tables["labels"][1:]
    assert [row[0] for row in shown] == [names[i] for i in ranked[:3] + ranked[-3:]]
    assert ("a", {"href": "per_label.csv"}) in page.tags
    assert "These are 6 labels" in page.text
    with open(tmp_path / "per_label.csv", encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:3] == ["label", "images", "AP"]
    assert [row[0] for row in rows] == [*names[:-1], "?"]
    # Nothing is rounded, and what is shown is what is there.
    assert [float(row[2]) for row in rows[:-1]] == results.ap[:-1].tolist()
    assert rows[-1][2:7] == [""] * 5
    by_name = {row[0]: row[1:] for row in rows}
    for name, *cells in shown:
        assert list(map(float, cells)) == pytest.approx(list(map(float, by_name[name])), abs=0.006)


def test_up_to_a_thousand_labels_are_all_shown(no_plots):
    predictions = make_predictions(6, MAX_LABELS_IN_TABLE)
    page = Page(render_report(predictions, "a", {}))
    assert [row[0] for row in page.tables["labels"][1:]] == predictions.label_names
    assert "per_label.csv" not in page.text


# ------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium")
DARK = "--blink-settings=preferredColorScheme=0"


def browse(page, folder, *options):
    """What Chromium makes of a page, and does with `options`: the DOM as text."""
    path = folder / "page.html"
    path.write_text(page, "utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
        *(f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(*options, path.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_browser(photos, tmp_path):
    names = ["zebra", "ant", HOSTILE[0], "cat"]
    predictions = make_predictions(10, names=names)
    html = render_report(predictions, "birds", {}, find_file=photos.get)
    # Its own script is let through by its policy, and another one is not.
    other = "<script>document.title = 'another script'</script></body>"
    dom = browse(html.replace("</body>", other), tmp_path, "--dump-dom")
    assert '<th class="name"><button>label</button>' in dom
    assert "<title>Evaluation of birds" in dom

    # What a click does, and whether the page is as wide as the window: asked by a script, which
    # the policy would not let through.
    free = re.sub(r"<meta http-equiv=[^>]+>", "", html)
    ask = """<script>
      const heads = document.querySelectorAll("#labels th button");
      const names = () => [...document.querySelectorAll("#labels td.name")].map(td => td.innerText);
      const orders = [];
      for (const column of [0, 0, 2, 2]) { heads[column].click(); orders.push(names()); }
      const images = [...document.images];
      Promise.all(images.map(image => image.decode())).then(() => {
        const tooWide = document.documentElement.scrollWidth - innerWidth;
        const dark = getComputedStyle(document.body).backgroundColor;
        const answer = {orders, tooWide, dark, images: images.length};
        document.body.textContent = "ANSWER" + JSON.stringify(answer) + "ANSWER";
      });
    </script></body>"""
    answers = []
    for options in ["--window-size=500,900"], ["--window-size=1300,900", DARK]:
        wait = "--virtual-time-budget=5000"
        dom = browse(free.replace("</body>", ask), tmp_path, "--dump-dom", wait, *options)
        answers.append(json.loads(unescape(dom.split("ANSWER")[1])))
    ap = {row[0]: number(row[2]) for row in Page(html).tables["labels"][1:]}
    # The last label has no AP, and stays below.
    rising = sorted(names[:3], key=ap.get)
    alphabet = ["ant", "cat", "zebra"]
    for answer in answers:
        assert answer["tooWide"] <= 0
        assert answer["images"] == len(Page(html).images()) + len(Page(html).plots())
        first, second, third, fourth = answer["orders"]
        assert [name for name in first if name in alphabet] == alphabet
        assert second == first[::-1]
        assert (third, fourth) == ([*rising[::-1], "cat"], [*rising, "cat"])
    light, dark = (sum(map(int, re.findall(r"\d+", answer["dark"]))) for answer in answers)
    assert light > 3 * 200
    assert dark < 3 * 50

    shot = tmp_path / "shot.png"
    browse(html, tmp_path, f"--screenshot={shot}", "--window-size=500,900")
    with Image.open(shot) as image:
        assert image.size == (500, 900)
        assert len(image.convert("RGB").getcolors(2**24)) > 50


# ------------------------------------------------------------------------------ who writes it


@pytest.fixture
def data_set():
    DatasetCatalog.register("two_labels", list)
    MetadataCatalog.get("two_labels").set(thing_classes=["cat", "dog"])
    return "two_labels"


@pytest.mark.parametrize("report", [None, {"Checkpoint": "output/model_best.pth"}])
def test_the_evaluator_writes_it_where_it_is_asked_for(
    no_plots, data_set, photos, tmp_path, report
):
    evaluator = MultiLabelEvaluator(data_set, str(tmp_path / "out"), report=report)
    for image_id in (102, 100, 101):
        image = {"image_id": image_id, "labels": torch.tensor([1.0, 0.0])}
        image["file_name"] = photos[image_id]
        evaluator.process([image], [{"scores": torch.tensor([0.7, 0.2])}])
    evaluator.evaluate()
    path = tmp_path / "out" / "report.html"
    assert path.exists() == (report is not None)
    assert {file.name for file in (tmp_path / "out").iterdir()} - {path.name} == {
        *("metrics.json", "predictions.npz", *["per_label.csv"] * (report is not None)),
    }
    if report:
        page = Page(path.read_text("utf-8"))
        assert all(text in page.text for text in (data_set, "Checkpoint", "output/model_best.pth"))
        titles = {image["title"] for image in page.images()}
        assert titles == {f"photo {i}.png (image {i})" for i in (100, 101, 102)}


def test_a_training_writes_it_at_its_last_evaluation(make_cfg, tmp_path, monkeypatch):
    """Of the weights and of their EMA."""
    evaluated = []

    def record(cfg, model, evaluators):
        evaluated.append(cfg.clone())
        return {"multi_label": {"mAP": 50.0, "CF1": 40.0, "OF1": 30.0}}

    monkeypatch.setattr(Trainer, "test", staticmethod(record))
    opts = ("TEST.REPORT", True, "TEST.EMA", True, "SOLVER.EMA_DECAY", 0.9)
    trainer = Trainer(make_cfg("run", *opts, config="asl"))
    for iteration in (0, trainer.max_iter - 2, trainer.max_iter - 1):
        trainer.iter = iteration
        trainer.evaluate()
    assert [cfg.TEST.REPORT for cfg in evaluated] == [False] * 4 + [True] * 2
    weights, ema = (describe_model(cfg)["Checkpoint"] for cfg in evaluated[-2:])
    assert weights == str(tmp_path / "run" / "model_final.pth")
    assert ema == f"{weights} (EMA of the weights)"
