"""Your own data: CSV files, and DATASETS.CUSTOM from config to data set."""

import csv
import json
import os
from functools import partial

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ia_gcn.data import get_label_names, get_multilabel_dicts, register_multilabel_csv
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.data.datasets import load_multilabel_csv
from ia_gcn.data.datasets.custom import read_csv
from ia_gcn.engine import setup_cfg

# ------------------------------------------------------------------------------------------- CSV


@pytest.fixture
def csv_file(tmp_path):
    """A function that writes a text or bytes to a file and returns its path."""

    def write(content, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a.jpg,cat;dog\nb.jpg,cow\n", [("a.jpg", ["cat", "dog"]), ("b.jpg", ["cow"])]),
        ("file,labels\na.jpg,cat\n", [("a.jpg", ["cat"])]),
        (" file , labels \na.jpg,cat\n", [("a.jpg", ["cat"])]),
        ('"File","Labels"\na.jpg,cat\n', [("a.jpg", ["cat"])]),
        ("a.jpg,cat\nfile,labels\n", [("a.jpg", ["cat"]), ("file", ["labels"])]),
        ("a.jpg,\nb.jpg,;\n", [("a.jpg", []), ("b.jpg", [])]),
        (" a.jpg , cat ; dog ;\n", [("a.jpg", ["cat", "dog"])]),
        ('"a, b.jpg","a dog;says ""woof"""\n', [("a, b.jpg", ["a dog", 'says "woof"'])]),
        ("a.jpg,cat\r\n\r\n\r\nb.jpg,cat", [("a.jpg", ["cat"]), ("b.jpg", ["cat"])]),
        ("\ufefffile,labels\na.jpg,cat\n", [("a.jpg", ["cat"])]),
        ("\ufeffa.jpg,cat\n", [("a.jpg", ["cat"])]),
        ('a.jpg, "cat;dog"\n"b.jpg" , "cow"\n', [("a.jpg", ["cat", "dog"]), ("b.jpg", ["cow"])]),
        ("a.jpg,cat,\nb.jpg,,,\n,,\n \n", [("a.jpg", ["cat"]), ("b.jpg", [])]),
        ("1,cat\n2,dog\n", [("1", ["cat"]), ("2", ["dog"])]),
        ("été.jpg,猫;ñandú\n", [("été.jpg", ["猫", "ñandú"])]),
        ("", []),
    ],
)
def test_what_a_csv_says(csv_file, content, rows):
    assert [row[:2] for row in read_csv(csv_file(content))] == rows


def test_lines_are_those_of_an_editor(csv_file):
    path = csv_file('file,labels\r\n\r\na.jpg,cat\r\n"b\nb.jpg",cat\r\nc.jpg,dog\r\n')
    assert [row.line for row in read_csv(path)] == [3, 4, 6]


# The format can't hold a semicolon or control character in a label, a ! at its beginning, nor
# blanks around a name.
text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)
names = text.filter(lambda text: text == text.strip() and text[0] != '"')
label_names = names.filter(lambda text: ";" not in text and text[0] != "!")
label_lists = st.lists(label_names, max_size=4)


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(names.map("a{}0.jpg".format), label_lists), max_size=6),
    header=st.booleans(),
)
def test_what_a_csv_writer_writes_is_read_back(tmp_path_factory, rows, header):
    # It means something else at the beginning of a file.
    assume(not rows or rows[0][0][0] != "\ufeff")
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(["file", "labels"])
        writer.writerows([name, ";".join(labels)] for name, labels in rows)
    assert [row[:2] for row in read_csv(str(path))] == rows


