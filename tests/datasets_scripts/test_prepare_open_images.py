"""datasets/prepare_open_images.py on files in Open Images' format, and what is registered of it."""

import itertools
import os
import random

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ia_gcn.data import get_label_names, get_multilabel_dicts
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.data.datasets import open_images
from ia_gcn.data.datasets.open_images import (
    ABSENT,
    BOX,
    MACHINE,
    PRESENT,
    load_open_images,
    register_open_images,
    settle,
)
from ia_gcn.engine import check_labels, setup_cfg
from ia_gcn.errors import InputError
from tests.helpers.commands import run_script

SCRIPT = "datasets/prepare_open_images.py"

DESCRIPTIONS = """LabelName,DisplayName
/m/011k07,Tortoise
/m/011q46kg,Container
/m/01h44,Bat
/m/03g8mr,Bat
/m/0_not,"Fashion, not trainable"
/m/0hnyx,"Pastry, sweet"
"""
TRAINABLE = "/m/03g8mr\n/m/011k07\n/m/01h44\n/m/0hnyx\n/m/0nameless\n"
LABELS = ["Bat (/m/03g8mr)", "Tortoise", "Bat (/m/01h44)", "Pastry, sweet", "/m/0nameless"]
A, B, C, D = "000026e7ee790996", "0fff97e6d6b1d0aa", "ffff6d6b1d0aa000", "8000000000000000"
HUMAN_HEADER = "ImageID,Source,LabelName,Confidence\n"
# Of v7 confidences have a decimal, in the files of before they have none.
TRAIN = f"""{HUMAN_HEADER}{A},verification,/m/011k07,1.0
{A},crowdsource-verification,/m/01h44,0.0
{A},verification,/m/0_not,1.0
{A},verification,/m/0hnyx,0
{B},verification,/m/0_not,1
{D},verification,/m/011k07,1
{D},crowdsource-verification,/m/011k07,0
{D},verification,/m/03g8mr,0
{C},verification,/m/03g8mr,0
"""
MACHINES = f"""{HUMAN_HEADER}{A},machine,/m/0nameless,0.9
{A},machine,/m/01h44,0.9
{A},machine,/m/03g8mr,0.7
{B},machine,/m/0hnyx,0.8
{D},machine,/m/011k07,1.0
"""
BOXES = f"""ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,\
IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
{C},xclick,/m/03g8mr,1,0.012520,0.195618,0.148670,0.588419,0,1,0,0,0
{C},xclick,/m/03g8mr,1,0.025273,0.714668,0.000000,0.646484,0,0,1,0,0
{C},activemil,/m/011q46kg,1,0.16,0.2,0.1,0.5,0,0,0,0,0
"""


