"""datasets/prepare_vg500.py on a tree in Visual Genome's format, and what is registered of it."""

import itertools
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from ia_gcn.data import count_labels, get_label_names, get_multilabel_dicts
from ia_gcn.data.datasets.vg500 import register_vg_500
from ia_gcn.engine import setup_cfg
from tests.helpers.commands import load_script, run_script

SCRIPT = "datasets/prepare_vg500.py"
WIDTH, HEIGHT = 80, 60

# The names of each object of each image. Image 8 has no entry in objects.json.
NAMES = {
    1: [["Man"], ["  man "], ["tree"], ["trees"], []],
    2: [["tree", "plant"], ["Tree", "tree"], ["man\t in   hat"]],
    3: [],
    4: [["car"], ["CAR", ""], ["  "], ["man"], ["sky"]],
    5: [["zebra"]],
    6: [["sky"], ["sky"], ["man", "guy"], ["automobile"]],
    7: [["Man in hat"], ["man in  hat"], ["sky"]],
    9: [["plant"], ["été"], ["sky"]],
    2317468: [["man"], ["tree"], ["car"]],
}
ALIASES = "man,guy, Man in Hat\n\ntree,trees,,plant\n car , automobile\nauto\n"
SYNONYMS = {"guy": "man", "man in hat": "man", "trees": "tree", "plant": "tree"}
SYNONYMS["automobile"] = "car"
IMAGES = [*NAMES, 8]


def folder_of(image_id):
    return "VG_100K_2" if image_id % 2 else "VG_100K"


def file_of(image_id):
    return f"{folder_of(image_id)}/{image_id}.jpg"


def box_of(image_id, number):
    return (10 * number, 5, 8 + image_id % 5, 20)


def object_entries(id_key="image_id"):
    entries = []
    numbers = itertools.count(1058549)
    for image_id, objects in NAMES.items():
        entry = {id_key: image_id, "objects": []}
        for place, names in enumerate(objects):
            x, y, w, h = box_of(image_id, place)
            entry["objects"].append(
                {
                    "synsets": ["tree.n.01"],
                    "h": h,
                    "object_id": next(numbers),
                    "merged_object_ids": [],
                    "names": names,
                    "w": w,
                    "y": y,
                    "x": x,
                }
            )
        entries.append(entry)
    return entries


def image_entries(id_key="image_id"):
    return [
        {
            "width": WIDTH,
            "url": f"https://cs.stanford.edu/people/rak248/{file_of(image_id)}",
            "height": HEIGHT,
            id_key: image_id,
            "coco_id": None,
            "flickr_id": None,
        }
        for image_id in IMAGES
    ]


