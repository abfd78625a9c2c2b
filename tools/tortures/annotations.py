"""Damaged and hostile annotation files: COCO, CSV, VOC, VG-500, Open Images, index of shards."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import pickle
import random
import re
import shutil
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence
from unittest import mock

from PIL import Image

from ia_gcn.commands import inspect
from ia_gcn.data.datasets import (
    VOC_LABELS,
    load_multilabel_coco,
    load_multilabel_csv,
    load_multilabel_voc,
)
from ia_gcn.data.datasets.coco import coco_label_names
from ia_gcn.data.datasets.common import read_label_file
from ia_gcn.data.datasets.custom import read_csv
from ia_gcn.data.datasets.open_images import load_open_images
from ia_gcn.data.datasets.shard_writing import write_shards
from ia_gcn.data.datasets.shards import load_multilabel_shards, shard_label_names
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.io.shards import parse_member
from ia_gcn.visualization import plot_label_graph

from .harness import Task, Trial, run_in_children

# Files that a process reads, if none of them is a finding.
TOGETHER = 100
# Drawing takes longer than all the rest.
SHARE_DRAWN = 0.02
# What preparing VG-500 does with files of its own.
WRITES = ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def add_annotations(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser("annotations", parents=[common], help=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="how many files (default 1000)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Iterator[Trial]:
    """A trial for each damaged file; those that are findings stay in OUTPUT/annotations-found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # What takes long the first time is done before the processes start.
        prepare_script("vg500"), prepare_script("open_images")
        plot_label_graph([[1]], [[1]], ["cat"], str(folder / "first.png"))
        for start in range(0, args.trials, TOGETHER):
            tasks, roots = [], []
            for number in range(start, min(start + TOGETHER, args.trials)):
                rng = random.Random(f"{args.seed} {number}")
                kind = rng.choice(list(KINDS))
                root = folder / str(number)
                work = partial(in_one_line, KINDS[kind](rng, root))
                tasks.append(Task(kind, str(number), work))
                roots.append(root)
            for trial, root in zip(run_in_children(tasks, folder, allowed=WRITES), roots):
                if trial.is_finding:
                    found = args.output / "annotations-found" / root.name
                    shutil.copytree(root, found, dirs_exist_ok=True)
                yield trial
            for root in roots:
                shutil.rmtree(root)


def in_one_line(work: Callable[[], str]) -> str:
    """What `work` returns; an InputError that isn't one line of text is no InputError."""
    try:
        return work()
    except InputError as error:
        message = str(error)
        message.encode()
        assert len(message.splitlines()) == 1, f"{len(message.splitlines())} lines: {message!r}"
        assert len(message) < 5_000, f"a message of {len(message)} characters"
        raise


# --------------------------------------------------------------------------- what is expected


def check_dicts(dicts: Sequence[Dict], root: Path, num_labels: int) -> None:
    """Raise an AssertionError unless a data set's dicts can be trained on."""
    ids, files = set(), set()
    # Loader processes get them in this way.
    pickle.loads(pickle.dumps(list(dicts)))
    for record in dicts:
        name = record["file_name"]
        os.fsencode(name)
        inside = os.path.normpath(name)
        assert inside.startswith(f"{root}{os.sep}"), f"{name!r} is outside"
        assert ".." not in name.replace("\\", "/").split("/"), f"{name!r} leads out"
        assert inside not in files, f"{name!r} twice"
        files.add(inside)
        image_id = record["image_id"]
        assert isinstance(image_id, str) or -(2**63) <= image_id < 2**63, f"id {image_id!r}"
        assert image_id not in ids, f"id {image_id!r} twice"
        ids.add(image_id)
        labels = record["labels"]
        assert labels == sorted(set(labels)), f"labels {labels!r}"
        ignored, absent = record.get("ignored_labels", []), record.get("absent_labels", [])
        named = [*labels, *ignored, *absent]
        assert len(set(named)) == len(named), f"{labels!r}, ignored {ignored!r}, absent {absent!r}"
        for label in named:
            assert type(label) is int, f"label {label!r}"
            assert 0 <= label < num_labels, f"label {label!r}"
        for box in record.get("annotations", []):
            assert box["category_id"] in (*labels, *ignored), f"box of {box['category_id']!r}"
            assert len(box["bbox"]) == 4, f"box {box!r}"
            assert all(math.isfinite(float(side)) for side in box["bbox"]), f"box {box!r}"


