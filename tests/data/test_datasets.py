"""The loaders of COCO and VOC, the data sets' names, and the checks before training."""

import contextlib
import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from ia_gcn.data import (
    build_multilabel_train_loader,
    get_label_names,
    get_multilabel_dicts,
    register_multilabel_coco,
)
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.data.datasets import (
    COCO_LABELS,
    DIGIT_LABELS,
    VOC_LABELS,
    common,
    load_multilabel_coco,
    load_multilabel_voc,
    register_multilabel_voc,
)
from ia_gcn.data.datasets.common import join_inside, register_multilabel
from ia_gcn.data.datasets.digit_scenes import register_digit_scenes
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError

# ------------------------------------------------------------------------------------------ COCO

LABELS = ["dog", "cat", "zebra"]


def coco_content():
    """A file as COCO's own look: ids with gaps and out of order, a crowd, and keys we don't use."""
    polygon = [[1, 1, 5, 1, 5, 5]]
    return {
        "info": {"year": 2014},
        "licenses": [{"id": 1, "url": "http://example.org", "name": "CC"}],
        "images": [
            {"id": 90, "file_name": "c.jpg", "width": 20, "height": 10, "license": 1},
            {"id": 7, "file_name": "a.jpg", "width": 20, "height": 10, "flickr_url": "http://x"},
            {"id": 42, "file_name": "sub/b.jpg", "width": 20, "height": 10},
            {"id": 8, "file_name": "empty.jpg", "width": 20, "height": 10},
        ],
        "annotations": [
            {
                "id": 5,
                "image_id": 7,
                "category_id": 90,
                "bbox": [1.5, 2, 3, 4.25],
                "iscrowd": 0,
                "area": 12.75,
                "segmentation": polygon,
            },
            {"id": 6, "image_id": 90, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 2, 2]},
            {"id": 9, "image_id": 7, "category_id": 90, "bbox": [5, 5, 1, 1], "iscrowd": 0},
            {"id": 1, "image_id": 42, "category_id": 17},
        ],
        "categories": [
            {"id": 90, "name": "zebra", "supercategory": "animal"},
            {"id": 3, "name": "dog", "supercategory": "animal"},
            {"id": 17, "name": "cat"},
        ],
    }


@pytest.fixture
def coco_file(tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_content()))
    return str(path)


def test_coco_labels_and_boxes(coco_file):
    dicts = load_multilabel_coco(coco_file, "photos", LABELS)
    assert [d["image_id"] for d in dicts] == [7, 8, 42, 90]
    names = [os.path.relpath(d["file_name"], "photos") for d in dicts]
    assert names == ["a.jpg", "empty.jpg", "sub/b.jpg", "c.jpg"]
    assert [d["labels"] for d in dicts] == [[0, 2], [], [1], [0]]
    assert [len(d["annotations"]) for d in dicts] == [3, 0, 0, 1]
    box = dicts[0]["annotations"][0]
    assert BoxMode.convert(box["bbox"], box["bbox_mode"], BoxMode.XYXY_ABS) == [1.5, 2, 4.5, 6.25]
    assert [a["category_id"] for a in dicts[0]["annotations"]] == [2, 0, 2]
    assert [a["iscrowd"] for d in dicts for a in d["annotations"]] == [0, 0, 0, 1]


def test_coco_labels_take_the_order_that_is_asked_for(coco_file):
    dicts = load_multilabel_coco(coco_file, "photos", ["cow", "zebra", "cat", "dog"])
    assert [d["labels"] for d in dicts] == [[1, 3], [], [2], [3]]
    assert [a["category_id"] for a in dicts[0]["annotations"]] == [1, 3, 1]


def test_coco_agrees_with_pycocotools(coco_file):
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(coco_file)
    for record in load_multilabel_coco(coco_file, "photos", LABELS):
        annotations = reference.loadAnns(reference.getAnnIds(imgIds=[record["image_id"]]))
        categories = reference.loadCats({a["category_id"] for a in annotations})
        assert {LABELS[i] for i in record["labels"]} == {c["name"] for c in categories}