class Tree:
    """A `--root` with Visual Genome in its vg500/, written anew by `objects` and `images`."""

    def __init__(self, root):
        self.root = root
        self.folder = root / "vg500"
        for image_id in IMAGES:
            self.file(file_of(image_id))
        self.objects(object_entries())
        self.images(image_entries())

    def file(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def objects(self, content):
        (self.folder / "objects.json").write_text(json.dumps(content))

    def images(self, content):
        (self.folder / "image_data.json").write_text(json.dumps(content))

    def lists(self, train="1\n2\n3\n4\n5\n6\n", test="7\n8\n9\n2317468\n"):
        """The options of two lists of images."""
        options = []
        for split, text in (("train", train), ("test", test)):
            path = self.root / f"{split}_list.txt"
            path.write_text(text)
            options += [f"--{split}-list", path]
        return options

    def annotations(self, split):
        return json.loads((self.folder / "annotations" / f"{split}.json").read_text())

    def split(self):
        """The image ids of each split, in the files' order."""
        return {
            split: [image["id"] for image in self.annotations(split)["images"]]
            for split in ("train", "test")
        }

    def label_names(self):
        return (self.folder / "labels.txt").read_text(encoding="utf-8").splitlines()

    def labels(self):
        """By image id the names of its labels, sorted, one per annotation."""
        found = {}
        for split in ("train", "test"):
            content = self.annotations(split)
            names = {category["id"]: category["name"] for category in content["categories"]}
            assert [names[i] for i in range(1, len(names) + 1)] == self.label_names()
            found.update((image["id"], []) for image in content["images"])
            for annotation in content["annotations"]:
                found[annotation["image_id"]].append(names[annotation["category_id"]])
        return {image_id: sorted(labels) for image_id, labels in found.items()}

    def output(self):
        """The bytes of all that the command writes."""
        files = ("annotations/train.json", "annotations/test.json", "labels.txt")
        return {name: (self.folder / name).read_bytes() for name in files}


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture
def main(monkeypatch, capsys, script, tree):
    """A function that runs the command on `tree` in this process: (exit status, stdout, stderr)."""

    def run(*options):
        arguments = [SCRIPT, "--root", tree.root, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        status = script.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def make(main):
    """A function that runs the command, which must succeed, and returns its stdout."""

    def run(*options):
        status, out, err = main(*options)
        assert (status, err) == (0, "")
        return out

    return run


@pytest.fixture
def refusal(main, tree):
    """A function that runs the command, which must refuse in one line, and returns that line."""

    def run(*options):
        status, _, err = main(*options)
        assert status == 1
        assert err.count("\n") == 1
        assert err.startswith("prepare_vg500: ")
        assert not list(tree.folder.glob("*/*.json")) + list(tree.folder.glob("labels.txt"))
        assert not list(tree.folder.glob(".vg500*"))
        return err

    return run


def recount(image_ids, number, synonyms=None):
    """The labels, and by image id those that it has, by plain loops."""
    counts, present = Counter(), {}
    for image_id in image_ids:
        present[image_id] = set()
        for names in NAMES.get(image_id, []):
            cleaned = set()
            for name in names:
                words = " ".join(name.lower().split())
                if words:
                    cleaned.add((synonyms or {}).get(words, words))
            for name in cleaned:
                counts[name] += 1
                present[image_id].add(name)
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    labels = sorted(name for name, _ in order[:number])
    return labels, {i: sorted(names & set(labels)) for i, names in present.items()}


# ------------------------------------------------------------------------------ names and labels


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 10])
@pytest.mark.parametrize("id_key", ["image_id", "id"])
def test_labels_are_those_of_a_plain_count(make, tree, number, id_key):
    tree.objects(object_entries(id_key))
    tree.images(image_entries(id_key))
    make("--labels", number)
    labels, present = recount(IMAGES, number)
    assert tree.label_names() == labels
    assert tree.labels() == present


def test_the_count_in_figures(make, tree):
    # man 5, sky 5, tree 4; car 3 and man in hat 3, of which the first in the alphabet is taken.
    make("--labels", 4)
    assert tree.label_names() == ["car", "man", "sky", "tree"]
    assert tree.labels()[2] == ["tree"]
    assert tree.labels()[4] == ["car", "man", "sky"]
    assert [i for i, labels in tree.labels().items() if not labels] == [3, 5, 8]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_synonyms_count_as_one_name(make, tree, number):
    aliases = tree.root / "object_alias.txt"
    aliases.write_text(ALIASES)
    make("--labels", number, "--aliases", aliases)
    labels, present = recount(IMAGES, number, SYNONYMS)
    assert tree.label_names() == labels
    assert tree.labels() == present
    assert tree.labels()[2] == [name for name in ("man", "tree") if name in labels]


def test_an_object_with_two_names_of_one_meaning_counts_once(make, tree):
    aliases = tree.root / "object_alias.txt"
    aliases.write_text(ALIASES)
    out = make("--labels", 1, "--aliases", aliases, "--boxes")
    assert "1 labels of 8 objects (man) or more" in out
    assert tree.labels()[6] == ["man"]


def test_a_synonyms_synonym_and_a_synonym_of_two_names(make, tree):
    aliases = tree.root / "object_alias.txt"
    # What plant stands for is told last; and guy is a man already when it gets a synonym.
    aliases.write_text("man,guy\nguy,man in hat\ntree,plant\ncar,plant\n")
    make("--labels", 3, "--aliases", aliases)
    synonyms = {"guy": "man", "man in hat": "man", "plant": "car"}
    labels, present = recount(IMAGES, 3, synonyms)
    assert tree.label_names() == labels == ["car", "man", "sky"]
    assert tree.labels() == present


