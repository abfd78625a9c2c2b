"""Data sets in tar shards: writing, reading, and the order in which training reads them."""

import itertools
import json
import logging
import math
import os
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn import add_ia_gcn_config
from ia_gcn.data import (
    build_multilabel_test_loader,
    build_multilabel_train_loader,
    count_states,
    get_multilabel_dicts,
    register_custom,
    register_multilabel_shards,
)
from ia_gcn.data.build import TrainingSamples
from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.data.datasets.coco import load_multilabel_coco
from ia_gcn.data.datasets.custom import file_label_names
from ia_gcn.data.datasets.shard_writing import check_shards, write_shards
from ia_gcn.data.datasets.shards import load_multilabel_shards, read_shard_index
from ia_gcn.data.samplers import PositionSampler, ShuffleShards
from ia_gcn.data.shard_fetching import FetchAhead
from ia_gcn.engine.held_out import write_split
from ia_gcn.io import shards as shard_files
from ia_gcn.io.images import UnreadableImage
from ia_gcn.io.shards import Shard, UnreadableShard, parse_member
from tests.helpers.shards import read_lines, served, tiny_shards


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process the given one of so many."""

    def be(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return be


def take(iterable, count):
    return list(itertools.islice(iterable, count))


# --------------------------------------------------------------------------------------- the order

shards_of_images = st.lists(st.integers(1, 6), min_size=1, max_size=12).map(
    lambda counts: [shard for shard, count in enumerate(counts) for _ in range(count)]
)
windows, streams = st.integers(1, 5), st.integers(1, 6)
seeds = st.integers(0, 2**40)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=100)
@given(shards_of_images, windows, streams, seeds, st.data())
def test_the_order_is_of_the_same_images(shards, window, streams, seed, data):
    images = data.draw(st.lists(st.integers(0, len(shards) - 1), max_size=40))
    images = torch.tensor(images, dtype=torch.int64)
    shuffle = ShuffleShards(shards, window, streams)
    order = shuffle(images, generator(seed))
    assert sorted(order.tolist()) == sorted(images.tolist())
    assert torch.equal(shuffle(images, generator(seed)), order)


@settings(max_examples=200)
@given(shards_of_images, windows, streams, seeds)
def test_a_stream_reads_few_shards_at_a_time(shards, window, streams, seed):
    shuffle = ShuffleShards(shards, window, streams)
    order = shuffle(torch.arange(len(shards)), generator(seed)).tolist()
    for stream in range(streams):
        read = [shards[image] for image in order[stream::streams]]
        assert len(read) in (len(shards) // streams, math.ceil(len(shards) / streams))
        for place in range(len(read)):
            # Those that were begun and will be needed again, or now.
            assert len({*read[: place + 1]} & {*read[place:]}) <= window


worlds = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4)


@settings(max_examples=50)
@given(shards_of_images, windows, streams, seeds, worlds)
def test_the_stream_goes_on_in_any_number_of_processes(shards, window, streams, seed, worlds):
    sampler = PositionSampler(len(shards), seed, None, ShuffleShards(shards, window, streams))
    batch, iterations = 12, 2
    found = []
    for world_size in worlds:
        sampler.start = len(found)
        parts = []
        for rank in range(world_size):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(comm, "get_rank", lambda rank=rank: rank)
                patch.setattr(comm, "get_world_size", lambda size=world_size: size)
                parts.append(take(sampler, iterations * batch // world_size))
        found += [item for items in zip(*parts) for item in items]
    sampler.start = 0
    assert found == take(sampler, len(worlds) * iterations * batch)


@settings(max_examples=100)
@given(shards_of_images, windows, seeds, st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3)]))
def test_processes_read_shards_of_their_own(shards, window, seed, numbers):
    streams, world_size = numbers
    sampler = PositionSampler(len(shards), seed, None, ShuffleShards(shards, window, streams))
    sizes = len(shards)
    stream = [image for _, image in take(sampler, 3 * sizes)]
    for epoch in range(3):
        readers = defaultdict(set)
        for place in range(epoch * sizes, (epoch + 1) * sizes):
            readers[shards[stream[place]]].add(place % world_size)
        # But for one that is divided where a stream begins; a long one, into several.
        assert sum(len(processes) - 1 for processes in readers.values()) <= streams - 1


def test_a_wide_window_mixes_all_images():
    """As a permutation does: over many seeds, each image is at each place equally often."""
    shuffle, places = ShuffleShards([0, 0, 1, 1, 2, 2, 3, 3], 10**6, 1), np.zeros((8, 8))
    for seed in range(4000):
        order = shuffle(torch.arange(8), generator(seed)).tolist()
        places[order, range(8)] += 1
    # 500 each, with a deviation of √(4000 · 1/8 · 7/8) = 21.
    assert np.abs(places - 500).max() < 5 * 21


def test_images_in_no_shard_are_anywhere():
    shards = [*np.repeat(range(10), 100), *[-1] * 1000]
    order = ShuffleShards(shards, 2, 1)(torch.arange(2000), generator(0)).numpy()
    for part in np.split(order >= 1000, 10):
        assert 0.35 < part.mean() < 0.65


# ----------------------------------------------------------------------------------------- writing


@pytest.fixture
def data(tiny_coco):
    """23 images."""
    return tiny_coco(23)


@pytest.fixture
def loose(data):
    """The dicts of the images as they are, in files, by their id."""
    dicts = load_multilabel_coco(data.json_file, data.image_root, data.label_names)
    return {record["image_id"]: record for record in dicts}


@pytest.fixture
def index(data, tmp_path):
    """They, in shards of three or four."""
    return tiny_shards(data, tmp_path / "shards")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_webdataset_reads_what_was_written(index, loose):
    names = [info.name for info in read_shard_index(str(index)).shards]
    assert len(names) > 4
    urls = [str(index.parent / name) for name in names]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        labels = json.loads(sample["json"])
        found[labels.pop("image_id")] = sample["png"], labels
    assert found.keys() == loose.keys()
    for image_id, record in loose.items():
        content, labels = found[image_id]
        assert content == Path(record["file_name"]).read_bytes()
        assert labels["labels"] == record["labels"]
        assert [box["bbox"] for box in labels["annotations"]] == [
            box["bbox"] for box in record["annotations"]
        ]


def test_what_is_read_is_what_was_written(index, loose, data):
    dicts = load_multilabel_shards(str(index), "", data.label_names)
    assert sorted(record["image_id"] for record in dicts) == sorted(loose)
    for record in dicts:
        original = loose[record["image_id"]]
        assert np.array_equal(read_image(record["file_name"]), read_image(original["file_name"]))
        assert {**record, "file_name": ""} == {**original, "file_name": ""}
    # What counts labels needs no shard.
    for path in index.parent.glob("*.tar"):
        path.unlink()
    dicts = load_multilabel_shards(str(index), "", data.label_names)
    for found, expected in zip(count_states(dicts, 3), count_states([*loose.values()], 3)):
        assert np.array_equal(found, expected)


def test_unknown_and_ignored_labels_and_other_boxes(tmp_path, loose):
    files = [record["file_name"] for record in loose.values()]
    dicts = [
        {"file_name": files[0], "image_id": "a", "labels": [2, 0], "absent_labels": [1]},
        {"file_name": files[1], "image_id": "b", "labels": [], "absent_labels": []},
        {
            "file_name": files[2],
            "image_id": "c",
            "labels": np.array([1]),
            "ignored_labels": (2,),
            "annotations": [
                {
                    "bbox": np.array([16, 12, 8, 6, 90], np.float32),
                    "bbox_mode": BoxMode.XYWHA_ABS,
                    "category_id": np.int64(1),
                    "segmentation": [],
                }
            ],
        },
    ]
    index = write_shards(dicts, ["x", "y", "z"], str(tmp_path / "out"), 1)
    found = load_multilabel_shards(index, "", ["x", "y", "z"])
    found = {record.pop("image_id"): record for record in found}
    for record in found.values():
        del record["file_name"]
    (box,) = found["c"].pop("annotations")
    assert box.pop("bbox") == pytest.approx([13, 8, 19, 16], abs=1e-5)  # turned by 90°
    assert box == {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
    assert found == {
        "a": {"labels": [0, 2], "absent_labels": [1]},
        "b": {"labels": [], "absent_labels": []},
        "c": {"labels": [1], "ignored_labels": [2]},
    }


def test_the_same_data_gives_the_same_bytes(index, loose, data, tmp_path):
    dicts = list(loose.values())[::-1]
    for path in Path(data.image_root).iterdir():
        os.utime(path, (1, 1))
    write_shards(dicts, data.label_names, str(tmp_path / "again"), 300)
    assert contents(tmp_path / "again") == contents(index.parent)


def test_the_order_looks_random(index):
    ids = [line["image_id"] for line in read_lines(index)[1:]]
    assert ids != sorted(ids)
    assert abs(np.corrcoef(ids, range(len(ids)))[0, 1]) < 0.5


def test_an_interrupted_writing_goes_on(data, index, tmp_path, monkeypatch):
    whole, folder = contents(index.parent), index.parent
    for name in ("000002.tar", "000004.tar", "index.jsonl"):
        (folder / name).unlink()
    (folder / ".000002.tar.123.tmp").write_bytes(b"half of one")
    with open(folder / "000001.tar", "r+b") as file:
        file.truncate(3000)
    written = []
    honest = webdataset.TarWriter
    monkeypatch.setattr(
        webdataset, "TarWriter", lambda f, **kw: [written.append(f.name), honest(f, **kw)][1]
    )
    tiny_shards(data, folder)
    assert [Path(name).name.split(".")[1] for name in written] == ["000001", "000002", "000004"]
    assert contents(folder) == whole
    tiny_shards(data, folder)
    assert len(written) == 3


def test_what_others_keep_in_the_folder_stays(data, index):
    others = [index.parent / name for name in (".cache.v1.tmp", ".notes.txt.1.tmp")]
    others[0].mkdir()
    others[1].write_text("mine")
    tiny_shards(data, index.parent)
    assert all(path.exists() for path in others)


def test_shards_that_the_index_does_not_list_are_named(data, index, caplog):
    tiny_shards(data, index.parent)
    assert not caplog.records
    number = len(of_shards(index))
    tiny_shards(data, index.parent, 600)
    rest = [f"{i:06d}.tar" for i in range(len(of_shards(index)), number)]
    assert len(rest) > 1
    (record,) = caplog.records
    message = f"{len(rest)} shard(s) of an earlier run, {rest[0]} to {rest[-1]}, are not in the"
    assert message in record.getMessage()


def test_other_labels_make_other_shards(data, index, loose):
    first = read_lines(index)[1]["image_id"]
    loose[first]["labels"] = []
    before = contents(index.parent)
    write_shards(list(loose.values()), data.label_names, str(index.parent), 300)
    changed = {name for name, content in contents(index.parent).items() if before[name] != content}
    assert changed == {"000000.tar", "index.jsonl"}


def test_a_failed_writing_leaves_no_index_of_other_shards(data, index, loose, monkeypatch):
    for record in loose.values():
        record["labels"] = []

    def fail(file, **options):
        if "000002" in file.name:
            raise OSError(28, "No space left on device")
        return honest(file, **options)

    honest = webdataset.TarWriter
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "TarWriter", fail)
        with pytest.raises(OSError, match=r"No space left on device: .*000002\.tar"):
            write_shards(list(loose.values()), data.label_names, str(index.parent), 300)
    assert not index.exists()
    assert not list(index.parent.glob(".*"))
    write_shards(list(loose.values()), data.label_names, str(index.parent), 300)
    assert check_shards(str(index)) == {}
    dicts = load_multilabel_shards(str(index), "", data.label_names)
    assert not any(record["labels"] for record in dicts)


@pytest.mark.parametrize(("ids", "message"), [([1, 1], "occur twice"), ([1, "1"], "two kinds")])
def test_ids_must_differ(loose, tmp_path, error_line, ids, message):
    files = [record["file_name"] for record in loose.values()]
    dicts = [{"file_name": f, "image_id": i, "labels": []} for f, i in zip(files, ids)]
    assert message in error_line(write_shards, dicts, ["x"], str(tmp_path / "out"), 100)


def test_shards_can_be_written_anew_from_shards(index, data, tmp_path):
    dicts = load_multilabel_shards(str(index), "", data.label_names)
    write_shards(dicts, data.label_names, str(tmp_path / "again"), 300)
    assert contents(tmp_path / "again") == contents(index.parent)


def test_files_without_a_known_ending(loose, tmp_path):
    (tmp_path / "photo.JSON").write_bytes(b"no json")
    (tmp_path / "photo").write_bytes(b"nothing")
    dicts = [
        {"file_name": str(tmp_path / name), "image_id": name, "labels": []}
        for name in ("photo.JSON", "photo")
    ]
    index = write_shards(dicts, ["x"], str(tmp_path / "out"), 10**6)
    names = [line["file"] for line in read_lines(Path(index))[1:]]
    assert [re.sub("-[0-9a-f]{8}", "", name) for name in names] == [
        "000000000.img",
        "000000001.img",
    ]


# ---------------------------------------------------------------------------------------- checking


def test_checking_finds_every_kind_of_damage(index):
    assert check_shards(str(index)) == {}
    paths = [index.parent / f"{i:06d}.tar" for i in range(4)]
    paths[0].unlink()
    with open(paths[1], "r+b") as file:
        file.truncate(1000)
    content = bytearray(paths[2].read_bytes())
    content[1600] ^= 1
    paths[2].write_bytes(content)
    with open(paths[3], "ab") as file:
        file.write(b"more")
    problems = check_shards(str(index))
    assert set(problems) == set(map(str, paths))
    assert "No such file" in problems[str(paths[0])]
    assert all("SHA-256" in problems[str(path)] for path in paths[1:])
    assert set(check_shards(str(index), "elsewhere").values()) == {"No such file or directory"}


# ------------------------------------------------------------------------------------- the index


def edit(change, number=1):
    """A damage that changes a line, as parsed."""

    def damage(index):
        lines = read_lines(index)
        change(lines[number])
        index.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    return damage


def replace_line(number, text):
    def damage(index):
        lines = index.read_bytes().split(b"\n")
        lines[number] = text
        index.write_bytes(b"\n".join(lines))

    return damage


HUGE = 2**40
DAMAGES = {
    "no JSON": (replace_line(2, b"{"), "line 3: not JSON"),
    "not UTF-8": (replace_line(2, b'"\xff"'), "line 3: not JSON in UTF-8"),
    "deep": (replace_line(2, b"[" * 10**5), "line 3: not JSON"),
    "long numbers": (replace_line(2, b"9" * 10**5), "line 3: not JSON"),
    "a list": (replace_line(2, b"[]"), "line 3: not an image"),
    "no first line": (replace_line(0, b'{"format": "other"}'), "no index of tools/make_shards.py"),
    "empty": (lambda index: index.write_bytes(b""), "no index of tools/make_shards.py"),
    "missing": (lambda index: index.unlink(), "No such file"),
    "a pipe": (lambda index: [index.unlink(), os.mkfifo(index)], "not a regular file"),
    "too few": (lambda index: index.write_text(index.read_text()[:-150]), "index.jsonl"),
    "a line less": (
        lambda index: index.write_text("\n".join(index.read_text().splitlines()[:-1])),
        "ends before the last image",
    ),
    "a line more": (
        lambda index: index.write_text(index.read_text() + '{"image_id": 99}\n'),
        "more images than its shards",
    ),
    "an id twice": (edit(lambda line: line.update(image_id=7), 2), "occur twice"),
    "no id": (edit(lambda line: line.pop("image_id")), "line 2: image id None"),
    "a name that leads out": (edit(lambda line: line.update(file="../x.png")), "line 2: no file"),
    "an absolute name": (edit(lambda line: line.update(file="/x.png")), "line 2: no file"),
    "a negative offset": (edit(lambda line: line.update(offset=-1)), "line 2: no file"),
    "no number": (edit(lambda line: line.update(offset=True)), "line 2: no file"),
    "outside": (edit(lambda line: line.update(offset=HUGE)), "line 2: .* is outside"),
    "a label too many": (edit(lambda line: line.update(labels=[3])), "line 2: labels can't be"),
    "a label twice": (edit(lambda line: line.update(labels=[0, 0])), "line 2: labels can't be"),
    "labels as text": (edit(lambda line: line.update(labels="01")), "line 2: labels can't be"),
    "absent labels": (
        edit(lambda line: line.update(absent_labels=[-1])),
        "line 2: absent_labels can't be",
    ),
    "a box": (
        edit(lambda line: line["annotations"][0].update(bbox=[0, 0, float("nan"), 1])),
        "line 2: annotations can't be boxes",
    ),
    "a box's mode": (
        edit(lambda line: line["annotations"][0].update(bbox_mode=[])),
        "line 2: annotations can't be boxes",
    ),
    "a box's label": (
        edit(lambda line: line["annotations"][0].update(category_id=9)),
        "line 2: annotations can't be boxes",
    ),
    "a label name": (
        edit(lambda line: line["label_names"].__setitem__(0, "a\nb"), 0),
        "can't be the name of a label",
    ),
    "no label names": (edit(lambda line: line.pop("label_names"), 0), "no list of label_names"),
    "a shard that leads out": (
        edit(lambda line: line["shards"][0].update(name="../000000.tar"), 0),
        "can't be a shard",
    ),
    "a shard of a command": (
        edit(lambda line: line["shards"][0].update(name="pipe:touch witness.tar"), 0),
        "can't be a shard",
    ),
    "a shard elsewhere": (
        edit(lambda line: line["shards"][0].update(name="http://x/000000.tar"), 0),
        "can't be a shard",
    ),
    "a shard twice": (
        edit(lambda line: line["shards"].append(line["shards"][0]), 0),
        "names a shard twice",
    ),
    "many images": (
        edit(lambda line: line["shards"][0].update(images=HUGE), 0),
        "ends before the last image",
    ),
    "no sum": (edit(lambda line: line["shards"][0].pop("sha256"), 0), "can't be a shard"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index_is_one_line(index, error_line, name):
    damage, message = DAMAGES[name]
    damage(index)
    line = error_line(load_multilabel_shards, str(index), "", ["red", "green", "blue"])
    assert str(index) in line
    assert re.search(message, line)


def test_a_member_of_a_gigabyte_is_refused(index, error_line):
    edit(lambda line: line["shards"][0].update(size=HUGE), 0)(index)
    edit(lambda line: line.update(length=2**30 + 1))(index)
    line = error_line(load_multilabel_shards, str(index), "", ["red", "green", "blue"])
    assert "outside of" in line
    assert "too large" in line


def test_a_line_without_an_end_is_refused(index, error_line, monkeypatch):
    monkeypatch.setattr("ia_gcn.data.datasets.shards.MAX_LINE", 3000)
    index.write_bytes(b" " * 10**6)
    assert "line 1: too long" in error_line(read_shard_index, str(index))


# ------------------------------------------------------------------------------- DATASETS.CUSTOM


def make_cfg(index, **keys):
    """Small images; double underscores in the keys stand for dots."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    defaults = {
        "MODEL__LABEL_HEAD__NUM_LABELS": 3,
        "DATASETS__CUSTOM__TRAIN": str(index),
        "DATASETS__CUSTOM__TEST": str(index),
        "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False,
        "DATALOADER__NUM_WORKERS": 0,
        "DATALOADER__SHARD_STREAMS": 2,
        "DATALOADER__SHARD_WINDOW": 2,
        "INPUT__FORMAT": "RGB",
        "INPUT__IMAGE_SIZE": (16, 16),
        "SOLVER__IMS_PER_BATCH": 4,
        "TEST__IMS_PER_BATCH": 4,
        "SEED": 3,
    }
    for key, value in {**defaults, **keys}.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    register_custom(cfg)
    return cfg