def test_coco_label_names_are_read_in_id_order(coco_file):
    register_multilabel_coco("mine", coco_file, "photos")
    assert get_label_names(["mine"]) == LABELS


@pytest.fixture
def lvis_file(tmp_path):
    """As LVIS's own look: an image without a file name, and one of COCO among them."""
    content = coco_content()
    for image in content["images"][:3]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    sea, farm, street, _ = content["images"]
    sea.update(neg_category_ids=[17], coco_url="http://images.cocodataset.org/train2017/90.jpg")
    del sea["file_name"]
    farm.update(not_exhaustive_category_ids=[90])
    street.update(neg_category_ids=[3, 90], not_exhaustive_category_ids=[90])
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(("unlabeled", "silence"), [("absent", 0), ("unknown", -1)])
def test_lvis_says_which_labels_are_known(lvis_file, unlabeled, silence):
    dicts = load_multilabel_coco(lvis_file, "coco", LABELS, unlabeled)
    assert {d["image_id"]: target_vector(d, 3).tolist() for d in dicts} == {
        7: [1, -1, 1],  # not all zebras are marked, and no matter
        8: [silence] * 3,  # the image without neg_category_ids
        42: [0, 1, -1],  # maybe a zebra
        90: [1, 0, -1],
    }
    assert dicts[-1]["file_name"] == os.path.join("coco", "train2017/90.jpg")


def test_coco_labels_of_ms_coco():
    assert len(set(COCO_LABELS)) == 80
    assert (COCO_LABELS[0], COCO_LABELS[-1]) == ("person", "toothbrush")
    # Ids 12 and 26 are among those that COCO leaves out.
    assert COCO_LABELS[10:13] == ["fire hydrant", "stop sign", "parking meter"]
    assert COCO_LABELS[24:26] == ["backpack", "umbrella"]


def nested():
    """As deep as a JSON may be that Python reads here."""
    value = []
    for _ in range(sys.getrecursionlimit() - 300):
        value = [value]
    return value