def test_names_are_counted_in_both_splits_and_nowhere_else(make, tree):
    lists = tree.lists(train="1\n2\n", test="5\n")
    make("--labels", 5, *lists)
    labels, present = recount([1, 2, 5], 5)
    assert labels == ["man", "man in hat", "plant", "tree", "trees"]
    assert tree.label_names() == labels
    assert tree.labels() == present


def test_too_few_names_are_refused(refusal):
    message = refusal()
    assert "objects.json" in message
    assert f"{len(recount(IMAGES, 100)[0])} names" in message
    assert "--labels 500" in message
    assert "--labels" in refusal("--labels", 0)


# --------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("form", ["{}", "{}.jpg", "VG_100K/{}.jpg", "{}.JPG", "./x/{}.jpg"])
@pytest.mark.parametrize("columns", ["", " 3 5 7", "\tman;tree"])
def test_lists_in_all_their_forms(make, tree, form, columns):
    def written(ids):
        return "\n".join(form.format(i) + columns for i in ids) + "\n\n"

    make("--labels", 3, *tree.lists(written([9, 1, 2317468]), written([8, 2])))
    assert tree.split() == {"train": [1, 9, 2317468], "test": [2, 8]}
    images = tree.annotations("train")["images"]
    assert [image["file_name"] for image in images] == [file_of(i) for i in (1, 9, 2317468)]
    assert all((image["width"], image["height"]) == (WIDTH, HEIGHT) for image in images)


@pytest.mark.parametrize(
    ("train", "test", "named"),
    [
        ("1\n2\n1.jpg", "3", "train_list.txt, line 3: image 1 is listed twice"),
        ("1\n2", "3\n2", "test_list.txt: image 2 is in"),
        ("1\nx.jpg", "3", "train_list.txt, line 2"),
        ("1\n2.png", "3", "train_list.txt, line 2"),
        ("1", "\n\n", "test_list.txt: names no image"),
        ("1\n77\n78", "99", "3 images are not in"),
    ],
)
def test_broken_lists_are_refused(refusal, tree, train, test, named):
    assert named in refusal("--labels", 3, *tree.lists(train, test))


def test_listed_images_that_are_unknown_are_named_or_left_out(main, tree, refusal):
    lists = tree.lists("1\n77\n2", "3\n78.jpg")
    message = refusal("--labels", 3, *lists)
    assert "image_data.json: 77, 78" in message
    status, out, _ = main("--labels", 3, *lists, "--skip-missing")
    assert status == 0
    assert "left out 2 images" in out
    assert tree.split() == {"train": [1, 2], "test": [3]}


def test_one_list_alone_and_a_list_that_is_not_there_are_refused(refusal, tree):
    options = tree.lists()
    for alone in (options[:2], options[2:]):
        assert "go together" in refusal("--labels", 3, *alone)
    (tree.root / "test_list.txt").unlink()
    assert "test_list.txt: No such file" in refusal("--labels", 3, *options)
    (tree.root / "test_list.txt").write_bytes(b"\xff\xfe\x00")
    assert "test_list.txt: not text" in refusal("--labels", 3, *options)


def test_a_drawn_split_depends_on_the_seed_alone(make, tree):
    make("--labels", 3)
    first, first_split = tree.output(), tree.split()
    assert sorted(first_split["train"] + first_split["test"]) == sorted(IMAGES)
    assert len(first_split["test"]) == 1
    assert all(ids == sorted(ids) for ids in first_split.values())

    shuffle = random.Random(0).shuffle
    for write, entries in ((tree.objects, object_entries()), (tree.images, image_entries())):
        shuffle(entries)
        write(entries)
    make("--labels", 3, "--seed", 0)
    assert tree.output() == first
    tests = set()
    for seed in range(1, 6):
        make("--labels", 3, "--seed", seed)
        tests.update(tree.split()["test"])
    assert len(tests) > 1