def check_names(names: Sequence[str]) -> None:
    """Raise an AssertionError unless a list of label names can be printed and told apart."""
    assert len(set(names)) == len(names), f"label names {names!r}"
    for name in names:
        name.encode()
        assert name.strip(), f"label name {name!r}"
        assert len(name.splitlines()) == 1, f"label name {name!r}"


def look_at(file: Path, root: Path, draw: bool) -> None:
    """What tools/inspect_dataset.py does with custom data."""
    keys = {"TRAIN": file, "IMAGE_ROOT": root, "HOLD_OUT": 0.0}
    opts = [part for k, v in keys.items() for part in (f"DATASETS.CUSTOM.{k}", v)]
    cfg = setup_cfg("", ["MODEL.DEVICE", "cpu", *map(str, opts)])
    with mock.patch.object(inspect, "plot_label_graph", plot_label_graph if draw else mock.Mock()):
        inspect.inspect(cfg, "custom_train", str(file.parent / "inspected"), decode=True)


def write_images(root: Path, names: Sequence[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name)


# ------------------------------------------------------------------------------------ damages

TEXTS = (
    *("", " ", "\t", "a\nb", "a\r", "\0", "\x1b[2J", "\ud800", "\udcff", "\u2028", "\ufeff", "é"),
    *("../x.png", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "./a.png", "a.png", "sub\\b.png"),
    *("cat", "Cat", "1", "-1", "nan", "1e999", '"cat"', "cat;dog", "x" * 100_000, "%s%n", "$x^{$"),
)
VALUES = (None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, [], {}, [[]], *TEXTS)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e308, -0.0)


def deep(depth: int):
    value: List = []
    for _ in range(depth):
        value = [value]
    return value


def damage_json(rng: random.Random, content) -> bytes:
    """A JSON with some of its values, keys or bytes changed."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        damage_tree(rng, content)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.9).encode(errors="surrogatepass")
    return damage_bytes(rng, text) if rng.random() < 0.3 else text


def damage_tree(rng: random.Random, tree) -> None:
    """Change one value of nested lists and dicts: another, missing, twice, moved, other keys."""
    parent, key = tree, rng.choice(list(places(tree)))
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(places(parent)))
    action = rng.randrange(7)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif action == 2 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    elif action == 3:
        other = rng.choice(list(places(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif action == 4:
        parent[key] = rng.choice((deep(rng.choice((2, 300, 700))), rng.choice(NUMBERS)))
    else:
        parent[key] = rng.choice(VALUES)


def places(tree) -> Sequence:
    return tree.keys() if isinstance(tree, dict) else range(len(tree))


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, cut, doubled, in another encoding, or with what no text has."""
    place = rng.randrange(len(content) + 1)
    odd = rng.choice(
        (
            *(b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000),
            *(b"NaN", b"-", b"\n", b"\r\n", b",", b";", b"\t", b'"', b"\xed\xa0\x80", b"<", b"&"),
        )
    )
    other = max(1, place)
    return rng.choice(
        (
            lambda: content[:place],
            lambda: content[:place] + odd + content[place:],
            lambda: (
                content[: other - 1]
                + bytes([content[other - 1] ^ 1 << rng.randrange(8)])
                + content[other:]
            ),
            lambda: content + content,
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.decode(errors="replace").encode("utf-16"),
            lambda: content.replace(b"\n", b"\r\n"),
            lambda: b"",
        )
    )()


# ---------------------------------------------------------------------------------------- COCO


def coco_content(files: Sequence[str]) -> Dict:
    return {
        "info": {"year": 2014},
        "images": [
            {"id": i, "file_name": file, "width": 8, "height": 6} for i, file in enumerate(files, 1)
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 1, 2.5, 3], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "area": 16},
            {"id": 3, "image_id": 2, "category_id": 3},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


FILES = ("a.png", "sub/b.png", "c.png")