BAD_COCO = {
    "unknown label": (lambda c: c["categories"][0].update(name="gnu"), "unknown label.*gnu"),
    "unknown image": (lambda c: c["annotations"][0].update(image_id=1), "image_id"),
    "unknown category": (lambda c: c["annotations"][0].update(category_id=1), "category_id"),
    "no image id": (lambda c: c["annotations"][0].pop("image_id"), "image_id"),
    "list as category": (lambda c: c["annotations"][0].update(category_id=[3]), "category_id"),
    "image twice": (lambda c: c["images"][0].update(id=7), "7 occurs twice"),
    "list as image id": (lambda c: c["images"][0].update(id=[7]), ""),
    "image ids of two kinds": (lambda c: c["images"][3].update(id="eight"), "kinds"),
    "no file name": (lambda c: c["images"][0].pop("file_name"), "file_name"),
    "number as file name": (lambda c: c["images"][0].update(file_name=7), "7"),
    "image is a string": (lambda c: c["images"].append("d.jpg"), "d.jpg"),
    "the same file": (
        lambda c: c["images"][0].update(file_name="a.jpg"),
        "image 90 and image 7 .*a.jpg",
    ),
    "the same file, written otherwise": (
        lambda c: c["images"][0].update(file_name="./x/../sub\\\\b.jpg"),
        "image 90 and image 42 .*b.jpg",
    ),
    "lone surrogate in a file name": (
        lambda c: c["images"][0].update(file_name="\ud800.jpg"),
        "image 90",
    ),
    "line break in a file name": (lambda c: c["images"][0].update(file_name="a\nb"), "image 90"),
    "huge image id": (lambda c: c["images"][0].update(id=2**63), "image id"),
    "NaN as image id": (lambda c: c["images"][0].update(id=float("nan")), "image id"),
    "true as image id": (lambda c: c["images"][0].update(id=True), "image id"),
    "lone surrogate in an image id": (lambda c: c["images"][0].update(id="\ud800"), "image id"),
    "nested image": (lambda c: c["images"].append({"x": nested()}), "without id"),
    "nested annotation": (lambda c: c["annotations"].append({"x": nested()}), "image_id"),
    "nested bbox": (lambda c: c["annotations"][0].update(bbox=nested()), "bbox"),
    "nested image id": (lambda c: c["images"][0].update(id=nested()), "image id"),
    "nested file name": (lambda c: c["images"][0].update(file_name=nested()), "file name"),
    "category ids of two kinds": (lambda c: c["categories"][0].update(id="x"), "kinds|unknown"),
    "NaN as category id": (lambda c: c["categories"][0].update(id=float("nan")), "category id"),
    "category twice": (lambda c: c["categories"][0].update(id=3), "category id 3 .*twice"),
    "category name twice": (
        lambda c: c["categories"][0].update(name="dog"),
        "dog .*twice.* 90 and 3",
    ),
    "category without name": (lambda c: c["categories"][0].pop("name"), "category"),
    "category name is a number": (lambda c: c["categories"][0].update(name=5), "category"),
    "images is a dict": (lambda c: c.update(images={}), "images"),
    "no annotations": (lambda c: c.pop("annotations"), "annotations"),
    "no categories": (lambda c: c.pop("categories"), "categories"),
}
BAD_COCO |= {
    f"file name {name!r}": (lambda c, name=name: c["images"][0].update(file_name=name), "root")
    for name in ("/etc/passwd", "../a.jpg", "a/../../b.jpg", "..\\a.jpg", "C:\\a.jpg", "\\\\h\\a")
}
BAD_COCO |= {
    f"category name {name!r}": (
        lambda c, name=name: c["categories"][1].update(name=name),
        "category 3",
    )
    for name in ("", "  ", "\ud800", "a\nb", "a\0", "\u2028", ["dog"], None)
}
BAD_COCO |= {
    f"bbox {bbox}": (lambda c, bbox=bbox: c["annotations"][0].update(bbox=bbox), "bbox")
    for bbox in (
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        ["1", "2", "3", "4"],
        [1, 2, 3, None],
        [1, 2, float("nan"), 4],
        [1, 2, float("inf"), 4],
        {"x": 1},
        None,
    )
}
BAD_COCO["bbox of huge integers"] = (
    lambda c: c["annotations"][0].update(bbox=[0, 0, 10**400, 1]),
    "bbox",
)


BAD_COCO |= {
    f"{key} {value!r}": (
        lambda c, key=key, value=value: c["images"][0].update({key: value}),
        f"image 90: {key}",
    )
    for key in ("neg_category_ids", "not_exhaustive_category_ids")
    for value in (None, 17, "17", [4], [[17]], {"17": 1}, [float("nan")], nested())
}
BAD_COCO["present and absent"] = (
    lambda c: c["images"][1].update(neg_category_ids=[17, 3]),
    "image 7: 'dog'.*neg_category_ids",
)