@pytest.mark.parametrize(
    ("images", "train", "test"),
    [
        (2, 1, 1),
        (11, 10, 1),
        (1000, 908, 92),
        (108_077, 98_093, 9_984),
        (108_249, 98_249, 10_000),
        (108_300, 98_249, 10_000),
    ],
)
def test_sizes_of_a_drawn_split(script, images, train, test):
    split = script.split_by_seed(range(images), 0)
    assert {name: len(ids) for name, ids in split.items()} == {"train": train, "test": test}
    assert len({*split["train"], *split["test"]}) == train + test


def test_one_image_is_not_enough_for_two_splits(refusal, tree):
    tree.images(image_entries()[:1])
    assert "no image for the train split" in refusal("--labels", 1)


# ------------------------------------------------------------------------------------- images


def test_images_are_found_where_they_are(make, tree):
    # Number 1 in the other folder, 3 in both, 4 beside them; and a link to a folder elsewhere.
    tree.file("VG_100K/3.jpg")
    (tree.folder / file_of(1)).rename(tree.folder / "VG_100K/1.jpg")
    (tree.folder / file_of(4)).rename(tree.folder / "4.jpg")
    (tree.folder / "VG_100K").rename(tree.root / "elsewhere")
    (tree.folder / "VG_100K").symlink_to(tree.root / "elsewhere")
    make("--labels", 3)
    expected = {i: file_of(i) for i in IMAGES} | {1: "VG_100K/1.jpg", 4: "4.jpg"}
    for split in ("train", "test"):
        for image in tree.annotations(split)["images"]:
            assert image["file_name"] == expected[image["id"]]
            assert (tree.folder / image["file_name"]).is_file()


def test_missing_images_are_named_or_left_out(make, tree, refusal):
    for image_id in (1, 8):
        (tree.folder / file_of(image_id)).unlink()
    message = refusal("--labels", 3)
    assert "2 images are not in" in message
    assert file_of(1) in message
    assert file_of(8) in message
    assert "--skip-missing" in message

    assert "left out 2 images" in make("--labels", 3, "--skip-missing")
    left = [image_id for image_id in IMAGES if image_id not in (1, 8)]
    labels, present = recount(left, 3)
    assert tree.label_names() == labels
    assert tree.labels() == present

    # What is listed nowhere may be missing.
    assert "left out" not in make("--labels", 3, *tree.lists("2\n4", "5\n6"))


def test_of_many_missing_images_some_are_named(refusal, tree):
    tree.images([{**image_entries()[0], "image_id": i} for i in range(100, 150)])
    message = refusal("--labels", 3)
    assert "50 images" in message
    assert "119.jpg" in message
    assert "120.jpg" not in message
    assert "and 30 more" in message


# ---------------------------------------------------------------------------------------- boxes


def test_boxes_are_those_of_the_objects(make, tree):
    make("--labels", 10, "--boxes")
    labels, _ = recount(IMAGES, 10)
    expected = []
    for image_id, objects in NAMES.items():
        for place, names in enumerate(objects):
            for name in {" ".join(name.lower().split()) for name in names} & set(labels):
                expected.append((image_id, name, list(box_of(image_id, place))))
    found = []
    for split in ("train", "test"):
        coco = COCO(str(tree.folder / "annotations" / f"{split}.json"))
        for annotation in coco.loadAnns(coco.getAnnIds()):
            name = coco.cats[annotation["category_id"]]["name"]
            found.append((annotation["image_id"], name, annotation["bbox"]))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ((0, 0, 80, 60), [0, 0, 80, 60]),
        ((-5, -6, 20, 20), [0, 0, 15, 14]),
        ((70, 50, 20, 20), [70, 50, 10, 10]),
        ((-5, 1.5, 500, 2.25), [0, 1.5, 80, 2.25]),
        ((10, 10, 0, 5), None),
        ((10, 10, 5, -1), None),
        ((80, 0, 5, 5), None),
        ((0, -9, 5, 9), None),
    ],
)
def test_boxes_are_clipped_to_the_image(make, tree, box, clipped):
    entries = object_entries()
    entries[4]["objects"][0].update(zip("xywh", box))  # the zebra
    tree.objects(entries)
    make("--labels", 10, "--boxes", *tree.lists())
    zebra = [a for a in tree.annotations("train")["annotations"] if a["image_id"] == 5]
    assert [a.get("bbox") for a in zebra] == [clipped]
    assert "bbox" not in zebra[0] or clipped
    assert tree.labels()[5] == ["zebra"]


