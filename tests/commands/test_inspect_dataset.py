"""tools/inspect_dataset.py: run as a user would, and its images."""

import csv

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from ia_gcn.data.datasets.common import register_multilabel
from ia_gcn.visualization import plot_label_graph
from tests.helpers.commands import run_script

COMMAND = "inspect_dataset"
# But for what another test left open, which is closed whenever the garbage is collected.
NO_WARNINGS = pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")


IMAGES = {
    "a.png": ["cat", "dog"],
    "b.png": ["cat", "dog"],
    "sub/c.png": ["cat"],
    "d.png": ["emu"],
    "e.png": [],
    "gone.png": ["cat", "dog", "cow"],
    "cut.jpg": ["emu"],
    "f.png": ["10"],
}


@pytest.fixture
def custom(tmp_path):
    """The opts of a CSV data set of which a file is missing and one is cut."""
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in IMAGES:
        Image.fromarray(noise).save(photos / name)
    (photos / "gone.png").unlink()
    cut = photos / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    table = tmp_path / "train.csv"
    table.write_text("".join(f"{name},{';'.join(labels)}\n" for name, labels in IMAGES.items()))
    return ["DATASETS.CUSTOM.TRAIN", table, "DATASETS.CUSTOM.IMAGE_ROOT", photos]


def cells(text):
    """The words of each line."""
    return [line.split() for line in text.splitlines()]


