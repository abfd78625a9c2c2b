"""
datasets/prepare_digit_scenes.py: run as a user would, and its parts one by one.
"""

import contextlib
import hashlib
import io
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
    def describe():
        return scenes.describe_settings({"train": 1, "val": 1}, 0, 96)

    before = describe()
    for name in vars(scenes):
        if name.isupper() and name not in ("NAMES", "SPLITS", "BRIGHTNESS", "HARD", "PNG_SETTINGS"):
            with monkeypatch.context() as patch:
                patch.setattr(scenes, name, "tuned")
                assert describe() != before, name