def test_without_boxes_a_image_has_one_entry_per_label(make, tree):
    make("--labels", 10)
    entries = [a for s in ("train", "test") for a in tree.annotations(s)["annotations"]]
    assert all(set(entry) == {"id", "image_id", "category_id"} for entry in entries)
    pairs = [(entry["image_id"], entry["category_id"]) for entry in entries]
    assert len(set(pairs)) == len(pairs)
    # Boxes that aren't asked for aren't looked at.
    broken = object_entries()
    del broken[0]["objects"][0]["x"]
    tree.objects(broken)
    make("--labels", 10)


# --------------------------------------------------------------------------------- broken files


def edited(entries, place, **changes):
    entries[place].update(changes)
    return entries


A_IMAGE = image_entries()[0]
AN_OBJECT = object_entries()[0]["objects"][0]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "not a list"),
        ([1], "not a list"),
        ([{"objects": []}], "image_id"),
        (edited(object_entries(), 0, image_id="1"), "image_id"),
        (edited(object_entries(), 0, image_id=True), "image_id"),
        (edited(object_entries(), 0, image_id=2), "image 2 occurs twice"),
        (edited(object_entries(), 0, objects=None), "image 1"),
        (edited(object_entries(), 0, objects=[{"x": 1}]), "image 1"),
        (edited(object_entries(), 0, objects=[5]), "image 1"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "names": "tree"}]), "names"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "names": ["a", None]}]), "names"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "names": [["a"]]}]), "names"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "names": ["\ud800"]}] * 9), "print"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "x": "1"}]), "x, y, w, h"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "w": None}]), "x, y, w, h"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "h": float("nan")}]), "x, y, w, h"),
        (edited(object_entries(), 0, objects=[{**AN_OBJECT, "y": float("inf")}]), "x, y, w, h"),
    ],
)
def test_broken_objects_are_refused(refusal, tree, content, named):
    tree.objects(content)
    message = refusal("--labels", 3, "--boxes")
    assert "objects.json" in message
    assert named in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "not a list"),
        ([None], "not a list"),
        ([], "no image"),
        (edited(image_entries(), 0, image_id=None), "image_id"),
        (edited(image_entries(), 0, image_id=2), "image 2 occurs twice"),
        (edited(image_entries(), 0, width=0), "image 1"),
        (edited(image_entries(), 0, height="60"), "image 1"),
        (edited(image_entries(), 0, url=None), "image 1"),
        (edited(image_entries(), 0, url="1.jpg"), "image 1"),
        (edited(image_entries(), 0, url="https://host/../1.jpg"), "leads out"),
        (edited(image_entries(), 0, url="https://host/..\\../1.jpg"), "leads out"),
        (edited(image_entries(), 0, url="//1.jpg"), "leads out"),
    ],
)
def test_broken_image_data_is_refused(refusal, tree, content, named):
    (tree.root / "1.jpg").touch()
    tree.images(content)
    message = refusal("--labels", 3)
    assert "image_data.json" in message or named == "no image"
    assert named in message