@pytest.mark.parametrize("case", BAD_COCO)
def test_coco_refuses(tmp_path, case, error_line):
    damage, says = BAD_COCO[case]
    content = coco_content()
    damage(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    message = error_line(load_multilabel_coco, str(path), "photos", LABELS)
    assert str(path) in message
    assert re.search(says, message)


@pytest.mark.parametrize(
    "content", [b"", b'{"images": [', b"\xff\xd8\xff\xe0", b"[1, 2]", b"null", b"[" * 100_000]
)
def test_coco_refuses_what_is_not_cocos_json(tmp_path, content, error_line):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    assert str(path) in error_line(load_multilabel_coco, str(path), "photos", LABELS)
    # Without label names, the file is read when it is registered.
    assert str(path) in error_line(register_multilabel_coco, "mine", str(path), "photos")


def test_a_json_may_begin_with_a_byte_order_mark(coco_file):
    before = load_multilabel_coco(coco_file, "photos", LABELS)
    path = Path(coco_file)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_multilabel_coco(coco_file, "photos", LABELS) == before


@pytest.mark.parametrize("kind", ["nested", None, 1, "yes", [0]])
def test_what_iscrowd_may_be(tmp_path, kind):
    """It is handed to other processes, which a value of any depth can't be."""
    content = coco_content()
    content["annotations"][0]["iscrowd"] = nested() if kind == "nested" else kind
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    box = load_multilabel_coco(str(path), "photos", LABELS)[0]["annotations"][0]
    assert box["iscrowd"] == int(bool(kind))


def test_coco_file_is_missing(tmp_path, error_line):
    path = str(tmp_path / "none.json")
    assert path in error_line(load_multilabel_coco, path, "photos", LABELS)
    assert str(tmp_path) in error_line(load_multilabel_coco, str(tmp_path), "photos", LABELS)


# ------------------------------------------------------------------------------------------- VOC


def voc_object(name, box=(10, 20, 30, 40), difficult="0", extra=""):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box)
    bndbox = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"""
    <object>
        <name>{name}</name>
        <pose>Unspecified</pose>
        <truncated>0</truncated>
        <difficult>{difficult}</difficult>
        <bndbox>{bndbox}</bndbox>{extra}
    </object>"""


PARTS = """
        <part>
            <name>head</name>
            <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>
        </part>"""


def write_voc(root, xmls, split="trainval"):
    """VOC's folders with a grey image of 50×40 pixels per entry of `xmls`, {id: objects}."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for image_id, objects in xmls.items():
        (root / "Annotations" / f"{image_id}.xml").write_text(
            f"""<annotation>
    <folder>VOC2007</folder>
    <filename>{image_id}.jpg</filename>
    <source><database>The VOC2007 Database</database></source>
    <owner><flickrid>someone</flickrid><name>Some One</name></owner>
    <size><width>50</width><height>40</height><depth>3</depth></size>
    <segmented>0</segmented>{objects}