class Tree:
    """A `--root` with Open Images in its open_images/."""

    def __init__(self, root):
        self.root, self.folder = root, root / "open_images"
        self.write("oidv7-class-descriptions.csv", DESCRIPTIONS)
        self.write("oidv7-classes-trainable.txt", TRAINABLE)
        self.write("oidv7-train-annotations-human-imagelabels.csv", TRAIN)
        self.write("oidv7-train-annotations-machine-imagelabels.csv", MACHINES)
        self.write("oidv6-train-annotations-bbox.csv", BOXES)
        for folder, image in (("train", A), ("train_0", B), ("train_f", C), ("train_8", D)):
            self.image(f"{folder}/{image}.jpg")

    def write(self, name, text):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def image(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)

    def run(self, *options):
        return run_script(SCRIPT, "--root", self.root, *options)

    def prepare(self, *options):
        result = self.run(*options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def fails(self, *options):
        """The one line on stderr."""
        result = self.run(*options)
        assert result.returncode == 1
        assert result.stderr.startswith("prepare_open_images: ")
        return result.last_line

    def targets(self, split="train"):
        """By image id, as a string with a letter for each label."""
        path = str(self.folder / f"annotations/{split}.npz")
        dicts = load_open_images(path, str(self.folder), str(self.folder / "labels.txt"))
        letters = {1: "+", 0: "-", -1: "?"}
        return {
            d["image_id"]: "".join(letters[t] for t in target_vector(d, 5).tolist()) for d in dicts
        }


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def registered(tree):
    """The data sets of that root in place of the ones that the import of ia_gcn registered."""
    names = [f"open_images_{split}" for split in ("train", "val", "test")]
    before = {n: (DatasetCatalog[n], MetadataCatalog.get(n).as_dict()) for n in names}
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_open_images(str(tree.root))
    yield
    for name, (load, metadata) in before.items():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        DatasetCatalog.register(name, load)
        del metadata["name"]
        MetadataCatalog.get(name).set(**metadata)


def test_what_people_have_verified(tree):
    out = tree.prepare()
    assert "3 images, 1 labels present, 4 absent" in out
    # B has no trainable label; about D's second label people disagree.
    assert tree.targets() == {A: "?+--?", D: "-????", C: "-????"}
    assert (tree.folder / "labels.txt").read_text().splitlines() == LABELS


def test_boxes_and_machines(tree):
    tree.prepare("--boxes", "--machine", "0.8")
    assert tree.targets() == {A: "?+--+", B: "???+?", D: "-????", C: "+????"}
    tree.prepare("--machine", "0.95")
    assert tree.targets() == {A: "?+--?", D: "-????", C: "-????"}


def test_the_order_of_the_lines_makes_no_difference(tree):
    tree.prepare("--boxes", "--machine", "0.5")
    expected = tree.targets()
    for name, text in (("human-imagelabels", TRAIN), ("machine-imagelabels", MACHINES)):
        header, *lines = text.splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        tree.write(f"oidv7-train-annotations-{name}.csv", header + "".join(lines))
    tree.prepare("--boxes", "--machine", "0.5")
    assert tree.targets() == expected


def test_older_names_and_columns_in_another_order(tree):
    os.remove(tree.folder / "oidv7-train-annotations-human-imagelabels.csv")
    text = f"Confidence,LabelName,ImageID\n1,/m/011k07,{A}\n"
    tree.write("validation-annotations-human-imagelabels.csv", text)
    tree.image(f"validation/{A}.jpg")
    tree.prepare()
    assert tree.targets("val") == {A: "?+???"}
    assert not (tree.folder / "annotations/train.npz").exists()


def test_the_registered_splits(tree, registered):
    tree.prepare()
    assert get_label_names(["open_images_train"]) == LABELS
    dicts = get_multilabel_dicts(["open_images_train"], drop_unlabelled=True)
    assert [os.path.relpath(d["file_name"], tree.folder) for d in dicts] == [
        f"train/{A}.jpg",
        f"train_8/{D}.jpg",
        f"train_f/{C}.jpg",
    ]
    assert [(d["labels"], d["absent_labels"]) for d in dicts] == [
        ([1], [2, 3]),
        ([], [0]),
        ([], [0]),
    ]
    # The whole data set has 9,605 labels.
    opts = ["DATASETS.TEST", "('open_images_train',)", "MODEL.LABEL_HEAD.NUM_LABELS"]
    assert check_labels(setup_cfg("OpenImages/Base-OpenImages.yaml", [*opts, 0])) == LABELS
    cfg = setup_cfg("OpenImages/Base-OpenImages.yaml", opts[:2])
    with pytest.raises(InputError, match="NUM_LABELS is 9605, and open_images_train has 5"):
        check_labels(cfg)


def test_a_second_run_makes_only_what_is_not_there(tree):
    path = tree.folder / "annotations/train.npz"
    tree.prepare()
    before = path.stat().st_ino, tree.targets()
    assert "is there" in tree.prepare()
    assert (path.stat().st_ino, tree.targets()) == before
    for options in (["--machine", "0.5"], ["--boxes"]):
        assert "is there" not in tree.prepare(*options)
    # Another image, another one in its place, another file, or a damaged one.
    tree.image(f"train/{B}.jpg")
    assert "is there" not in tree.prepare("--boxes")
    os.rename(tree.folder / f"train/{B}.jpg", tree.folder / "train/1000000000000000.jpg")
    assert "is there" not in tree.prepare("--boxes")
    tree.write("oidv7-classes-trainable.txt", TRAINABLE + "/m/011q46kg\n")
    assert "is there" not in tree.prepare("--boxes")
    path.write_bytes(path.read_bytes()[:-100])
    assert "is there" not in tree.prepare("--boxes")


def test_missing_images(tree):
    os.remove(tree.folder / f"train/{A}.jpg")
    message = tree.fails()
    assert f"1 of 3 images are not in {tree.folder}" in message
    assert f"{A}.jpg" in message
    assert "--skip-missing" in message
    assert "1 images left out" in tree.prepare("--skip-missing")
    assert tree.targets() == {D: "-????", C: "-????"}
    for name in (f"train_8/{D}.jpg", f"train_f/{C}.jpg"):
        os.remove(tree.folder / name)
    assert "no image" in tree.fails("--skip-missing")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{A},verification,/m/011k07,0.5", "line 2"),
        (f"{A},verification,/m/011k07,yes", "line 2"),
        (f"{A},verification,/m/011k07,nan", "line 2"),
        (f"{A},verification,/m/011k07", "line 2"),
        ("../../../a.jpg,verification,/m/011k07,1", "line 2"),
        ("-0026e7ee790996f,verification,/m/011k07,1", "line 2"),
        ("26e7,verification,/m/011k07,1", "line 2"),
        ('"', ""),
    ],
)
def test_lines_that_are_refused(tree, line, says):
    name = "oidv7-train-annotations-human-imagelabels.csv"
    tree.write(name, f"{HUMAN_HEADER}{line}\n")
    message = tree.fails()
    assert str(tree.folder) in message
    assert says in message


