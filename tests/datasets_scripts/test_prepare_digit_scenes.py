"""
datasets/prepare_digit_scenes.py: run as a user would, and its parts one by one.
"""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from tests.helpers.commands import ROOT, load_script, run_script

SCRIPT = "datasets/prepare_digit_scenes.py"
TRAIN, VAL = 60, 30  # enough for every label to occur in both


@pytest.fixture(scope="module")
def scenes():
    return load_script(SCRIPT)


def run(root, *options):
    return run_script(SCRIPT, "--root", root, *options)


def make(root, *options, train=TRAIN, val=VAL):
    result = run(root, "--train", train, "--val", val, *options)
    assert result.returncode == 0, result.stderr
    return root / "digit_scenes"


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def annotations(folder, split):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def labels_by_image(folder, split):
    """
    The digits that each image shows, sorted.
    """
    content = annotations(folder, split)
    found = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation["category_id"] - 1)
    return {image: sorted(labels) for image, labels in found.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small"), train=12, val=6)


# ---------------------------------------------------------------------------------- the command


def test_leaves_the_promised_files_and_nothing_else(made):
    assert [path.name for path in made.parent.iterdir()] == ["digit_scenes"]
    expected = {"settings.json", "annotations/train.json", "annotations/val.json"}
    expected |= {f"train/{number:06d}.png" for number in range(1, TRAIN + 1)}
    expected |= {f"val/{number:06d}.png" for number in range(1, VAL + 1)}
    assert set(digests(made)) == expected


def test_scenes_stay_those_that_results_were_measured_on(made):
    # Boxes tell of every random number up to the last digit's, on any machine; pixels might be
    # rounded otherwise on another.
    found = digests(made)
    assert found["settings.json"].startswith("8bd260e3c4cdb478")
    assert found["annotations/train.json"].startswith("5053f0e1affd0cb1")


def test_another_seed_makes_other_scenes(made, tmp_path):
    other = digests(make(tmp_path, "--seed", 1, train=5, val=5))
    this = digests(made)
    assert all(other[name] != this[name] for name in other)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(made, small):
    for split, count in (("train", 12), ("val", 6)):
        names = {name for name in digests(small) if name.startswith(f"{split}/")}
        assert len(names) == count
        assert all(digests(small)[name] == digests(made)[name] for name in names)
        few, many = annotations(small, split), annotations(made, split)
        assert few["images"] == many["images"][:count]
        assert few["annotations"] == many["annotations"][: len(few["annotations"])]


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_are_valid(made, scenes, split):
    coco = annotations(made, split)
    categories = [(category["id"], category["name"]) for category in coco["categories"]]
    assert categories == list(enumerate(scenes.NAMES, start=1))
    count = {"train": TRAIN, "val": VAL}[split]
    assert [image["id"] for image in coco["images"]] == list(range(1, count + 1))
    for image in coco["images"]:
        pixels = cv2.imread(str(made / split / image["file_name"]), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)

    found = coco["annotations"]
    assert [one["id"] for one in found] == list(range(1, len(found) + 1))
    boxes = np.array([one["bbox"] for one in found])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 3).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 96).all()
    assert [one["area"] for one in found] == (boxes[:, 2] * boxes[:, 3]).tolist()
    assert all(one["iscrowd"] == 0 for one in found)
    _, digits_per_scene = np.unique([one["image_id"] for one in found], return_counts=True)
    assert len(digits_per_scene) == count
    assert set(digits_per_scene) == {1, 2, 3, 4, 5}
    assert {one["category_id"] for one in found} == set(range(1, 11))


def test_pycocotools_loads_it(made):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(made / "annotations" / "train.json"))
    assert len(coco.getImgIds()) == TRAIN
    assert len(coco.getCatIds()) == 10
    assert len(coco.getAnnIds(imgIds=[1])) >= 1


def test_nothing_is_done_twice(small):
    before = {path: path.stat().st_mtime_ns for path in small.parent.rglob("*")}
    again = run(small.parent, "--train", 12, "--val", 6)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in small.parent.rglob("*")} == before