@settings(max_examples=100)
@given(rows=st.lists(st.lists(label_names, unique=True, max_size=6), max_size=4), data=st.data())
def test_labels_behind_an_exclamation_mark_are_absent(tmp_path_factory, rows, data):
    path = tmp_path_factory.getbasetemp() / "absent.csv"
    present = [data.draw(st.sets(st.sampled_from(row))) if row else set() for row in rows]
    marked = [[n if n in there else f"!{n}" for n in row] for row, there in zip(rows, present)]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([f"{i}.jpg", ";".join(row)] for i, row in enumerate(marked))
    found = read_csv(str(path))
    assert [row.labels for row in found] == [
        [n for n in row if n in there] for row, there in zip(rows, present)
    ]
    assert [row.absent for row in found] == [
        [n for n in row if n not in there] for row, there in zip(rows, present)
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a.jpg,cat\nb.jpg,cat,dog\n", 2),
        ("a.jpg,cat\nb.jpg,!\n", 2),
        ("a.jpg,cat\nb.jpg,!!dog\n", 2),
        ("a.jpg,cat\nb.jpg,cat;!dog;dog\n", 2),
        ("file,labels\na.jpg\n", 2),
        ("file;labels\n", 1),
        (",cat\n", 1),
        ("a.jpg,cat\n ,cat\n", 2),
        ("file;labels\r\na.jpg;cat,dog\r\n", 1),
        ("a.jpg\tcat\n", 1),
        # Quotes inside a column.
        ('a.jpg,cat\nb.jpg,cat;"dog"\n', 2),
        ('a.jpg,\t"cat;dog"\n', 1),
        # A quote that isn't closed.
        ('a.jpg,cat\n\nb.jpg,"cat\nc.jpg,dog\n', 3),
        ("a.jpg,cat\tdog\n", 1),
        ("a.jpg,cat\0dog\n", 1),
        ("a.jpg,cat\u2028dog\n", 1),
        # Other headers.
        ("filename,label\na.jpg,cat\n", 1),
        ("\nimage,tags\na.jpg,cat\nb.jpg,cat\n", 2),
    ],
)
def test_a_line_that_is_no_image_and_labels_is_named(csv_file, error_line, content, line):
    path = csv_file(content)
    assert f"{path}, line {line}:" in error_line(read_csv, path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n\0\xff",
        b'a.jpg,"' + b"x" * 200_000,
        "a.jpg,é".encode("utf-16"),
        b"a.jpg,\xe9",
    ],
)
def test_what_is_no_csv(csv_file, error_line, content):
    path = csv_file(content)
    assert path in error_line(read_csv, path)


def test_a_missing_csv(tmp_path, error_line):
    path = str(tmp_path / "none.csv")
    assert path in error_line(read_csv, path)


def test_csv_dicts(csv_file):
    path = csv_file("b.jpg,dog;cat;dog\nsub/a.jpg,\n")
    assert load_multilabel_csv(path, "photos", ["cow", "dog", "cat"]) == [
        {"file_name": os.path.join("photos", "b.jpg"), "image_id": "b.jpg", "labels": [1, 2]},
        {"file_name": os.path.join("photos", "sub/a.jpg"), "image_id": "sub/a.jpg", "labels": []},
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.jpg,cat;gnu\nb.jpg,emu\n", "unknown label name(s): emu, gnu"),
        ("file,labels\na.jpg,cat\na.jpg,cat\n", "line 2 and line 3"),
        ("a.jpg,cat\nb.jpg,cat\n./a.jpg,dog\n", "line 1 and line 3"),
        ("sub/a.jpg,cat\nx/../sub//a.jpg,dog\n", "line 1 and line 2"),
        ("sub/a.jpg,cat\nsub\\a.jpg,cat\n", "line 1 and line 2"),
        ("ok.jpg,cat\na\0.jpg,cat\n", "line 2"),
        ("../a.jpg,cat\n", "../a.jpg"),
        ("/a.jpg,cat\n", "/a.jpg"),
        ("..\\a.jpg,cat\n", "a.jpg"),
    ],
)
def test_csv_refuses(csv_file, error_line, content, says):
    path = csv_file(content)
    message = error_line(load_multilabel_csv, path, "photos", ["cat", "dog"])
    assert path in message
    assert says in message


def test_what_the_silence_of_a_csv_says(csv_file):
    path = csv_file("a.jpg,dog;!cat; ! cow\nb.jpg,!dog\nc.jpg,\n")
    load = partial(load_multilabel_csv, path, "photos", ["cat", "dog", "cow", "emu"])
    states = [target_vector(record, 4).tolist() for record in load("unknown")]
    assert states == [[0, 1, 0, -1], [-1, 0, -1, -1], [-1, -1, -1, -1]]
    assert [record["absent_labels"] for record in load("unknown")] == [[0, 2], [1], []]
    assert [target_vector(record, 4).tolist() for record in load()] == [
        [0, 1, 0, 0],
        *2 * [[0] * 4],
    ]
    assert not any("absent_labels" in record for record in load())