def coco(rng: random.Random, root: Path) -> Callable[[], str]:
    """A damaged JSON, and what is to be done with it."""
    write_images(root / "images", FILES)
    file, draw = root / "data.json", rng.random() < SHARE_DRAWN
    file.write_bytes(damage_json(rng, coco_content(FILES)))

    def work() -> str:
        names = coco_label_names(str(file))
        check_names(names)
        dicts = load_multilabel_coco(str(file), str(root / "images"), names)
        check_dicts(dicts, root / "images", len(names))
        look_at(file, root / "images", draw)
        return "read"

    return work


# ----------------------------------------------------------------------------------------- CSV


def csv(rng: random.Random, root: Path) -> Callable[[], str]:
    write_images(root / "images", FILES)
    file, draw = root / "data.csv", rng.random() < SHARE_DRAWN
    rows = [["file", "labels"], ["a.png", "cat;dog"], ["sub/b.png", "dog"], ["c.png", ""]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        row = rng.choice(rows)
        cell = rng.randrange(len(row))
        odd = rng.choice(TEXTS)
        row[cell] = rng.choice((odd, f" {row[cell]} ", f'"{row[cell]}"', f"{row[cell]};{odd}"))
        rng.choice((rows.append, rows.remove, row.append, lambda _: None))(
            row if row in rows else odd
        )
        if not rows:
            break
    separator = rng.choice((",", ",", ",", ", ", ";", "\t"))
    lines = [separator.join(map(str, row)) for row in rows]
    content = rng.choice(("\n", "\n", "\r\n", "\r")).join(lines).encode(errors="surrogatepass")
    file.write_bytes(damage_bytes(rng, content) if rng.random() < 0.3 else content)

    def work() -> str:
        names = sorted({label for row in read_csv(str(file)) for label in row.labels})
        check_names(names)
        dicts = load_multilabel_csv(str(file), str(root / "images"), names)
        check_dicts(dicts, root / "images", len(names))
        look_at(file, root / "images", draw)
        return "read"

    return work


# -------------------------------------------------------------------------------------- shards


def shards(rng: random.Random, root: Path) -> Callable[[], str]:
    """Three images in two shards; a line of their index, or its bytes, are damaged."""
    whole, names = root / "whole", ("cat", "dog")
    write_images(whole, FILES)
    dicts = [
        {"file_name": str(whole / file), "image_id": i, "labels": [i % 2], "annotations": []}
        for i, file in enumerate(FILES)
    ]
    box = {"bbox": [0, 1, 2.5, 3], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    dicts[0]["annotations"] = [box]
    dicts[1]["absent_labels"] = [0]
    folder, draw = root / "shards", rng.random() < SHARE_DRAWN
    index = Path(write_shards(dicts, names, str(folder), 200))
    lines = index.read_bytes().splitlines()
    for _ in range(rng.choice((0, 1, 1, 2))):
        number = rng.randrange(len(lines))
        with suppress(ValueError):
            lines[number] = damage_json(rng, json.loads(lines[number]))
    if rng.random() < 0.2:
        rng.choice((lines.pop, lambda: lines.insert(1, rng.choice(lines)), lines.reverse))()
    content = b"".join(line + b"\n" for line in lines)
    index.write_bytes(damage_bytes(rng, content) if rng.random() < 0.1 else content)

    def work() -> str:
        names = shard_label_names(str(index))
        check_names(names)
        dicts = load_multilabel_shards(str(index), "", names)
        for record in dicts:
            member = parse_member(record["file_name"])
            # A shard and what is in it, as a folder and its files.
            record["file_name"] = f"{member.shard.path}/{member.offset}/{member.name}"
        check_dicts(dicts, folder, len(names))
        look_at(index, folder, draw)
        return "read"

    return work


# ----------------------------------------------------------------------------------------- VOC

VOC_XML = """<annotation>
    <filename>{id}.jpg</filename>
    <size><width>8</width><height>6</height><depth>3</depth></size>
    <object><name>dog</name><difficult>0</difficult>
        <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>7</xmax><ymax>5</ymax></bndbox></object>
    <object><name>cat</name><difficult>1</difficult>
        <part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>
        <bndbox><xmin>2.5</xmin><ymin>2</ymin><xmax>4</xmax><ymax>5</ymax></bndbox></object>
</annotation>"""
BOMB = (
    '<!DOCTYPE x [<!ENTITY a0 "dog">'
    + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    + "]>"
)
DOCTYPES = (
    BOMB,
    '<!DOCTYPE x [<!ENTITY a9 SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">',
    '<!DOCTYPE x [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]>',
    "<!DOCTYPE annotation>",
    '<?xml version="1.0" encoding="UTF-7"?>',
    '<?xml version="1.0" encoding="no-such-code"?>',
)


def voc(rng: random.Random, root: Path) -> Callable[[], str]:
    ids = ["000005", "000007", "2008_000001"]
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for image_id in ids:
        (root / f"Annotations/{image_id}.xml").write_text(VOC_XML.format(id=image_id))
    split = "".join(f"{image_id}{rng.choice(('', '  1', ' -1'))}\n" for image_id in ids).encode()
    if rng.random() < 0.2:
        lines = split.split(b"\n")
        lines[rng.randrange(3)] = rng.choice(TEXTS).encode(errors="surrogatepass")
        split = rng.choice((b"\n".join(lines), damage_bytes(rng, split), split + split))
    else:
        file = root / f"Annotations/{rng.choice(ids)}.xml"
        file.write_bytes(damage_xml(rng, file.read_text()))
    (root / "ImageSets/Main/trainval.txt").write_bytes(split)

    def work() -> str:
        dicts = load_multilabel_voc(str(root), "trainval")
        check_dicts(dicts, root / "JPEGImages", len(VOC_LABELS))
        return "read"

    return work


def damage_xml(rng: random.Random, text: str) -> bytes:
    """Another text or element, elements left out, doubled or nested, a DOCTYPE, or other bytes."""
    for _ in range(rng.choice((0, 1, 1, 2))):
        parts = text.replace("<", "\0<").replace(">", ">\0").split("\0")
        place = rng.randrange(len(parts))
        odd = rng.choice((*TEXTS[:4], *TEXTS[11:], "&a9;", "&#0;", "&#xD800;", "<object>", "<x/>"))
        action = rng.randrange(5)
        if action == 0:
            parts[place] = odd
        elif action == 1:
            parts.insert(place, odd)
        elif action == 2:
            del parts[place : place + rng.choice((1, 3, 9))]
        elif action == 3:
            parts[place:place] = parts[place : place + rng.choice((1, 3, 9))]
        else:
            depth = rng.choice((10, 100_000))
            parts.insert(place, "<object>" * depth + odd + "</object>" * depth)
        text = "".join(parts)
    if rng.random() < 0.2:
        text = rng.choice(DOCTYPES) + text.replace("dog", rng.choice(("&a9;", "dog")), 1)
    content = text.encode(errors="surrogatepass")
    return damage_bytes(rng, content) if rng.random() < 0.3 else content


# -------------------------------------------------------------------------------------- VG-500


def vg500_source(rng: random.Random, root: Path) -> Callable[[], str]:
    """Visual Genome's files, one of them damaged, for datasets/prepare_vg500.py."""
    ids = range(1, 7)
    write_images(root / "vg500", [f"VG_100K/{i}.jpg" for i in ids])
    box = {"x": 1, "y": 1, "w": 3, "h": 4}
    url = "https://example.org/VG_100K"
    sources = {
        "image_data.json": [
            {"image_id": i, "width": 8, "height": 6, "url": f"{url}/{i}.jpg"} for i in ids
        ],
        "objects.json": [
            {
                "image_id": i,
                "objects": [
                    {"names": ["cat", "dog"][: 1 + i % 2], **box},
                    {"names": ["sea"], **box},
                ],
            }
            for i in ids
        ],
    }
    lists = {
        "aliases.txt": b"cat,kitten\nsea,ocean,the sea\n",
        "train.txt": b"1\n2.jpg\nVG_100K/3.jpg\n4 x\n",
        "test.txt": b"5\n6\n",
    }
    damaged = rng.choice([*sources, *sources, *lists])
    for name, content in sources.items():
        whole = json.dumps(content).encode()
        damage = damage_json(rng, content) if name == damaged else whole
        (root / "vg500" / name).write_bytes(damage)
    for name, content in lists.items():
        damage = damage_bytes(rng, content) if name == damaged else content
        (root / name).write_bytes(damage)
    use_lists = damaged in lists or rng.random() < 0.5
    arguments = argparse.Namespace(
        root=root,
        source=None,
        train_list=root / "train.txt" if use_lists else None,
        test_list=root / "test.txt" if use_lists else None,
        seed=0,
        labels=2,
        aliases=root / "aliases.txt" if use_lists else None,
        boxes=rng.random() < 0.5,
        skip_missing=rng.random() < 0.5,
    )

    def work() -> str:
        prepare_script("vg500").prepare(arguments)
        return read_vg500(root / "vg500")

    return work


def vg500_result(rng: random.Random, root: Path) -> Callable[[], str]:
    """What datasets/prepare_vg500.py writes, one file of it damaged."""
    folder = root / "vg500"
    (folder / "annotations").mkdir(parents=True)
    damaged = rng.choice(("labels.txt", "train.json", "test.json"))
    labels = b"cat\ndog\n"
    if damaged == "labels.txt":
        odd = rng.choice(TEXTS).encode(errors="surrogatepass")
        labels = rng.choice((damage_bytes(rng, labels), labels + odd + b"\n", odd + b"\n" + labels))
    (folder / "labels.txt").write_bytes(labels)
    content = coco_content(FILES)
    for split in ("train", "test"):
        whole = json.dumps(content).encode()
        damage = damage_json(rng, content) if damaged == f"{split}.json" else whole
        (folder / f"annotations/{split}.json").write_bytes(damage)
    return lambda: read_vg500(folder)


def read_vg500(folder: Path) -> str:
    names = read_label_file(str(folder / "labels.txt"))
    check_names(names)
    for split in ("train", "test"):
        file = str(folder / f"annotations/{split}.json")
        check_dicts(load_multilabel_coco(file, str(folder), names), folder, len(names))
    return "read"


# ------------------------------------------------------------------------------- Open Images


def open_images(rng: random.Random, root: Path) -> Callable[[], str]:
    """Open Images' own files, one of them damaged, for datasets/prepare_open_images.py."""
    ids = [f"{number:016x}" for number in (1, 2, 0xFEDCBA9876543210)]
    write_images(root / "open_images", [f"train/{image_id}.jpg" for image_id in ids])
    said = zip((*ids, ids[0]), ("/m/a", "/m/b", "/m/a", "/m/b"), (1, 0, 1, 0))
    said = [f"{image_id},verification,{mid},{value}" for image_id, mid, value in said]
    boxes = f"ImageID,Source,LabelName,Confidence,XMin\n{ids[1]},xclick,/m/b,1,0.1\n"
    files = {
        "oidv7-classes-trainable.txt": "/m/a\n/m/b\n",
        "oidv7-class-descriptions.csv": 'LabelName,DisplayName\n/m/a,Cat\n/m/b,"Dog, small"\n',
        "oidv7-train-annotations-human-imagelabels.csv": "\n".join(
            ["ImageID,Source,LabelName,Confidence", *said]
        ),
        "oidv7-train-annotations-bbox.csv": boxes,
    }
    damaged = rng.choice(list(files))
    for name, content in files.items():
        content = content.encode()
        if name == damaged:
            cells = re.split(rb"([,\n])", content)
            cells[rng.randrange(0, len(cells), 2)] = rng.choice(TEXTS).encode("utf-8", "replace")
            content = rng.choice((b"".join(cells), damage_bytes(rng, content)))
        (root / "open_images" / name).write_bytes(content)
    arguments = argparse.Namespace(
        root=root, source=None, boxes=True, machine=None, skip_missing=rng.random() < 0.8
    )

    def work() -> str:
        prepare_script("open_images").prepare(arguments)
        folder = root / "open_images"
        names = read_label_file(str(folder / "labels.txt"))
        check_names(names)
        file = str(folder / "annotations/train.npz")
        dicts = load_open_images(file, str(folder), str(folder / "labels.txt"))
        check_dicts(dicts, folder, len(names))
        return "read"

    return work


@cache
def prepare_script(name: str):
    """The module of datasets/prepare_NAME.py."""
    path = Path(__file__).parents[2] / f"datasets/prepare_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What makes a damaged file below a folder and returns what is to be done with it.
KINDS: Dict[str, Callable[[random.Random, Path], Callable[[], str]]] = {
    "COCO JSON": coco,
    "CSV": csv,
    "tar shards": shards,
    "VOC": voc,
    "VG-500, sources": vg500_source,
    "VG-500, prepared": vg500_result,
    "Open Images, sources": open_images,
}