def test_labels_in_another_order(index, loose):
    assert file_label_names(str(index)) == ["red", "green", "blue"]
    make_cfg(index, DATASETS__CUSTOM__LABELS=("blue", "new", "red", "green"))
    renumber = {0: 2, 1: 3, 2: 0}
    for record in get_multilabel_dicts(["custom_train"]):
        original = loose[record["image_id"]]
        assert record["labels"] == sorted(renumber[label] for label in original["labels"])
        assert [box["category_id"] for box in record["annotations"]] == [
            renumber[box["category_id"]] for box in original["annotations"]
        ]


def test_labels_that_are_not_asked_for(index, error_line):
    make_cfg(index, DATASETS__CUSTOM__LABELS=("red", "green"))
    line = error_line(get_multilabel_dicts, ["custom_train"])
    assert line == f"{index}: unknown label name(s): blue"


@pytest.mark.parametrize("prefix", ["", "tar://"])
def test_shards_may_be_elsewhere_than_their_index(index, tmp_path, prefix):
    index.rename(tmp_path / "moved.jsonl")
    make_cfg(tmp_path / "moved.jsonl", DATASETS__CUSTOM__IMAGE_ROOT=f"{prefix}{index.parent}")
    dicts = get_multilabel_dicts(["custom_train"])
    assert read_image(dicts[0]["file_name"]).shape == (24, 32, 3)