def test_a_registered_csv(csv_file, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    register_multilabel_csv("mine", csv_file("a.png,dog\n"), str(tmp_path), ["cat", "dog"])
    assert get_label_names(["mine"]) == ["cat", "dog"]
    assert [d["labels"] for d in get_multilabel_dicts(["mine"])] == [[1]]
    assert MetadataCatalog.get("mine").evaluator_type == "multi_label"


# ------------------------------------------------------------------------------- DATASETS.CUSTOM


@pytest.fixture
def photos(tmp_path):
    """A folder with a.png to d.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcd":
        Image.new("RGB", (8, 6), "grey").save(folder / f"{name}.png")
    return str(folder)


def custom_cfg(**custom):
    keys = {f"DATASETS.CUSTOM.{key.upper()}": value for key, value in custom.items()}
    return setup_cfg("", [part for pair in keys.items() for part in pair])


def labels_of(name):
    """The label names of each image, by the file's name."""
    label_names = get_label_names([name])
    return {
        os.path.basename(d["file_name"]): {label_names[i] for i in d["labels"]}
        for d in get_multilabel_dicts([name])
    }


def test_custom_csv(csv_file, photos):
    train = csv_file("a.png,dog;cat\nb.png,emu\n", "train.csv")
    test = csv_file("c.png,dog\n", "test.csv")
    cfg = custom_cfg(train=train, test=test, image_root=photos)
    assert cfg.DATASETS.TRAIN == ("custom_train",)
    assert cfg.DATASETS.TEST == ("custom_test",)
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 3
    # All the training file's labels, sorted, in both data sets.
    assert get_label_names(["custom_train", "custom_test"]) == ["cat", "dog", "emu"]
    assert labels_of("custom_train") == {"a.png": {"dog", "cat"}, "b.png": {"emu"}}
    assert labels_of("custom_test") == {"c.png": {"dog"}}


def test_unknown_labels(csv_file, photos):
    """A label that is only named as absent is one, too."""
    train = csv_file("a.png,dog;!cat\nb.png,!emu\nc.png,\n", "train.csv")
    cfg = custom_cfg(train=train, image_root=photos, hold_out=0.0, unlabeled="unknown")
    assert get_label_names(["custom_train"]) == ["cat", "dog", "emu"]
    targets = [target_vector(d, 3).tolist() for d in get_multilabel_dicts(["custom_train"])]
    assert targets == [[0, 1, -1], [-1, -1, 0], [-1, -1, -1]]
    assert cfg.DATASETS.CUSTOM.UNLABELED == "unknown"


def test_unlabeled_is_one_of_two(csv_file, error_line):
    opts = ["DATASETS.CUSTOM.TRAIN", csv_file("a.png,dog\n"), "DATASETS.CUSTOM.UNLABELED", "no"]
    assert "DATASETS.CUSTOM.UNLABELED" in error_line(setup_cfg, "", opts)


def test_both_parts_know_where_a_label_is_absent(csv_file, photos):
    """Each of two labels is known to be absent in few of the images, and present in others."""
    lines = [f"{i}.png,cat{';!dog' if i < 4 else ''}" for i in range(20)]
    lines += [f"{i}.png,dog{';!cat' if i < 24 else ''}" for i in range(20, 40)]
    custom_cfg(train=csv_file("\n".join(lines)), image_root=photos, unlabeled="unknown")
    for name in ("custom_train", "custom_test"):
        dicts = DatasetCatalog.get(name)
        assert {label for d in dicts for label in d["labels"]} == {0, 1}
        assert {label for d in dicts for label in d["absent_labels"]} == {0, 1}


def test_custom_json(tiny_coco):
    train, test = tiny_coco(7), tiny_coco(3, "other")
    cfg = custom_cfg(
        train=train.json_file,
        test=test.json_file,
        image_root=train.image_root,
        test_image_root=test.image_root,
    )
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ("custom_test",))
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 3
    assert get_label_names(["custom_train", "custom_test"]) == ["red", "green", "blue"]
    assert len(get_multilabel_dicts(["custom_train"])) == 7
    for record in get_multilabel_dicts(["custom_test"]):
        assert os.path.dirname(record["file_name"]) == test.image_root
        assert len(record["annotations"]) == len(record["labels"])