@pytest.mark.parametrize("name", ["objects.json", "image_data.json"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not JSON"),
        (b'[{"image_id": 1', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["\xff"]', "not JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_no_json_is_refused(refusal, tree, name, content, named):
    (tree.folder / name).unlink()
    if content is not None:
        (tree.folder / name).write_bytes(content)
    message = refusal("--labels", 3)
    assert name in message
    assert named in message


# --------------------------------------------------------------------------- the command, loaded


@pytest.fixture
def registered(tree):
    """vg_500_train and vg_500_test, registered for the tree and not for ./datasets."""
    names = ("vg_500_train", "vg_500_test")
    taken = {n: (DatasetCatalog.pop(n), MetadataCatalog.pop(n)) for n in names}
    register_vg_500(str(tree.root))
    yield
    for name, (load, metadata) in taken.items():
        DatasetCatalog.pop(name)
        DatasetCatalog[name] = load
        MetadataCatalog[name] = metadata


def test_the_command_as_a_user_runs_it(make, tree, tmp_path, monkeypatch):
    make("--labels", 4, "--boxes")
    expected = tree.output()
    for name in expected:
        (tree.folder / name).unlink()
    (tree.root / "data").mkdir()
    tree.folder.rename(tree.root / "data" / "vg500")
    source = tree.root / "downloads"
    source.mkdir()
    for name in ("objects.json", "image_data.json"):
        (tree.root / "data" / "vg500" / name).rename(source / name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tree.root / "data"))
    result = run_script(SCRIPT, "--source", source, "--labels", 4, "--boxes", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "9 training and 1 test images, 4 labels of 3 objects (car) or more" in result.stdout
    tree.folder = tree.root / "data" / "vg500"
    left = {str(path.relative_to(tree.folder)) for path in tree.folder.rglob("*.*")}
    assert left == {file_of(i) for i in IMAGES} | set(tree.output())
    assert tree.output() == expected


@pytest.mark.parametrize("options", [[], ["--boxes"]])
def test_what_is_made_is_what_is_registered(make, tree, registered, options):
    make("--labels", 4, *options, *tree.lists())
    labels, present = recount(IMAGES, 4)
    for split, ids in tree.split().items():
        dicts = get_multilabel_dicts([f"vg_500_{split}"])
        assert [d["image_id"] for d in dicts] == ids
        assert [d["file_name"] for d in dicts] == [str(tree.folder / file_of(i)) for i in ids]
        found = {d["image_id"]: [labels[i] for i in d["labels"]] for d in dicts}
        assert found == {i: present[i] for i in ids}
        assert any(d["annotations"] for d in dicts) == bool(options)
    assert MetadataCatalog.get("vg_500_test").thing_classes == labels
    assert get_label_names(["vg_500_train", "vg_500_test"]) == labels
    assert len(get_multilabel_dicts(["vg_500_train"], drop_unlabelled=True)) == sum(
        1 for i in tree.split()["train"] if present[i]
    )


def test_the_label_names_are_asked_for_only_where_they_are_needed(registered, tree, error_line):
    message = error_line(get_label_names, ["vg_500_train"])
    assert str(tree.folder / "labels.txt") in message
    assert "datasets/README.md" in message
    assert "labels.txt" in error_line(get_multilabel_dicts, ["vg_500_test"])
    names = ["DATASETS.TRAIN", "('vg_500_train',)", "DATASETS.TEST", "('vg_500_test',)"]
    cfg = setup_cfg("", [*names, "MODEL.LABEL_HEAD.NUM_LABELS", "500", "MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 500
    # Unknown names are answered with the known ones, without a look at any file.
    assert "vg_500_train" in error_line(get_label_names, ["vg_501"])


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"cat\ndog\ncat\n", b"\xff\n", b"cat\n\x1bdog\n"]
)
def test_a_broken_label_file_is_refused_until_it_is_mended(registered, tree, error_line, content):
    file = tree.folder / "labels.txt"
    file.write_bytes(content)
    assert str(file) in error_line(get_label_names, ["vg_500_train"])
    file.write_text("cat\ndog in été\n", encoding="utf-8")
    assert get_label_names(["vg_500_train"]) == ["cat", "dog in été"]


def test_counts_of_500_labels_are_those_of_a_loop():
    rng = random.Random(0)
    dicts = [{"labels": rng.sample(range(500), rng.randint(0, 25))} for _ in range(3000)]
    label_counts, pair_counts = count_labels(dicts, 500)
    expected = np.zeros((500, 500), np.int64)
    for record in dicts:
        for i in record["labels"]:
            for j in record["labels"]:
                expected[i, j] += 1
    assert pair_counts.shape == (500, 500)
    np.testing.assert_array_equal(pair_counts, expected)
    np.testing.assert_array_equal(label_counts, np.diag(expected))