def test_files_that_are_refused(tree):
    name = "oidv7-train-annotations-human-imagelabels.csv"
    for content in ("", "a,b\n", "ImageID,Source,Confidence\n", "\0"):
        tree.write(name, content)
        assert name in tree.fails()
    (tree.folder / name).write_bytes(b"\xff\xfe\xff\n")
    assert name in tree.fails()
    tree.write("train-annotations-human-imagelabels.csv", TRAIN)
    assert "several" in tree.fails()
    for name in ("oidv7-class-descriptions.csv", "oidv7-classes-trainable.txt"):
        text = (tree.folder / name).read_text()
        os.remove(tree.folder / name)
        assert name.partition("-")[2] in tree.fails()
        tree.write(name, text)
    assert "no such folder" in tree.fails("--source", tree.root / "none")
    assert "human-imagelabels" in run_script(SCRIPT, "--help").stdout


def test_prepared_files_that_are_refused(tree, error_line):
    tree.prepare()
    path, labels = tree.folder / "annotations/train.npz", tree.folder / "labels.txt"
    content = dict(np.load(path))
    arguments = (load_open_images, str(path), str(tree.folder), str(labels))

    def with_other(**arrays):
        np.savez(path, **{**content, **arrays})
        message = error_line(*arguments)
        assert str(path) in message

    with_other(present=np.array([5], np.int32))
    with_other(present=np.array([-1], np.int32))
    with_other(absent_ends=content["absent_ends"][::-1])
    with_other(present_ends=content["present_ends"] + 1)
    with_other(image_ids=content["image_ids"][:2])
    with_other(image_ids=content["image_ids"].astype(float))
    with_other(folder_of_image=np.array([0, 1, 9], np.uint8))
    with_other(image_ids=content["image_ids"].astype(np.int64))
    with_other(folders=np.array(["../out", "a", "b", "c"]))
    with_other(folders=np.array("train"))
    with_other(folder_of_image=np.uint8(0))
    with_other(absent=np.array([object()]))
    path.write_bytes(b"no npz")
    assert str(path) in error_line(*arguments)
    os.remove(path)
    assert "prepare_open_images.py" in error_line(*arguments)
    tree.prepare()
    labels.write_text("other\n")
    assert "labels.txt" in error_line(*arguments)


entries = st.lists(
    st.tuples(
        st.integers(0, 2**64 - 1) | st.integers(0, 2),
        st.integers(0, 3),
        st.sampled_from([MACHINE, ABSENT, PRESENT, BOX]),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(entries)
def test_settling_equals_plain_loops(entries):
    expected = {}
    for (image, label), said in itertools.groupby(sorted(entries), lambda entry: entry[:2]):
        said = {bit for *_, bit in said}
        if BOX in said:
            state = 1
        elif PRESENT in said or ABSENT in said:
            state = {(True, False): 1, (False, True): 0}.get((PRESENT in said, ABSENT in said))
        else:
            state = 1
        if state is not None:
            expected.setdefault(image, ([], []))[1 - state].append(label)
    ids = [image for image, _, _ in entries]
    codes = [label << open_images.BITS | bit for _, label, bit in entries]
    known = settle(np.array(ids, np.uint64), np.array(codes, np.int32))
    rows = [
        [part.tolist() for part in np.split(values, ends)[:-1]]
        for values, ends in (
            (known.present, known.present_ends),
            (known.absent, known.absent_ends),
        )
    ]
    found = dict(zip(known.image_ids.tolist(), zip(*rows)))
    assert found == expected