def assert_image(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_the_command(tmp_path, custom):
    """At τ = 0.5 the edges are cat ↔ dog, cow → cat and cow → dog: P(cow|cat) is only 1/4."""
    options = ("--output", tmp_path / "out", *custom, "MODEL.LABEL_GRAPH.THRESHOLD", 0.5)
    result = run_script("tools/inspect_dataset.py", "custom_train", *options)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    out, lines = result.stdout, cells(result.stdout)

    assert "custom_train: 8 images, 5 labels" in out
    labels = [line for line in lines if line and line[0] in ("cat", "dog", "emu", "cow", "10")]
    assert labels == [
        ["cat", "4", "50.0%", "1", "2"],
        ["dog", "3", "37.5%", "1", "2"],
        ["emu", "2", "25.0%", "0", "0"],
        ["10", "1", "12.5%", "0", "0"],
        ["cow", "1", "12.5%", "2", "0"],
    ]
    numbers = [["0", "1", "12.5%"], ["1", "4", "50.0%"], ["2", "2", "25.0%"], ["3", "1", "12.5%"]]
    assert [line for line in lines if line in numbers] == numbers
    assert "labels per image: 1.38 on average" in out  # 11 labels in 8 images
    assert "images without a label: 1\n" in out
    assert "ignored entries: 0" in out
    assert "label graph: 4 edges i → j with P(j|i) ≥ 0.5" in out
    assert "labels without an edge: 2 (10, emu)" in out
    photos = tmp_path / "photos"
    assert f"missing files: 1\n  {photos / 'gone.png'}\n" in out
    assert f"unreadable files: 1\n  {photos / 'cut.jpg'}: " in out
    assert_image(tmp_path / "out" / "custom_train.png")
    assert f"heat maps: {tmp_path / 'out' / 'custom_train.png'}" in out


def test_thousands_of_labels_are_in_a_file(main, tmp_path, image):
    """Label i of 3,000 is in 2 images where it is below 10, in none above 2,900."""
    names = [f"label {i}" for i in range(3000)]
    dicts = [
        {"file_name": image, "image_id": i, "labels": list(range(last))}
        for i, last in enumerate((10, 2900))
    ]
    register_multilabel("many", lambda: dicts, names)
    status, out, _ = main("many", "--output", tmp_path)
    assert status == 0
    assert len(out) < 6000
    lines = cells(out)
    assert ["label", "9", "2", "100.0%"] in [line[:4] for line in lines]
    assert ["label", "2999", "0", "0.0%", "0", "0"] in lines
    assert "20 most frequent and the 20 rarest of 3,000 labels; all are in " in out
    assert "labels without an image: 100\n" in out
    with open(tmp_path / "many.csv", newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(names)
    assert [rows[f"label {i}"]["images"] for i in (9, 10, 2899, 2900)] == ["2", "1", "1", "0"]
    assert rows["label 9"]["edges out"] == "2899"


def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    out = capsys.readouterr().out
    for part in (
        "NAME.csv",
        "--no-decode",
        "--output",
        "--config-file",
        "custom_train DATASETS.CUSTOM.TRAIN",
    ):
        assert part in out


@pytest.mark.parametrize("last", [False, True])
def test_no_decode_opens_nothing(main, tmp_path, custom, last):
    options = ["--output", tmp_path, "--no-decode"]
    arguments = ["custom_train", *custom, *options] if last else ["custom_train", *options, *custom]
    status, out, _ = main(*arguments)
    assert status == 0
    assert "missing files: 1" in out
    assert "unreadable" not in out
    assert_image(tmp_path / "custom_train.png")


def test_a_config_file(main, tmp_path, custom):
    config = tmp_path / "config.yaml"
    config.write_text("MODEL:\n  LABEL_GRAPH:\n    THRESHOLD: 0.2\n")
    options = ["--output", tmp_path, "--config-file", config, "--no-decode"]
    status, out, _ = main("custom_train", *options, *custom)
    assert status == 0
    assert "label graph: 6 edges i → j with P(j|i) ≥ 0.2" in out


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "there.png"
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def test_ignored_entries_and_many_missing_files(main, tmp_path, image):
    dicts = [
        {"file_name": image, "image_id": 1, "labels": [0, 0], "ignored_labels": [1, 2]},
        {"file_name": image, "image_id": 2, "labels": [1], "ignored_labels": [0]},
        {"file_name": image, "image_id": 3, "labels": [1], "ignored_labels": []},
    ]
    gone = [str(tmp_path / f"gone{i:02d}.png") for i in range(25)]
    dicts += [{"file_name": name, "image_id": name, "labels": []} for name in gone]
    register_multilabel("mine", lambda: dicts, ["cat", "dog", "cow"])
    status, out, _ = main("mine", "--output", tmp_path)
    assert status == 0
    assert "ignored entries: 3, in 2 images" in out
    assert [line for line in cells(out) if line[:1] == ["cat"]] == [["cat", "1", "3.6%", "0", "0"]]
    assert "missing files: 25\n" in out
    assert gone[19] in out
    assert gone[20] not in out
    assert "and 5 more" in out
    assert "unreadable files: 0" in out
    assert dicts[0]["labels"] == [0, 0]


def test_unknown_labels_are_counted(main, tmp_path, image):
    states = [([0], [1]), ([1], [0]), ([1], []), ([], [])]
    dicts = [
        {"file_name": image, "image_id": i, "labels": labels, "absent_labels": absent}
        for i, (labels, absent) in enumerate(states)
    ]
    register_multilabel("holes", lambda: dicts, ["cat", "dog", "cow"])
    status, out, _ = main("holes", "--output", tmp_path, "--no-decode")
    assert status == 0
    rows = [line for line in cells(out) if line[:1] in (["cat"], ["dog"], ["cow"])]
    assert rows == [
        ["dog", "2", "50.0%", "0", "0", "1", "1"],
        ["cat", "1", "25.0%", "0", "0", "1", "2"],
        ["cow", "0", "0.0%", "0", "0", "0", "4"],
    ]
    assert "images with unknown labels: 4, in which 1.25 labels are known on average" in out


def test_a_detection_data_set(main, tmp_path, image):
    """One of detectron2's kind, whose labels are those of its boxes."""
    boxes = [{"category_id": 1}, {"category_id": 1}]
    dicts = [{"file_name": image, "image_id": 1, "annotations": boxes}]
    register_multilabel("mine", lambda: dicts, ["cat", "dog"])
    status, out, _ = main("mine", "--output", tmp_path)
    assert status == 0
    assert ["dog", "1", "100.0%", "0", "0"] in cells(out)
    assert "labels per image: 1.00" in out


def test_many_labels(main, tmp_path, image):
    """The heat maps have the most frequent ones, and not all names of others are listed."""
    names = [f"label {i}" for i in range(600)]
    dicts = [{"file_name": image, "image_id": i, "labels": [i, 0]} for i in range(600)]
    register_multilabel("many", lambda: dicts, names)
    status, out, _ = main("many", "--output", tmp_path, "MODEL.LABEL_GRAPH.THRESHOLD", 1.0)
    assert status == 0
    assert ["label", "0", "600", "100.0%", "0", "599"] in cells(out)
    assert "label graph: 599 edges" in out
    assert "the 500 most frequent of 600 labels" in out
    assert_image(tmp_path / "many.png")


def test_a_list_of_many_labels_without_an_edge_is_cut(main, tmp_path, image):
    dicts = [{"file_name": image, "image_id": i, "labels": [i]} for i in range(30)]
    register_multilabel("lonely", lambda: dicts, [f"label {i}" for i in range(30)])
    status, out, _ = main("lonely", "--output", tmp_path)
    assert status == 0
    assert "labels without an edge: 30 (label 0, " in out
    assert "label 19, and 10 more)" in out


def test_all_images_of_a_file_are_looked_at_unless_a_share_is_asked_for(main, tmp_path, custom):
    options = ("--output", tmp_path, "--no-decode", *custom)
    assert "custom_train: 8 images" in main("custom_train", *options)[1]
    held_out = ("DATASETS.CUSTOM.HOLD_OUT", 0.25)
    numbers = []
    for name in ("custom_train", "custom_test"):
        status, out, _ = main(name, *options, *held_out)
        assert status == 0
        numbers.append(int(out.split()[1]))
    assert sum(numbers) == 8
    assert min(numbers) > 0


def fails(result):
    """The one line on stderr of a command that fails."""
    status, _, err = result
    assert status == 1
    assert err.startswith("inspect_dataset: ")
    assert err.count("\n") == 1
    return err


def test_errors_are_one_line(main, tmp_path, custom, image):
    assert "'coco_2041' is not registered" in fails(main("coco_2041"))
    none = tmp_path / "none.csv"
    assert str(none) in fails(main("custom_train", "DATASETS.CUSTOM.TRAIN", none))
    assert "custom_test" in fails(main("custom_test", *custom))
    assert "none.yaml" in fails(main("custom_train", "--config-file", tmp_path / "none.yaml"))
    assert "NO.SUCH.KEY" in fails(main("digit_scenes_train", "NO.SUCH.KEY", "1"))
    graph = ["MODEL.LABEL_GRAPH.THRESHOLD", "2.0"]
    assert "MODEL.LABEL_GRAPH" in fails(main("custom_train", "--output", tmp_path, *custom, *graph))
    assert image in fails(main("custom_train", "--output", image, *custom))


def test_errors_of_the_data(main, tmp_path, image):
    register_multilabel("empty", lambda: [], ["cat"])
    assert "empty" in fails(main("empty", "--output", tmp_path))
    dicts = [{"file_name": image, "image_id": 1, "labels": [1]}]
    register_multilabel("bad", lambda: dicts, ["cat"])
    assert image in fails(main("bad", "--output", tmp_path))


def test_errors_end_the_command_with_status_1():
    result = run_script("tools/inspect_dataset.py", "coco_2041")
    assert result.returncode == 1
    assert result.last_line.startswith("inspect_dataset: ")


# -------------------------------------------------------------------------------------- images


@NO_WARNINGS
@pytest.mark.parametrize("count", [1, 2, 30, 130])
def test_label_graphs_of_any_size(tmp_path, count):
    rng = np.random.default_rng(0)
    conditional, lcm = rng.random((2, count, count))
    before = conditional.copy(), lcm.copy()
    plot_label_graph(conditional, lcm, [f"label {i}" for i in range(count)], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert max(image.size) < 4000
        image.load()
    assert np.array_equal(conditional, before[0])
    assert np.array_equal(lcm, before[1])
    assert not pyplot.get_fignums()  # no figure is left with pyplot


@NO_WARNINGS
def test_label_graph_without_an_edge_and_with_odd_names(tmp_path):
    names = ["$x^{$", "a label's name that is much longer than what there is room for", "", "a_b"]
    plot_label_graph(np.eye(4), np.eye(4), names, tmp_path / "x.png")
    assert_image(tmp_path / "x.png")


def test_both_matrices_are_drawn(tmp_path):
    zero, some = np.zeros((5, 5)), np.full((5, 5), 0.5)
    for i, pair in enumerate([(zero, zero), (some, zero), (zero, some)]):
        plot_label_graph(*pair, list("abcde"), tmp_path / f"{i}.png")
    images = [np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(3)]
    middle = images[0].shape[1] // 2
    left, right = slice(None, middle), slice(middle, None)
    assert (images[1][:, left] != images[0][:, left]).any()
    assert (images[2][:, right] != images[0][:, right]).any()
    assert (images[1][:, right] == images[0][:, right]).mean() > 0.9