def test_custom_json_and_csv_go_together(tiny_coco, csv_file):
    train = tiny_coco(3)
    test = csv_file("000001.png,blue\n")
    custom_cfg(train=train.json_file, test=test, image_root=train.image_root)
    assert get_label_names(["custom_train", "custom_test"]) == ["red", "green", "blue"]
    assert [d["labels"] for d in get_multilabel_dicts(["custom_test"])] == [[2]]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_custom_labels_give_the_order(csv_file, photos, kind):
    content = "a.png,dog;cat\n"
    if kind == "json":
        content = json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "annotations": [{"image_id": 1, "category_id": c} for c in (1, 2)],
                "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            }
        )
    labels = "('emu','dog','cat')"
    path = csv_file(content, f"x.{kind}")
    cfg = custom_cfg(train=path, image_root=photos, labels=labels, hold_out=0.0)
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 3
    assert get_label_names(["custom_train"]) == ["emu", "dog", "cat"]
    assert [d["labels"] for d in get_multilabel_dicts(["custom_train"])] == [[1, 2]]


def test_a_custom_label_that_is_listed_twice_is_refused(csv_file, photos, error_line):
    """One of its two outputs would never see an image."""
    keys = {"TRAIN": csv_file("a.png,dog\n"), "IMAGE_ROOT": photos, "LABELS": "('dog','cat','dog')"}
    opts = [part for key, value in keys.items() for part in (f"DATASETS.CUSTOM.{key}", value)]
    assert "DATASETS.CUSTOM.LABELS" in error_line(setup_cfg, "", opts)


@pytest.mark.parametrize("label", ["", "  ", "a\tb", "a\nb", "\ud800", 5])
def test_a_custom_label_that_can_be_none_is_refused(csv_file, photos, error_line, label):
    keys = {"TRAIN": csv_file("a.png,dog\n"), "IMAGE_ROOT": photos, "LABELS": ("dog", label)}
    opts = [part for key, value in keys.items() for part in (f"DATASETS.CUSTOM.{key}", value)]
    assert "DATASETS.CUSTOM.LABELS" in error_line(setup_cfg, "", opts)


def test_custom_test_only(csv_file, photos):
    cfg = custom_cfg(test=csv_file("a.png,dog\n"), image_root=photos)
    assert cfg.DATASETS.TRAIN == ()
    assert cfg.DATASETS.TEST == ("custom_test",)
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 1
    assert labels_of("custom_test") == {"a.png": {"dog"}}


def test_custom_data_takes_the_place_of_the_configs(csv_file, photos, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "DATASETS:\n  TRAIN: [digit_scenes_train]\n  TEST: [digit_scenes_val]\n"
        "MODEL:\n  LABEL_HEAD:\n    NUM_LABELS: 10\n"
    )
    opts = ["DATASETS.CUSTOM.TRAIN", csv_file("a.png,dog\n"), "DATASETS.CUSTOM.IMAGE_ROOT", photos]
    cfg = setup_cfg(str(config), [*opts, "DATASETS.CUSTOM.HOLD_OUT", 0.0])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ())
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 1


def test_registering_again_replaces(csv_file, photos):
    first = csv_file("a.png,dog\n", "1.csv")
    custom_cfg(train=first, test=first, image_root=photos)
    second = csv_file("b.png,cat;emu\n", "2.csv")
    cfg = custom_cfg(train=second, image_root=photos, hold_out=0.0)
    assert cfg.DATASETS.TEST == ()
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 2
    assert labels_of("custom_train") == {"b.png": {"cat", "emu"}}
    assert "custom_test" not in DatasetCatalog.list()


def test_an_unknown_label_in_the_test_file_is_refused(csv_file, photos, error_line):
    train, test = csv_file("a.png,dog\n", "train.csv"), csv_file("b.png,cat\n", "test.csv")
    custom_cfg(train=train, test=test, image_root=photos)
    message = error_line(get_multilabel_dicts, ["custom_test"])
    assert test in message
    assert "cat" in message


@pytest.mark.parametrize("name", ["none.csv", "none.json"])
def test_a_missing_custom_file_is_refused(tmp_path, error_line, name):
    path = str(tmp_path / name)
    assert path in error_line(setup_cfg, "", ["DATASETS.CUSTOM.TRAIN", path])