def test_a_relative_path(index, monkeypatch):
    monkeypatch.chdir(index.parent)
    make_cfg("index.jsonl")
    dicts = get_multilabel_dicts(["custom_test"])
    assert read_image(dicts[0]["file_name"]).shape == (24, 32, 3)
    assert MetadataCatalog.get("custom_test").image_root == "tar://."


def test_images_of_shards_can_be_held_out(index, tmp_path):
    keys = {"DATASETS__CUSTOM__TEST": "", "DATASETS__CUSTOM__HOLD_OUT": 0.3}
    cfg = make_cfg(index, OUTPUT_DIR=str(tmp_path), **keys)
    train, test = (get_multilabel_dicts([name]) for name in ("custom_train", "custom_test"))
    assert len(train) + len(test) == 23
    assert 4 <= len(test) <= 10
    write_split(cfg)
    lines = (tmp_path / "split.csv").read_text().splitlines()[1:]
    folder = f"tar://{index.parent}"
    assert {f"{folder}/{line}" for line in lines} == {
        f"{record['file_name']},custom_{part}"
        for part, dicts in (("train", train), ("test", test))
        for record in dicts
    }


def test_a_registered_name(index):
    register_multilabel_shards("mine", str(index))
    assert len(get_multilabel_dicts(["mine"])) == 23
    assert MetadataCatalog.get("mine").thing_classes == ["red", "green", "blue"]
    assert MetadataCatalog.get("mine").evaluator_type == "multi_label"