</annotation>"""
        )
        Image.new("RGB", (50, 40), "grey").save(root / "JPEGImages" / f"{image_id}.jpg")
    (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{key}\n" for key in xmls))
    return root


@pytest.fixture
def voc_root(tmp_path):
    images = {
        "000012": voc_object("person", extra=PARTS) + voc_object("dog") + voc_object("dog"),
        "000005": voc_object("chair", difficult="1") + voc_object("sofa", (1, 1, 50, 40)),
        "000007": voc_object("chair", difficult="1") + voc_object("chair"),
        "000009": voc_object("tvmonitor", difficult="1"),
    }
    return write_voc(tmp_path / "VOC2007", images)


def voc_labels(*names):
    return sorted(VOC_LABELS.index(name) for name in names)


def test_voc_labels(voc_root):
    dicts = load_multilabel_voc(str(voc_root), "trainval")
    assert [d["image_id"] for d in dicts] == ["000012", "000005", "000007", "000009"]
    assert [d["labels"] for d in dicts] == [
        voc_labels("person", "dog"),
        voc_labels("sofa"),
        voc_labels("chair"),
        [],
    ]
    # Labels of which an image has only difficult objects.
    assert [d["ignored_labels"] for d in dicts] == [
        [],
        voc_labels("chair"),
        [],
        voc_labels("tvmonitor"),
    ]
    for record in dicts:
        assert Path(record["file_name"]) == voc_root / "JPEGImages" / f"{record['image_id']}.jpg"


def test_voc_boxes_are_counted_from_zero(voc_root):
    dicts = load_multilabel_voc(str(voc_root), "trainval")
    boxes = [
        BoxMode.convert(box["bbox"], box["bbox_mode"], BoxMode.XYWH_ABS)
        for box in dicts[1]["annotations"]
    ]
    # Pixels 10 to 30 and 20 to 40 of VOC, the last ones included; the whole image.
    assert boxes == [[9, 19, 21, 21], [0, 0, 50, 40]]
    assert [a["category_id"] for a in dicts[1]["annotations"]] == [
        VOC_LABELS.index("chair"),
        VOC_LABELS.index("sofa"),
    ]


def test_voc_parts_of_an_object_are_no_objects(voc_root):
    assert len(load_multilabel_voc(str(voc_root), "trainval")[0]["annotations"]) == 3


def test_voc_split_files_of_a_class(voc_root):
    """They have a second column, -1, 0 or 1."""
    (voc_root / "ImageSets/Main/dog_trainval.txt").write_text("000012  1\n000009 -1\n\n")
    dicts = load_multilabel_voc(str(voc_root), "dog_trainval")
    assert [d["image_id"] for d in dicts] == ["000012", "000009"]


# An entity that is written out ten times in the next one, eleven times over: 10 GB of text.
BOMB = "<!DOCTYPE x [<!ENTITY e0 'boom boom '>{}]><annotation>&e10;</annotation>".format(
    "".join(f"<!ENTITY e{i} '{f'&e{i - 1};' * 10}'>" for i in range(1, 11))
)


@pytest.mark.parametrize(
    "xml",
    [
        "<annotation><object>",
        "",
        "{}",
        "<annotation>&undefined;</annotation>",
        '<?xml version="1.0" encoding="no-such-code"?><annotation/>',
        '<?xml version="1.0" encoding="shift_jis"?><annotation/>',
        BOMB,
    ],
)
def test_voc_refuses_broken_xml(voc_root, xml, error_line):
    path = voc_root / "Annotations/000005.xml"
    path.write_text(xml)
    message = error_line(load_multilabel_voc, str(voc_root), "trainval")
    assert str(path) in message
    # Before any of it is expanded.
    assert "DOCTYPE" in message or xml is not BOMB


@pytest.mark.parametrize(
    "objects",
    [
        voc_object("unicorn"),
        voc_object(""),
        voc_object("dog", ("a", 1, 2, 3)),
        voc_object("dog", (1, 2, 3)),
        voc_object("dog", ("nan", 1, 2, 3)),
        voc_object("dog", (1, 2, "inf", 3)),
        voc_object("dog", (1, 2, "1e300", 3)),
        "<object><name>dog</name></object>",
    ],
)
def test_voc_refuses_bad_objects(tmp_path, objects, error_line):
    root = write_voc(tmp_path / "voc", {"000001": objects})
    message = error_line(load_multilabel_voc, str(root), "trainval")
    assert str(root / "Annotations/000001.xml") in message
    assert "unicorn" in message or "unicorn" not in objects


@pytest.mark.parametrize(
    "content",
    [
        b"000005\n000007\n000005\n",
        b"000005\n./000005\n",
        b"../../000005\n",
        b"/000005\n",
        b"\xff\xfe\x00\n",
        b"\x1b[2J\n",
    ],
)
def test_voc_refuses_a_bad_split_file(voc_root, content, error_line):
    path = voc_root / "ImageSets/Main/trainval.txt"
    path.write_bytes(content)
    assert str(path) in error_line(load_multilabel_voc, str(voc_root), "trainval")


def test_a_voc_split_file_may_begin_with_a_byte_order_mark(voc_root):
    before = load_multilabel_voc(str(voc_root), "trainval")
    path = voc_root / "ImageSets/Main/trainval.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_multilabel_voc(str(voc_root), "trainval") == before


def test_voc_files_with_a_doctype_are_refused(voc_root, error_line):
    """Entities can make gigabytes of a short file, and name other files."""
    path = voc_root / "Annotations/000005.xml"
    path.write_text('<!DOCTYPE x [<!ENTITY e "dog">]>\n' + path.read_text())
    message = error_line(load_multilabel_voc, str(voc_root), "trainval")
    assert str(path) in message
    assert "DOCTYPE" in message


def test_voc_files_are_missing(voc_root, error_line):
    message = error_line(load_multilabel_voc, str(voc_root), "val")
    assert str(voc_root / "ImageSets/Main/val.txt") in message
    (voc_root / "Annotations/000007.xml").unlink()
    message = error_line(load_multilabel_voc, str(voc_root), "trainval")
    assert str(voc_root / "Annotations/000007.xml") in message


# ----------------------------------------------------------------------------- names and checks


@pytest.mark.parametrize(
    ("name", "labels", "number"),
    [
        ("coco_2014_train_multilabel", COCO_LABELS, 80),
        ("coco_2014_val_multilabel", COCO_LABELS, 80),
        ("voc_2007_trainval_multilabel", VOC_LABELS, 20),
        ("voc_2007_test_multilabel", VOC_LABELS, 20),
        ("digit_scenes_train", DIGIT_LABELS, 10),
        ("digit_scenes_val", DIGIT_LABELS, 10),
        ("digit_scenes_train_a", DIGIT_LABELS, 10),
        ("digit_scenes_train_b", DIGIT_LABELS, 10),
    ],
)
def test_registered_names(name, labels, number):
    assert name in DatasetCatalog.list()
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == labels
    assert len(set(labels)) == number
    assert metadata.evaluator_type == "multi_label"


def test_digit_scenes_with_knobs_are_registered_if_they_are_there(tmp_path, monkeypatch):
    name = "digit_scenes_e0.5_c1.0"
    (tmp_path / name / "annotations").mkdir(parents=True)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(1, 9)],
        "annotations": [{"id": 1, "image_id": 8, "category_id": 4}],
        "categories": [{"id": i, "name": label} for i, label in enumerate(DIGIT_LABELS, 1)],
    }
    (tmp_path / name / "annotations/train.json").write_text(json.dumps(content))
    for catalog in ("DatasetCatalog", "MetadataCatalog"):
        monkeypatch.setattr(common, catalog, type(getattr(common, catalog))())
    register_digit_scenes(str(tmp_path))
    added = {f"{name}_{split}" for split in ("train", "val", "train_a", "train_b")}
    assert added <= set(common.DatasetCatalog.list())
    assert [d["labels"] for d in common.DatasetCatalog.get(f"{name}_train_b")] == [[], [], [3]]


def test_a_registered_voc_split_passes_the_checks(voc_root):
    register_multilabel_voc("mine", str(voc_root), "trainval", 2007)
    dicts = get_multilabel_dicts(["mine"])
    assert dicts == load_multilabel_voc(str(voc_root), "trainval")
    assert len(get_multilabel_dicts(["mine"], drop_unlabelled=True)) == 3


path_pieces = st.sampled_from(["..", ".", "/", "\\", "a", "b.jpg", "C:", "~", " ", "\0", "//", ""])


@settings(max_examples=300)
@given(st.lists(path_pieces).map("".join) | st.text())
@example("a/../../b")
@example("a\\..\\..\\b")
@example("/a")
@example("C:\\a")
@example("..")
def test_join_inside_stays_inside(file_name):
    root = "/data/photos"
    with contextlib.suppress(InputError):
        path = join_inside(root, file_name, "list.csv")
        for resolve in (os.path.normpath, os.path.realpath):
            assert resolve(path) == root or resolve(path).startswith(root + os.sep)
        # On Windows, a backslash parts folders, too.
        assert ".." not in path.replace("\\", "/").split("/")


@pytest.mark.parametrize("name", ["a.jpg", "a/b.jpg", "a\\b.jpg", "..a", "a/../b.jpg", "é ü.png"])
def test_join_inside_takes_harmless_names(name):
    path = join_inside("photos", name, "list.csv")
    assert os.path.normpath(path) == os.path.normpath(f"photos/{name}".replace("\\", "/"))


@pytest.mark.parametrize("name", [None, 5, "", "a\0b", ["a.jpg"]])
def test_join_inside_refuses_what_is_no_name(name, error_line):
    assert "list.csv" in error_line(join_inside, "photos", name, "list.csv")


def test_label_names_of_an_unknown_data_set(error_line):
    message = error_line(get_label_names, ["coco_2041"])
    assert "'coco_2041'" in message
    for known in ("coco_2014_train_multilabel", "voc_2007_test_multilabel", "digit_scenes_val"):
        assert known in message
    assert "keypoints" not in message  # detectron2's own are no multi-label data sets


def register(name, dicts, labels):
    register_multilabel(name, lambda: dicts, labels)


def test_label_names_must_agree(error_line):
    register("one", [], ["cat", "dog", "cow"])
    register("same", [], ["cat", "dog", "cow"])
    register("order", [], ["dog", "cat", "cow"])
    register("other", [], ["cat", "dog", "emu", "gnu"])
    assert get_label_names(["one", "same"]) == ["cat", "dog", "cow"]
    message = error_line(get_label_names, ["one", "order"])
    assert "order has the same labels in another order" in message
    message = error_line(get_label_names, ["one", "other"])
    assert "4 against 3" in message
    assert "has emu, gnu" in message
    assert "lacks cow" in message


def test_a_data_set_without_label_names(error_line):
    DatasetCatalog.register("bare", lambda: [])
    assert "bare has no label names" in error_line(get_label_names, ["bare"])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "there.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("label", ["", "\t", "a\nb", "\ud800", 7])
def test_label_names_are_lines_of_text(error_line, label):
    register("odd", [], ["cat", label])
    assert "DATASETS: odd" in error_line(get_label_names, ["odd"])


def test_a_training_set_without_any_label_is_refused(image, error_line):
    """A label graph would have nothing to be made of, and a model nothing to learn."""
    register("bare", [{"file_name": image, "image_id": 1, "labels": []}], ["cat", "dog"])
    cfg = setup_cfg("", ["DATASETS.TRAIN", "('bare',)"])
    assert "bare has a label" in error_line(build_multilabel_train_loader, cfg)


def test_an_empty_data_set_is_refused(error_line):
    register("empty", [], ["cat"])
    assert "empty" in error_line(get_multilabel_dicts, ["empty"])


def test_missing_images_are_counted_and_listed(tmp_path, image, error_line):
    missing = [str(tmp_path / folder / "gone.png") for folder in ("", "no_such_folder")]
    files = [missing[0], image, missing[1]]
    register("gaps", [{"file_name": f, "image_id": f, "labels": []} for f in files], ["cat"])
    message = error_line(get_multilabel_dicts, ["gaps"])
    assert "gaps: 2 of 3 images are missing" in message
    assert all(path in message for path in missing)
    assert image not in message


def test_many_missing_images_are_not_all_listed(tmp_path, caplog, error_line):
    files = [str(tmp_path / f"{i:03d}.png") for i in range(50)]
    register("gaps", [{"file_name": f, "image_id": f, "labels": []} for f in files], ["cat"])
    with caplog.at_level(logging.DEBUG):
        message = error_line(get_multilabel_dicts, ["gaps"])
    assert "50 of 50" in message
    assert "019.png" in message
    assert "020.png" not in message
    assert "and 30 more" in message
    assert files[-1] in caplog.text  # all of them are in the log


@pytest.mark.parametrize("labels", [[2], [0, 5], [-1]])
def test_a_label_out_of_range_is_refused(image, labels, error_line):
    register("bad", [{"file_name": image, "image_id": 1, "labels": labels}], ["cat", "dog"])
    message = error_line(get_multilabel_dicts, ["bad"])
    assert image in message
    assert str(labels[-1]) in message


def test_unlabelled_images_are_dropped_only_when_asked(image, error_line):
    records = [
        {"file_name": image, "image_id": i, "labels": labels}
        for i, labels in enumerate([[0], [], [1], []])
    ]
    register("some", records, ["cat", "dog"])
    register("none", records[1:2], ["cat", "dog"])
    assert get_multilabel_dicts(["some"]) == records
    assert get_multilabel_dicts(["some"], drop_unlabelled=True) == records[::2]
    assert get_multilabel_dicts(["some", "none"]) == [*records, records[1]]
    assert "none" in error_line(get_multilabel_dicts, ["none"], True)


def test_images_of_which_something_is_known_are_not_dropped(image, error_line):
    holes = [([0], []), ([], [1]), ([], [])]
    records = [
        {"file_name": image, "image_id": i, "labels": labels, "absent_labels": absent}
        for i, (labels, absent) in enumerate(holes)
    ]
    register("holes", records, ["cat", "dog"])
    assert get_multilabel_dicts(["holes"], drop_unlabelled=True) == records[:2]
    # The same images, whatever the unknown labels are taken for.
    settled = get_multilabel_dicts(["holes"], drop_unlabelled=True, ignored="absent")
    assert [target_vector(d, 2).tolist() for d in settled] == [[1, 0], [0, 0]]
    assert all("absent_labels" in record for record in records)


def test_an_absent_label_out_of_range_is_refused(image, error_line):
    record = {"file_name": image, "image_id": 1, "labels": [], "absent_labels": [2]}
    register("bad", [record], ["cat", "dog"])
    assert image in error_line(get_multilabel_dicts, ["bad"])


def test_lvis_as_detectron2_loads_it(lvis_file, image):
    """With boxes for labels, and LVIS's own ids, which begin with 1, for the absent ones."""
    labels = ["cat", "dog", "cow", "emu"]
    record = {
        "file_name": image,
        "image_id": 1,
        "annotations": [{"category_id": 1}],
        "neg_category_ids": [1],
        "not_exhaustive_category_ids": [2],
    }
    DatasetCatalog.register("lvis_like", lambda: [record])
    MetadataCatalog.get("lvis_like").set(thing_classes=labels, evaluator_type="lvis")
    (found,) = get_multilabel_dicts(["lvis_like"])
    assert target_vector(found, 4).tolist() == [0, 1, -1, -1]
    # Without boxes it is ignored, as in a JSON that is read here.
    record.update(annotations=[], not_exhaustive_category_ids=[1, 2])
    (found,) = get_multilabel_dicts(["lvis_like"], ignored="present")
    assert target_vector(found, 4).tolist() == [1, 1, -1, -1]
    # A data set with LVIS's keys and ids of its own.
    MetadataCatalog.get("lvis_like").set(thing_dataset_id_to_contiguous_id={7: 3, 5: 0})
    record.update(annotations=[{"category_id": 1}], neg_category_ids=[7, 5])
    del record["not_exhaustive_category_ids"]
    (found,) = get_multilabel_dicts(["lvis_like"])
    assert target_vector(found, 4).tolist() == [0, 1, -1, 0]


def test_a_detection_data_set_has_the_labels_of_its_boxes(image):
    boxes = [
        {"bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": c} for c in (2, 0, 2)
    ]
    records = [
        {"file_name": image, "image_id": 1, "annotations": boxes},
        {"file_name": image, "image_id": 2, "annotations": []},
    ]
    DatasetCatalog.register("detection", lambda: records)
    MetadataCatalog.get("detection").set(thing_classes=["cat", "dog", "cow"], evaluator_type="coco")
    dicts = get_multilabel_dicts(["detection"])
    assert [d["labels"] for d in dicts] == [[0, 2], []]
    assert dicts[0]["annotations"] == boxes
    assert "labels" not in records[0]  # the catalog's dicts are left alone