def test_a_custom_csv_without_any_label_is_refused(csv_file, photos, error_line):
    opts = ["DATASETS.CUSTOM.TRAIN", csv_file("a.png,\n"), "DATASETS.CUSTOM.IMAGE_ROOT", photos]
    assert "data.csv is empty" in error_line(setup_cfg, "", opts)


def test_nothing_is_registered_without_custom_data():
    cfg = setup_cfg("", ["DATASETS.TRAIN", "('digit_scenes_train',)"])
    assert cfg.DATASETS.TRAIN == ("digit_scenes_train",)
    assert not {"custom_train", "custom_test"} & set(DatasetCatalog.list())


# ------------------------------------------------------------------------------- the share held out

LINES = [f"{i}.png,{'cat' if i % 2 else 'dog'};{'sea' if i % 5 == 0 else ''}" for i in range(40)]


def parts_of(cfg):
    """The image ids of both data sets, without looking for the files."""
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ("custom_test",))
    return [
        {d["image_id"] for d in DatasetCatalog.get(name)}
        for name in ("custom_train", "custom_test")
    ]


def test_a_share_is_held_out_without_a_test_file(csv_file, photos):
    cfg = custom_cfg(train=csv_file("\n".join(LINES)), image_root=photos)
    train, test = parts_of(cfg)
    assert not train & test
    assert train | test == {f"{i}.png" for i in range(40)}
    assert len(test) == 8
    assert cfg.DATASETS.CUSTOM.SPLIT
    # The labels are those of the whole file.
    assert get_label_names(["custom_train", "custom_test"]) == ["cat", "dog", "sea"]
    for name in ("custom_train", "custom_test"):
        labels = [label for d in DatasetCatalog.get(name) for label in d["labels"]]
        assert set(labels) == {0, 1, 2}


def test_the_share_depends_on_the_images_and_their_labels_alone(csv_file, photos, tmp_path):
    expected = custom_cfg(train=csv_file("\n".join(LINES)), image_root=photos)
    _, test = parts_of(expected)
    reordered = csv_file("file,labels\n" + "\n".join(reversed(LINES)), "other.csv")
    for keys in (
        {"image_root": str(tmp_path)},
        {"image_root": photos, "labels": "('sea','dog','cat')"},
    ):
        cfg = custom_cfg(train=reordered, **keys)
        assert parts_of(cfg)[1] == test
        assert cfg.DATASETS.CUSTOM.SPLIT == expected.DATASETS.CUSTOM.SPLIT
    other = custom_cfg(train=reordered, image_root=photos, hold_out_seed=1)
    assert parts_of(other)[1] != test
    assert other.DATASETS.CUSTOM.SPLIT != expected.DATASETS.CUSTOM.SPLIT


def test_the_share_of_a_json_keeps_its_boxes(tiny_coco):
    data = tiny_coco(21)
    cfg = custom_cfg(train=data.json_file, image_root=data.image_root, hold_out=0.3)
    train, test = parts_of(cfg)
    assert train | test == set(range(1, 22))
    assert 4 <= len(test) <= 8
    for record in get_multilabel_dicts(["custom_test"]):
        assert len(record["annotations"]) == len(record["labels"])


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_share_out_of_range_is_refused(csv_file, error_line, share):
    keys = {"DATASETS.CUSTOM.TRAIN": csv_file("\n".join(LINES)), "DATASETS.CUSTOM.HOLD_OUT": share}
    message = error_line(setup_cfg, "", [part for pair in keys.items() for part in pair])
    assert "DATASETS.CUSTOM.HOLD_OUT" in message


@pytest.mark.parametrize("content", ["a.png,cat\n", "a.png,cat\nb.png,dog\n"])
def test_too_few_images_to_hold_out_are_refused(csv_file, error_line, content):
    message = error_line(setup_cfg, "", ["DATASETS.CUSTOM.TRAIN", csv_file(content)])
    assert "DATASETS.CUSTOM.HOLD_OUT 0.2" in message
    assert "DATASETS.CUSTOM.TEST" in message


def test_a_registered_csv_has_the_labels_that_it_names(csv_file, tmp_path):
    register_multilabel_csv("mine", csv_file("a.png,dog;cat\nb.png,ant\n"), str(tmp_path))
    assert get_label_names(["mine"]) == ["ant", "cat", "dog"]
    assert [d["labels"] for d in DatasetCatalog.get("mine")] == [[1, 2], [0]]