# ----------------------------------------------------------------------------------------- loaders


def train_batches(index, count, start=0, **keys):
    cfg = make_cfg(index, **keys)
    loader = build_multilabel_train_loader(cfg)
    loader.start_at(start, cfg.SEED)
    return [[comparable(sample) for sample in batch] for batch in take(loader, count)]


def comparable(sample):
    return sample["image_id"], sample["labels"].tolist(), sample["image"].numpy().tobytes()


def ids(batches):
    return [sample[0] for batch in batches for sample in batch]


@pytest.fixture
def whole(index):
    """16 training batches, that is 64 of an endless stream over 23 images."""
    return train_batches(index, 16)


def test_training_sees_each_image_once_per_epoch(whole, loose):
    for epoch in range(2):
        assert sorted(ids(whole)[23 * epoch : 23 * (epoch + 1)]) == sorted(loose)
    for image_id, labels, _ in itertools.chain(*whole):
        assert np.flatnonzero(labels).tolist() == loose[image_id]["labels"]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(index, whole, workers):
    assert train_batches(index, 16, DATALOADER__NUM_WORKERS=workers) == whole


@pytest.mark.parametrize(("workers", "batches"), [(0, 1), (0, 9), (2, 7)])
def test_a_late_start_gives_the_tail_of_the_batches(index, whole, workers, batches):
    keys = {"DATALOADER__NUM_WORKERS": workers}
    assert train_batches(index, 16 - batches, start=4 * batches, **keys) == whole[batches:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches(index, whole, as_process, caplog, world_size):
    parts = []
    for rank in range(world_size):
        as_process(rank, world_size)
        with caplog.at_level(logging.WARNING):
            parts.append(train_batches(index, 16))
    for batch, *of_processes in zip(whole, *parts):
        assert [sample for samples in zip(*of_processes) for sample in samples] == batch
    # Of two streams.
    assert ("SHARD_STREAMS is 2, no multiple of the 4 processes" in caplog.text) == (
        world_size == 4
    )


def test_a_window_of_0_is_the_order_of_loose_files(index):
    batches = train_batches(index, 16, DATALOADER__SHARD_WINDOW=0)
    dicts = get_multilabel_dicts(["custom_train"])
    expected = [dicts[i]["image_id"] for _, i in take(PositionSampler(23, 3), 64)]
    assert ids(batches) == expected


def test_images_with_rare_labels_come_more_often(index):
    keys = {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}
    keys["DATALOADER__REPEAT_THRESHOLD"] = 1.0
    batches = train_batches(index, 60, **keys)
    assert train_batches(index, 7, start=4 * 53, DATALOADER__NUM_WORKERS=2, **keys) == batches[53:]
    assert max(Counter(ids(batches)).values()) > 240 / 23 + 2


def test_evaluation_sees_each_image_once_in_the_order_of_the_shards(index, as_process):
    expected = [line["image_id"] for line in read_lines(index)[1:]]
    for workers in (0, 2):
        loader = build_multilabel_test_loader(
            make_cfg(index, DATALOADER__NUM_WORKERS=workers), "custom_test"
        )
        assert [sample["image_id"] for batch in loader for sample in batch] == expected
    seen = []
    for rank in range(3):
        as_process(rank, 3)
        loader = build_multilabel_test_loader(make_cfg(index), "custom_test")
        seen += [sample["image_id"] for batch in loader for sample in batch]
    assert seen == expected


# -------------------------------------------------------------------------------- damaged shards


def of_shards(index):
    """The ids of the images of each shard."""
    lines = read_lines(index)
    rest = iter([line["image_id"] for line in lines[1:]])
    return [take(rest, shard["images"]) for shard in lines[0]["shards"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_replaced_by_the_next_one(index, whole, caplog, workers):
    images = of_shards(index)
    (index.parent / "000001.tar").unlink()
    cfg = make_cfg(index, DATALOADER__NUM_WORKERS=workers)
    with caplog.at_level(logging.WARNING):
        loader = build_multilabel_train_loader(cfg)
        batches = [[comparable(sample) for sample in batch] for batch in take(loader, 16)]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    name = str(index.parent / "000001.tar")
    assert len(warnings) == 2
    number = len(images[1])
    assert f"1 shard(s) with {number} of 23 images are missing or damaged: {name}" in warnings[0]
    assert f"Skipped an unreadable tar shard: {name}: No such file" in warnings[1]
    assert list(loader.unreadable) == [name]
    # The others are what they were, and each image of the next shard comes as often as the others.
    instead = dict(zip(images[1], itertools.cycle(images[2])))
    for new, old in zip(itertools.chain(*batches), itertools.chain(*whole)):
        if old[0] in instead:
            assert new[0] not in images[1]
        else:
            assert new == old
    seen = Counter(ids(batches)[:23])
    assert max(seen.values()) == 2
    assert sum(seen.values()) == 23


def test_neighbours_that_are_missing_are_replaced_too(index):
    for i in (1, 2, 4):
        (index.parent / f"{i:06d}.tar").unlink()
    images = of_shards(index)
    lost = {*images[1], *images[2], *images[4]}
    batches = train_batches(index, 16)
    assert [len(batch) for batch in batches] == [4] * 16
    assert not lost & set(ids(batches))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 3),
    st.sets(st.integers(0, 38), max_size=4),
)
def test_an_image_is_replaced_as_long_as_any_can_be_read(shards, loose, bad_images):
    """Shards of any number of images, missing or not, and loose files."""
    numbers = [i for i, (n, _) in enumerate(shards) for _ in range(n)] + [-1] * loose
    missing = {i for i, (_, is_missing) in enumerate(shards) if is_missing}

    def read(image):
        tries.append(image)
        if numbers[image] in missing:
            raise UnreadableShard(f"{numbers[image]}.tar", "gone")
        if image in bad_images:
            raise UnreadableImage(f"{image}.png", "damaged")
        return {"image": image}

    samples = TrainingSamples(range(len(numbers)), read, 0, numbers)
    readable = {i for i, n in enumerate(numbers) if n not in missing and i not in bad_images}
    for image in range(len(numbers)):
        tries = []
        sample = samples[0, image]
        assert ("image" in sample) == bool(readable)
        assert sample.get("image", image) in readable or not readable
        assert image not in readable or sample == {"image": image, "image_index": image}
        # No shard and no image is asked for twice.
        files = [error.file_name for error in sample.get("unreadable", [])]
        assert len(set(files)) == len(files)
        assert len(tries) == len(files) + ("image" in sample)


def test_a_long_shard_is_replaced_by_a_short_one():
    def read(image):
        if image < 100:
            raise UnreadableShard("0.tar", "gone")
        return {"image": image}

    samples = TrainingSamples(range(160), read, 0, [0] * 100 + [1] * 60)
    seen = Counter(samples[0, image]["image"] for image in range(160))
    assert set(seen) == {*range(100, 160)}


def test_a_shard_of_the_same_ids_and_lengths_gives_no_other_labels(loose, data, tmp_path):
    record = {**next(iter(loose.values())), "labels": [0]}
    for folder, labels in ("a", [0]), ("b", [1]):
        write_shards([{**record, "labels": labels}], data.label_names, str(tmp_path / folder), 300)
    (found,) = load_multilabel_shards(str(tmp_path / "a/index.jsonl"), "", data.label_names)
    read_image(found["file_name"])
    os.replace(tmp_path / "b/000000.tar", tmp_path / "a/000000.tar")
    with pytest.raises(UnreadableShard, match="is not where the index says"):
        read_image(found["file_name"])


def test_too_many_damaged_shards_are_an_error(index, error_line):
    (index.parent / "000001.tar").unlink()
    with open(index.parent / "000003.tar", "ab") as file:
        file.write(b"more")
    for build in (
        build_multilabel_train_loader,
        lambda cfg: build_multilabel_test_loader(cfg, "custom_test"),
    ):
        line = error_line(build, make_cfg(index, DATASETS__MAX_UNREADABLE=1))
        assert "2 shard(s) with " in line
        assert "000001.tar (No such file or directory)" in line
        assert "000003.tar (damaged: " in line
        assert "DATASETS.MAX_UNREADABLE is 1" in line
        build(make_cfg(index, DATASETS__MAX_UNREADABLE=2))


def test_shards_that_are_lost_in_training_count(index, error_line):
    cfg = make_cfg(index, DATASETS__MAX_UNREADABLE=1)
    loader = build_multilabel_train_loader(cfg)
    (index.parent / "000001.tar").unlink()
    assert len(take(loader, 16)) == 16
    (index.parent / "000002.tar").unlink()
    line = error_line(take, loader, 16)
    assert "2 images or shards can't be read, more than DATASETS.MAX_UNREADABLE = 1" in line


def test_evaluation_leaves_damaged_shards_out(index, caplog):
    images = of_shards(index)
    (index.parent / "000001.tar").unlink()
    loader = build_multilabel_test_loader(make_cfg(index), "custom_test")
    with caplog.at_level(logging.WARNING):
        seen = [sample["image_id"] for batch in loader for sample in batch]
    assert seen == [i for shard in images[:1] + images[2:] for i in shard]
    assert f"{len(images[1])} images were left out" in caplog.text


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_shard_at_all_is_an_error(index, error_line, late, workers):
    cfg = make_cfg(index, DATASETS__MAX_UNREADABLE=99, DATALOADER__NUM_WORKERS=workers)
    loaders = (
        build_multilabel_train_loader,
        lambda cfg: build_multilabel_test_loader(cfg, "custom_test"),
    )
    if late:
        loaders = [build(cfg) for build in loaders]
    for path in index.parent.glob("*.tar"):
        path.unlink()
    for loader in loaders:
        if late:
            assert error_line(take, loader, 99) == "none of the 23 images can be read"
        else:
            assert "with 23 of 23 images are missing" in error_line(loader, cfg)


def test_a_damaged_image_in_a_shard_is_skipped_alone(index, whole, caplog):
    line = read_lines(index)[5]
    dicts = load_multilabel_shards(str(index), "", ["red", "green", "blue"])
    member = parse_member(dicts[4]["file_name"])
    with open(member.shard.path, "r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.length))
    with caplog.at_level(logging.WARNING):
        batches = train_batches(index, 16)
    assert member.path in caplog.text
    following = dicts[5]["image_id"]
    expected = [following if i == line["image_id"] else i for i in ids(whole)]
    assert ids(batches) == expected


# --------------------------------------------------------------------------------------- elsewhere


def test_training_on_shards_elsewhere(index, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    asked = Counter()
    with served(index.parent, asked) as url:
        for workers in (0, 2):
            keys = {"DATALOADER__NUM_WORKERS": workers, "DATASETS__CUSTOM__IMAGE_ROOT": url}
            assert train_batches(index, 16, **keys) == whole
    assert asked == {f"{i:06d}.tar": 1 for i in range(len(of_shards(index)))}


def test_an_index_elsewhere(index):
    with served(index.parent, Counter()) as url:
        dicts = load_multilabel_shards(f"{url}/index.jsonl", "", ["red", "green", "blue"])
        assert check_shards(f"{url}/index.jsonl") == {}
    assert parse_member(dicts[0]["file_name"]).shard.path == f"{url}/000000.tar"


def test_shards_are_copied_before_they_are_asked_for(monkeypatch):
    copied = []
    monkeypatch.setattr("ia_gcn.data.shard_fetching.copy_shard", copied.append)
    shards = [Shard(f"https://example.invalid/{i}.tar", 9000) for i in range(5)]
    numbers = [i // 10 for i in range(50)]
    items = [(place, index) for place, index in enumerate(range(50))]
    stream = iter(FetchAhead(items, numbers, shards))
    assert take(stream, 15) == items[:15]
    # The thread has had the time of no item at all.
    for _ in range(1000):
        if len(copied) == 3:
            break
        shard_files.time.sleep(0.01)
    assert copied == shards[:3]
    assert list(stream) == items[15:]


def test_the_tar_files_have_nothing_that_depends_on_the_machine(index):
    for path in sorted(index.parent.glob("*.tar")):
        with tarfile.open(path) as file:
            for member in file:
                assert member.isreg()
                owner = member.mtime, member.uid, member.gid, member.uname, member.gname
                assert owner == (0, 0, 0, "", "")