def test_a_set_with_other_settings_is_replaced_with_force_only(made, small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "digit_scenes"))
    refused = run(tmp_path, "--train", TRAIN, "--val", VAL)
    assert refused.returncode != 0
    assert refused.stderr.count("\n") == 1
    assert "--force" in refused.stderr
    assert digests(folder) == digests(small)

    make(tmp_path, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["digit_scenes"]
    assert digests(folder) == digests(made)  # the same seed makes the same bytes, here and there


def test_hard_scenes_are_a_set_of_their_own_in_every_process(made, tmp_path, scenes):
    make(tmp_path, "--hard")
    hard = tmp_path / "digit_scenes_hard"
    assert [path.name for path in tmp_path.iterdir()] == ["digit_scenes_hard"]
    assert digests(hard)["settings.json"].startswith("e3fc3b942d802a2b")
    assert digests(hard)["annotations/train.json"].startswith("d266e294cc6921b2")
    settings = [json.loads((set_ / "settings.json").read_text()) for set_ in (made, hard)]
    for name, value in scenes.HARD.items():
        if name.lower() in settings[0]:
            assert settings[1][name.lower()] == json.loads(json.dumps(value))
    areas = [
        [a["area"] for a in annotations(set_, "train")["annotations"]] for set_ in (made, hard)
    ]
    assert len(areas[1]) > 1.2 * len(areas[0])
    assert np.mean(areas[1]) < 0.7 * np.mean(areas[0])
    again = run(tmp_path, "--hard", "--train", TRAIN, "--val", VAL)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


@pytest.fixture(scope="module")
def with_knobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("knobs")
    make(root, "--evidence", 0.5, "--correlation", 0.75)
    return root / "digit_scenes_e0.5_c0.75"


def test_a_set_with_knobs_lies_beside_the_others_with_its_prior(with_knobs, made, scenes):
    assert [path.name for path in with_knobs.parent.iterdir()] == [with_knobs.name]
    assert set(digests(with_knobs)) == {*digests(made), "prior.npz"}
    with np.load(with_knobs / "prior.npz", allow_pickle=False) as prior:
        assert prior["label_sets"].dtype == bool
        np.testing.assert_array_equal(prior["label_sets"], scenes.LABEL_SETS)
        np.testing.assert_array_equal(prior["probabilities"], scenes.label_prior(0.75))
    settings = json.loads((with_knobs / "settings.json").read_text())
    assert (settings["evidence"], settings["correlation"]) == (0.5, 0.75)
    assert settings["rotation"] == pytest.approx((scenes.ROTATION + 40) / 2)
    again = run(
        with_knobs.parent, "--evidence", 0.5, "--correlation", 0.75, "--train", TRAIN, "--val", VAL
    )
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_scenes_with_knobs_show_the_labels_drawn_from_the_prior(with_knobs, scenes):
    prior = scenes.label_prior(0.75)
    for split in ("train", "val"):
        shown = labels_by_image(with_knobs, split)
        for number, labels in shown.items():
            assert labels == sorted(
                scenes.draw_label_set(scenes.scene_rng(0, split, number), prior)
            )
    assert [] in shown.values()  # a scene without a digit is a scene, too


def test_the_other_knob_is_one(tmp_path):
    make(tmp_path, "--evidence", 0.25, train=3, val=1)
    make(tmp_path, "--correlation", 0, train=3, val=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["digit_scenes_e0.25_c1.0", "digit_scenes_e1.0_c0.0"]


def test_evidence_changes_no_label(with_knobs, tmp_path):
    make(tmp_path, "--evidence", 0, "--correlation", 0.75, train=20, val=5)
    other = tmp_path / "digit_scenes_e0.0_c0.75"
    few, many = labels_by_image(other, "train"), labels_by_image(with_knobs, "train")
    assert few == {number: many[number] for number in few}
    assert digests(other)["train/000001.png"] != digests(with_knobs)["train/000001.png"]


@pytest.mark.parametrize(
    "options",
    [
        ("--evidence", -0.1),
        ("--correlation", 1.5),
        ("--evidence", "nan"),
        ("--evidence", 1, "--hard"),
        ("--correlation", 0, "--hard"),
    ],
)
def test_knobs_that_cannot_be_are_refused_in_one_line(tmp_path, options):
    result = run(tmp_path, *options)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert options[0] in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_no_set(tmp_path):
    command = [sys.executable, str(ROOT / SCRIPT), "--root", str(tmp_path), "--train", "100000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What runs the tests in the background has them ignore Ctrl+C, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".digit_scenes_*/made/train/*.png")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--train", -1), ("--val", 0), ("--size", 31), ("--seed", -1)]
)
def test_bad_arguments_are_refused_in_one_line(tmp_path, option, value):
    result = run(tmp_path, option, value)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert option in result.stderr
    assert str(value) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file", "--train", 1, "--val", 1)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1


# -------------------------------------------------------------------------- what scenes are about


def test_no_source_digit_is_in_both_splits(scenes):
    images, targets = load_digits().images, load_digits().target
    parts = scenes.split_sources(targets, seed=0)
    assert sorted(np.concatenate([parts["train"], parts["val"]])) == list(range(len(targets)))
    # Nor does the collection hold a digit twice, under two indices.
    looks = {split: {images[index].tobytes() for index in parts[split]} for split in parts}
    assert not looks["train"] & looks["val"]
    shares = np.bincount(targets[parts["train"]]) / np.bincount(targets)
    np.testing.assert_allclose(shares, 0.7, atol=0.01)
    assert not np.array_equal(parts["val"], scenes.split_sources(targets, seed=1)["val"])


@pytest.fixture(scope="module")
def presence(scenes):
    """
    Which labels the 4000 training scenes are to show, bool (4000, 10), without painting them.
    """
    rows = np.zeros((4000, 10), bool)
    for number, row in enumerate(rows, start=1):
        row[scenes.draw_labels(scenes.scene_rng(0, "train", number))] = True
    return rows


def test_labels_are_not_equally_frequent(presence):
    frequency = presence.mean(axis=0)
    assert 0.28 < frequency.min() / frequency.max() < 0.42


def test_each_label_keeps_one_to_three_edges(presence):
    together = presence.T.astype(int) @ presence
    given = together / together.diagonal()[:, None]  # P(j|i) in row i, column j
    np.fill_diagonal(given, 0)
    edges = given >= 0.4
    assert set(edges.sum(axis=1)) <= {1, 2, 3}
    # No pair is so close to the threshold that another seed would tip it.
    assert np.abs(given - 0.4).min() > 0.03
    # Themes overlap: from any label every other can be reached.
    reach = np.linalg.matrix_power((edges | edges.T | np.eye(10, dtype=bool)).astype(int), 9)
    assert (reach > 0).all()


# -------------------------------------------------------------- what scenes with knobs are about


def share_a_theme(scenes):
    """
    bool (10, 10): which pairs of different digits share a theme.
    """
    same = np.zeros((10, 10), bool)
    for theme in scenes.THEMES:
        same[np.ix_(theme, theme)] = True
    return same & ~np.eye(10, dtype=bool)


@pytest.fixture(scope="module", params=[0.0, 0.3, 1.0])
def correlation(request):
    return request.param


@pytest.fixture(scope="module")
def prior(scenes, correlation):
    """
    The chances of sets of labels, by frozenset.
    """
    members = (frozenset(np.flatnonzero(row).tolist()) for row in scenes.LABEL_SETS)
    return dict(zip(members, scenes.label_prior(correlation)))


def test_every_set_of_labels_has_a_chance(prior):
    assert len(prior) == 2**10
    assert min(prior.values()) > 0
    assert sum(prior.values()) == pytest.approx(1, abs=1e-12)


def test_correlation_changes_no_frequency_and_no_number_of_labels(prior, scenes):
    for label, frequency in enumerate(scenes.LABEL_FREQUENCIES):
        found = sum(chance for labels, chance in prior.items() if label in labels)
        assert found == pytest.approx(frequency, abs=1e-12)
    # Of independent labels, the number's distribution comes by adding one label after the other.
    expected = np.ones(1)
    for frequency in scenes.LABEL_FREQUENCIES:
        expected = np.convolve(expected, [1 - frequency, frequency])
    counts = np.zeros(11)
    for labels, chance in prior.items():
        counts[len(labels)] += chance
    np.testing.assert_allclose(counts, expected, atol=1e-12)


def test_labels_are_independent_without_correlation(scenes):
    for row, chance in zip(scenes.LABEL_SETS, scenes.label_prior(0)):
        factors = (f if x else 1 - f for x, f in zip(row, scenes.LABEL_FREQUENCIES))
        assert chance == pytest.approx(np.prod(list(factors)), rel=1e-10)


def test_two_digits_attract_each_other_by_the_coupling_where_they_share_a_theme(
    prior, correlation, scenes
):
    """
    With the frequencies and the numbers of labels, this makes the prior the only one there is.
    """
    same = share_a_theme(scenes)
    for rest in (frozenset(), frozenset({0}), frozenset({2, 9}), frozenset({1, 5, 6})):
        interactions = {True: [], False: []}
        for i, j in itertools.combinations(sorted(set(range(10)) - rest), 2):
            both, one, other, none = (
                np.log(prior[rest | more]) for more in ({i, j}, {i}, {j}, frozenset())
            )
            interactions[bool(same[i, j])].append(both - one - other + none)
        # What their number does, all pairs have in common.
        common = interactions[False][0]
        np.testing.assert_allclose(interactions[False], common, atol=1e-6)
        expected = common + correlation * scenes.COUPLING
        np.testing.assert_allclose(interactions[True], expected, atol=1e-6)


def test_drawn_labels_are_as_frequent_as_the_prior_says(scenes, correlation):
    prior = scenes.label_prior(correlation)
    draws = np.zeros((8_000, 10))
    rng = np.random.default_rng(0)
    for row in draws:
        row[scenes.draw_label_set(rng, prior)] = 1
    sets = scenes.LABEL_SETS.astype(float)
    expected = sets.T @ (prior[:, None] * sets)  # of labels, on the diagonal, and of pairs
    deviation = np.sqrt(expected * (1 - expected) / len(draws))
    found = draws.T @ draws / len(draws)
    assert (np.abs(found - expected) < 4.5 * deviation).all()


def test_themes_rule_at_correlation_one(scenes):
    sets, same = scenes.LABEL_SETS.astype(float), share_a_theme(scenes)
    together = sets.T @ (scenes.label_prior(1)[:, None] * sets)
    given = together / together.diagonal()[:, None]  # P(j|i) in row i, column j
    others = ~same & ~np.eye(10, dtype=bool)
    frequencies = np.broadcast_to(scenes.LABEL_FREQUENCIES, (10, 10))
    assert (given > 1.2 * frequencies)[same].all()
    assert (given < frequencies)[others].all()
    assert given[same].mean() == pytest.approx(0.62, abs=0.01)
    assert given[others].mean() == pytest.approx(0.06, abs=0.01)


@pytest.mark.parametrize(
    ("correlation", "expected"), [(0, 24.5), (0.25, 38.4), (0.5, 58.9), (0.75, 72.9), (1, 79.1)]
)
def test_what_the_other_labels_say_of_a_label_is_what_the_page_says(scenes, correlation, expected):
    prior = scenes.label_prior(correlation)
    chances = {row.tobytes(): chance for row, chance in zip(scenes.LABEL_SETS, prior)}
    found = []
    for label in range(10):
        given = []  # P(label | all others), for each set
        for row in scenes.LABEL_SETS:
            flipped = row.copy()
            flipped[label] ^= True
            odds = chances[row.tobytes()] / chances[flipped.tobytes()]
            given.append(odds / (1 + odds) if row[label] else 1 / (1 + odds))
        # Ties are ties, whatever the rounding.
        targets, scores = scenes.LABEL_SETS[:, label], np.round(given, 9)
        found.append(average_precision_score(targets, scores, sample_weight=prior))
    assert 100 * np.mean(found) == pytest.approx(expected, abs=0.06)


def test_no_digit_is_always_painted_last(scenes):
    prior = scenes.label_prior(0)
    rng = np.random.default_rng(0)
    draws = [scenes.draw_label_set(rng, prior) for _ in range(300)]
    rising = [labels == sorted(labels) for labels in draws if len(labels) == 2]
    assert 0.3 < np.mean(rising) < 0.7


# ------------------------------------------------------------------------ how a scene is painted


@pytest.fixture(scope="module")
def sources():
    data = load_digits()
    return data.images.astype(np.uint8), data.target


@pytest.mark.parametrize("size", [32, 96, 160])
def test_scenes_of_every_size(scenes, sources, size):
    for number in range(1, 21):
        rng = scenes.scene_rng(0, "train", number)
        image, labels, boxes = scenes.compose_scene(rng, *sources, size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert boxes.shape == (len(labels), 4)
        assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


def set_evidence(monkeypatch, scenes, evidence):
    for name, value in scenes.fade(evidence).items():
        monkeypatch.setattr(scenes, name, value)


@pytest.mark.parametrize("evidence", [0, 0.5, 1])
@pytest.mark.parametrize("size", [32, 96])
def test_no_digit_is_left_out_of_scenes_with_knobs(scenes, sources, monkeypatch, evidence, size):
    set_evidence(monkeypatch, scenes, evidence)
    all_ten = scenes.LABEL_SETS.all(1).astype(float)
    for number in range(3):
        rng = np.random.default_rng(number)
        _, labels, boxes = scenes.compose_scene(rng, *sources, size, all_ten)
        assert sorted(labels) == list(range(10))
        assert boxes.shape == (10, 4)
        assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


def test_a_scene_without_a_digit(scenes, sources):
    none = (~scenes.LABEL_SETS.any(1)).astype(float)
    image, labels, boxes = scenes.compose_scene(np.random.default_rng(0), *sources, 96, none)
    assert image.shape == (96, 96, 3)
    assert labels == []
    assert boxes.shape == (0, 4)


def test_evidence_runs_from_what_cannot_be_seen_to_the_scenes_as_they_are(scenes):
    assert scenes.fade(1) == {name: getattr(scenes, name) for name in scenes.UNREADABLE}
    assert scenes.fade(0) == scenes.UNREADABLE
    half = scenes.fade(0.5)
    assert half["NOISE"] == pytest.approx((0.01, 0.055))
    assert half["DISTRACTORS"] == (2, 5)
    for evidence in np.linspace(0, 1, 11):
        constants = scenes.fade(evidence)
        # What a patch leaves of a digit is enough for others to come.
        assert 1 - constants["COVERED_SHARE"][1] >= constants["MIN_VISIBLE"]


def test_the_less_evidence_the_less_digits_change_the_image(scenes, sources, monkeypatch):
    ground = scenes.paint_background(np.random.default_rng(0), 96)
    changes = []
    for evidence in (0, 0.25, 0.5, 0.75, 1):
        with monkeypatch.context() as patch:
            set_evidence(patch, scenes, evidence)
            change = 0
            for number in range(10):
                rng = np.random.default_rng(number)
                canvas, labels, _ = scenes.add_digits(rng, ground, [3, 5], *sources)
                assert labels == [3, 5]
                change += np.abs(canvas - ground).mean()
            changes.append(change)
    assert changes[0] == 0
    assert (np.diff(changes) > 0).all()


def test_hardly_a_digit_is_left_out_for_want_of_room(scenes, sources):
    wanted, shown = 0, 0
    for number in range(1, 61):
        wanted += len(scenes.draw_labels(scenes.scene_rng(0, "train", number)))
        rng = scenes.scene_rng(0, "train", number)
        shown += len(scenes.compose_scene(rng, *sources, 96)[1])
    assert 0.99 * wanted <= shown <= wanted


def test_a_written_digit_fills_its_box_at_any_scale(scenes, sources):
    rng = np.random.default_rng(0)
    for source in sources[0]:
        ink = scenes.write_digit(rng, source, rng.uniform(*scenes.DIGIT_SIDE) * 32)
        assert 0 <= ink.min() <= ink.max() <= 1
        for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
            assert edge.max() > 0.5


def test_every_digit_stays_at_least_half_visible(scenes, sources, monkeypatch):
    """
    Watch the inks on their way to the canvas, and count what the later ones leave of the earlier.
    """
    placed, painted = [], []
    place_digit, paint = scenes.place_digit, scenes.paint

    def watch_place(*args):
        result = place_digit(*args)
        if result is not None:
            placed.append(result[0])
        return result

    def watch_paint(canvas, mask, colour):
        painted.append(mask)
        paint(canvas, mask, colour)

    monkeypatch.setattr(scenes, "place_digit", watch_place)
    monkeypatch.setattr(scenes, "paint", watch_paint)
    least = 1.0
    for number in range(1, 61):
        placed.clear()
        painted.clear()
        scenes.compose_scene(scenes.scene_rng(0, "train", number), *sources, 96)
        shown = painted[-len(placed) :]  # the distractors come first
        for index, ink in enumerate(placed):
            seen = shown[index]
            for later in shown[index + 1 :]:
                seen = seen * (1 - later)
            least = min(least, seen.sum() / ink.sum())
    assert 0.5 <= least < 0.9  # and some are covered indeed


def test_a_strip_covers_the_share_of_ink_it_should(scenes, sources):
    rng = np.random.default_rng(0)
    ink = scenes.write_digit(rng, sources[0][0], 40)
    low, high = scenes.COVERED_SHARE
    for _ in range(50):
        rest = scenes.cover_part(rng, ink)
        assert ((rest == ink) | (rest == 0)).all()
        assert 1 - high - 0.01 <= rest.sum() / ink.sum() <= 1 - low + 0.01


def test_ink_is_never_invisible(scenes):
    rng = np.random.default_rng(0)
    low, high = scenes.INK_CONTRAST
    for _ in range(200):
        ground = np.full((4, 4, 3), rng.random(3), np.float32)
        gap = abs(
            scenes.choose_ink(rng, ground) @ scenes.BRIGHTNESS - ground[0, 0] @ scenes.BRIGHTNESS
        )
        assert low - 0.05 < gap < high + 0.05


@pytest.mark.parametrize("count", [*range(1, 12), 1000, 1001, 1002, 1003])
def test_what_a_quarter_is_not_further_away_than(scenes, count):
    rng = np.random.default_rng(count)
    # Few enough levels that some values are the same.
    values = (rng.integers(0, 50, count) / 50).astype(np.float32)
    points = rng.random(64, np.float32)
    expected = np.percentile(np.abs(points[:, None] - values), 25, axis=1)
    np.testing.assert_array_equal(scenes.nearest_quartile(points, values), expected)


def test_settings_know_every_constant_that_shapes_the_scenes(scenes, monkeypatch):
    def describe(knobs):
        return scenes.describe_settings({"train": 1, "val": 1}, 0, 96, knobs)

    others = {"NAMES", "SPLITS", "BRIGHTNESS", "HARD", "UNREADABLE", "LABEL_SETS", "PNG_SETTINGS"}
    of_knobs = {"INK_OPACITY", "LABEL_FREQUENCIES", "COUPLING"}
    knobs = {"evidence": 0.5, "correlation": 1.0}
    for name in vars(scenes):
        if name.isupper() and name not in others:
            with monkeypatch.context() as patch:
                before = describe(None), describe(knobs)
                patch.setattr(scenes, name, "tuned")
                assert (describe(None) == before[0]) == (name in of_knobs), name
                assert describe(knobs) != before[1], name
