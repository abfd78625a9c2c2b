"""The order of the images, and the loaders for training and evaluation."""

import gc
import itertools
import logging
import math
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn import add_ia_gcn_config
from ia_gcn.data import (
    build_multilabel_test_loader,
    build_multilabel_train_loader,
    get_multilabel_dicts,
    register_multilabel_coco,
)
from ia_gcn.data.samplers import PositionSampler, mix_seeds, repeat_factors_from_config
from ia_gcn.errors import InputError


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process the given one of so many."""

    def be(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return be


def take(iterable, count):
    return list(itertools.islice(iterable, count))


# --------------------------------------------------------------------------------- PositionSampler

sizes = st.integers(1, 30)
seeds = st.integers(0, 2**40)


@settings(max_examples=50)
@given(sizes, seeds)
def test_every_epoch_is_a_permutation(size, seed):
    stream = take(PositionSampler(size, seed), 3 * size)
    assert [place for place, _ in stream] == list(range(3 * size))
    for epoch in range(3):
        indices = [index for _, index in stream[epoch * size : (epoch + 1) * size]]
        assert sorted(indices) == list(range(size))


@settings(max_examples=50)
@given(sizes, seeds, st.integers(0, 100))
def test_a_late_start_gives_the_streams_tail(size, seed, start):
    whole = take(PositionSampler(size, seed), start + 2 * size)
    sampler = PositionSampler(size, seed)
    sampler.start = start
    assert take(sampler, 2 * size) == whole[start:]
    assert take(sampler, 2 * size) == whole[start:]  # and again


def test_epochs_and_seeds_differ():
    stream = [index for _, index in take(PositionSampler(100, 0), 300)]
    epochs = [tuple(stream[i : i + 100]) for i in (0, 100, 200)]
    others = [tuple(index for _, index in take(PositionSampler(100, seed), 100)) for seed in (1, 2)]
    assert len({*epochs, *others, tuple(range(100))}) == 6


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("start", [0, 6])
def test_processes_share_the_stream(as_process, world_size, start):
    whole = take(PositionSampler(7, 5), 60)[start:]
    parts = []
    for rank in range(world_size):
        as_process(rank, world_size)
        sampler = PositionSampler(7, 5)
        sampler.start = start
        parts.append(take(sampler, 10))
    assert [item for items in zip(*parts) for item in items] == whole[: 10 * world_size]


# ---------------------------------------------------------------------------------- repeat factors

factors = st.lists(st.floats(1, 4, width=32), min_size=1, max_size=20).map(torch.tensor)


@settings(max_examples=50)
@given(factors, seeds)
def test_an_epoch_has_each_image_as_often_as_its_factor_says(factors, seed):
    size = len(factors)
    stream = take(PositionSampler(size, seed, factors), 12 * size)
    assert [place for place, _ in stream] == list(range(12 * size))
    images = [image for _, image in stream]
    for epoch in range(3):
        generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
        # As detectron2 rounds: up with the probability of the fraction.
        up = (torch.rand(size, generator=generator) < factors - factors.floor()).tolist()
        times = [math.floor(r) + more for r, more in zip(factors.tolist(), up)]
        now, images = images[: sum(times)], images[sum(times) :]
        assert Counter(now) == dict(enumerate(times))


@settings(max_examples=50)
@given(factors, seeds, st.integers(0, 100), st.integers(1, 3))
def test_repeats_start_late_and_are_shared_as_all_others(factors, seed, start, world_size):
    size = len(factors)
    whole = take(PositionSampler(size, seed, factors), start + 2 * size * world_size)
    parts = []
    for rank in range(world_size):
        sampler = PositionSampler(size, seed, factors)
        sampler.start = start
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comm, "get_rank", lambda rank=rank: rank)
            patch.setattr(comm, "get_world_size", lambda: world_size)
            parts.append(take(sampler, 2 * size))
    assert [item for items in zip(*parts) for item in items] == whole[start:]


def test_the_mean_over_epochs_is_the_factor():
    factors = torch.tensor([1.0, 1.25, 2.5, 3.0])
    images = Counter(image for _, image in take(PositionSampler(4, 0, factors), 15500))
    for image, factor in enumerate(factors):
        # Some 2,000 epochs of 7.75 images each.
        assert images[image] / 2000 == pytest.approx(float(factor), abs=0.05)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 5), unique=True), min_size=1, max_size=20), st.floats(0.01, 1)
)
def test_the_factors_are_those_of_lvis(labels, threshold):
    keys = {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}
    cfg = make_cfg(**keys, DATALOADER__REPEAT_THRESHOLD=threshold)
    expected = []
    for image in labels:
        factor = 1.0
        for label in image:
            share = sum(label in other for other in labels) / len(labels)
            factor = max(factor, math.sqrt(threshold / share))
        expected.append(factor)
    found = repeat_factors_from_config(cfg, labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert repeat_factors_from_config(make_cfg(), labels) is None


def test_mixed_seeds_are_unlike():
    seeds = [mix_seeds(a, b) for a in range(30) for b in range(30)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert mix_seeds(1, 2) == mix_seeds(1, 2) != mix_seeds(2, 1)


# ---------------------------------------------------------------------------------------- training


def make_cfg(**keys):
    """Small images; double underscores in the keys stand for dots."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    defaults = {
        "MODEL__LABEL_HEAD__NUM_LABELS": 3,
        "DATASETS__TRAIN": ("tiny",),
        "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False,
        "DATALOADER__NUM_WORKERS": 0,
        "INPUT__FORMAT": "RGB",
        "INPUT__IMAGE_SIZE": (16, 16),
        "SOLVER__IMS_PER_BATCH": 4,
        "TEST__IMS_PER_BATCH": 4,
        "SEED": 3,
    }
    for key, value in {**defaults, **keys}.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.fixture
def tiny(tiny_coco):
    """Ten images, registered as `tiny`; their folder."""
    data = tiny_coco(10)
    register_multilabel_coco("tiny", data.json_file, data.image_root, data.label_names)
    return Path(data.image_root)


def spoil(folder, *numbers):
    for number in numbers:
        path = folder / f"{number:06d}.png"
        path.write_bytes(path.read_bytes()[:60])


def train_batches(count, start=0, **keys):
    """The first batches, with what makes up a sample in a form that can be compared."""
    loader = build_multilabel_train_loader(make_cfg(**keys))
    loader.start_at(start, make_cfg(**keys).SEED)
    return [[comparable(sample) for sample in batch] for batch in take(loader, count)]


def comparable(sample):
    return sample["file_name"], sample["labels"].tolist(), sample["image"].numpy().tobytes()


def names(batches):
    return [Path(sample[0]).name for batch in batches for sample in batch]


@pytest.fixture
def whole(tiny):
    """Eight training batches, that is 32 of an endless stream over ten images."""
    return train_batches(8)


def test_training_sees_each_image_once_per_epoch(tiny, whole):
    everything = sorted(path.name for path in tiny.iterdir())
    assert [len(batch) for batch in whole] == [4] * 8
    for epoch in range(3):
        assert sorted(names(whole)[10 * epoch : 10 * (epoch + 1)]) == everything


def test_a_sample_knows_its_images_place_in_the_training_set(tiny):
    spoil(tiny, 2)
    loader = build_multilabel_train_loader(make_cfg())
    for sample in itertools.chain(*take(loader, 6)):
        assert loader.dataset[sample["image_index"]]["file_name"] == sample["file_name"]


def test_each_view_of_an_image_is_another_one(whole):
    views = [sample[2] for batch in whole for sample in batch]
    assert len(set(views)) > 20


def test_a_samples_labels_are_its_files(whole):
    expected = {Path(d["file_name"]).name: d["labels"] for d in get_multilabel_dicts(["tiny"])}
    for file_name, labels, _ in itertools.chain(*whole):
        assert np.flatnonzero(labels).tolist() == expected[Path(file_name).name]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_the_workers(whole, workers):
    random.seed(workers)
    np.random.seed(workers)
    torch.manual_seed(workers)
    assert train_batches(8, DATALOADER__NUM_WORKERS=workers) == whole


@pytest.mark.parametrize(("workers", "batches"), [(0, 1), (0, 5), (2, 3)])
def test_a_late_start_gives_the_tail_of_the_batches(whole, workers, batches):
    tail = train_batches(8 - batches, start=4 * batches, DATALOADER__NUM_WORKERS=workers)
    assert tail == whole[batches:]


def test_images_with_rare_labels_come_more_often(tiny):
    keys = {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}
    keys["DATALOADER__REPEAT_THRESHOLD"] = 1.0
    batches = train_batches(40, **keys)
    assert train_batches(7, start=4 * 33, DATALOADER__NUM_WORKERS=2, **keys) == batches[33:]
    dicts = get_multilabel_dicts(["tiny"])
    shares = [sum(label in d["labels"] for d in dicts) / 10 for label in range(3)]
    factors = {
        Path(d["file_name"]).name: max(shares[label] ** -0.5 for label in d["labels"])
        for d in dicts
    }
    assert max(factors.values()) > 1.4
    seen, rounds = Counter(names(batches)), 160 / sum(factors.values())
    for name, factor in factors.items():
        # The number of times is rounded up or down once an epoch, and the last epoch is cut.
        assert abs(seen[name] - rounds * factor) < 6


def test_processes_share_the_batches(whole, as_process):
    parts = []
    for rank in range(2):
        as_process(rank, 2)
        parts.append(train_batches(8))
    for batch, first, second in zip(whole, *parts):
        assert len(first) == len(second) == 2
        assert [sample for pair in zip(first, second) for sample in pair] == batch


def test_the_seed_decides_order_and_views(whole):
    other = train_batches(8, SEED=4)
    assert names(other) != names(whole)
    views = [{sample[2] for batch in batches for sample in batch} for batches in (whole, other)]
    assert len(views[0] & views[1]) < 4


def test_start_at_can_change_the_seed(whole):
    loader = build_multilabel_train_loader(make_cfg(SEED=99))
    loader.start_at(8, 3)
    assert [comparable(sample) for sample in next(iter(loader))] == whole[2]


def test_without_a_seed_runs_differ(tiny):
    """A negative SEED asks for one by chance."""
    assert train_batches(2, SEED=3) == train_batches(2, SEED=3)
    orders = []
    for _ in range(2):
        loader = build_multilabel_train_loader(make_cfg(SEED=-1))
        orders.append([s["file_name"] for batch in take(loader, 3) for s in batch])
    assert orders[0] != orders[1]


def private_memory() -> int:
    """Bytes of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def collect(record):
    """A mapper: how much memory a full garbage collection costs the process that it runs in."""
    before = private_memory()
    gc.collect()
    return {"bytes": private_memory() - before}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_collection_in_a_worker_copies_nothing_of_its_parent(tiny):
    loader = build_multilabel_train_loader(make_cfg(DATALOADER__NUM_WORKERS=1), collect)
    # Without gc.freeze() it is more than 60 MB: the objects of all modules.
    assert next(iter(loader))[0]["bytes"] < 20e6


def test_the_loader_takes_another_mapper(tiny):
    loader = build_multilabel_train_loader(make_cfg(), lambda record: {"seen": record["image_id"]})
    assert sorted(s["seen"] for batch in take(loader, 5) for s in batch) == sorted(
        [*range(1, 11)] * 2
    )


def test_the_loader_takes_dicts_that_were_read_before(tiny):
    dicts = get_multilabel_dicts(["tiny"])[:3]
    loader = build_multilabel_train_loader(make_cfg(), dataset=dicts)
    assert len(loader.dataset) == 3
    assert {s["image_id"] for batch in take(loader, 3) for s in batch} == {1, 2, 3}


@pytest.mark.parametrize("filter_empty", [True, False])
def test_filter_empty_annotations(tiny, tmp_path, filter_empty):
    empty = (
        '{"images": [{"id": 1, "file_name": "000001.png"}], "annotations": [], "categories": []}'
    )
    (tmp_path / "empty.json").write_text(empty)
    labels = ["red", "green", "blue"]
    register_multilabel_coco("empty", str(tmp_path / "empty.json"), str(tiny), labels)
    cfg = make_cfg(
        DATASETS__TRAIN=("tiny", "empty"), DATALOADER__FILTER_EMPTY_ANNOTATIONS=filter_empty
    )
    assert len(build_multilabel_train_loader(cfg).dataset) == (10 if filter_empty else 11)


@pytest.fixture
def uncertain(tiny):
    """Five images, of which all but the first have ignored or unknown labels."""
    kept = {"height": 8, "width": 8, "annotations": []}
    names = [str(tiny / f"00000{i}.png") for i in (1, 2, 3)]
    dicts = [
        {"image_id": 1, "file_name": names[0], "labels": [0], "ignored_labels": [], **kept},
        {"image_id": 2, "file_name": names[1], "labels": [2], "ignored_labels": [0, 1], **kept},
        {"image_id": 3, "file_name": names[2], "labels": [], "ignored_labels": [1], **kept},
        {"image_id": 4, "file_name": names[0], "labels": [0], "absent_labels": [1], **kept},
        {
            **{"image_id": 5, "file_name": names[1], "labels": [], "absent_labels": [0, 1, 2]},
            **{"ignored_labels": [1], **kept},
        },
    ]
    DatasetCatalog.register("uncertain", lambda: dicts)
    MetadataCatalog.get("uncertain").set(thing_classes=["red", "green", "blue"])
    yield "uncertain"
    DatasetCatalog.remove("uncertain")
    MetadataCatalog.remove("uncertain")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # An image with unknown labels is not left out, where some are known.
        ("nowhere", {1: [1, 0, 0], 2: [-1, -1, 1], 4: [1, 0, -1], 5: [0, -1, 0]}),
        ("absent", {1: [1, 0, 0], 2: [0, 0, 1], 4: [1, 0, 0], 5: [0, 0, 0]}),
        # The third image has a label now, and is not left out. Unknown labels stay unknown.
        ("present", {1: [1, 0, 0], 2: [1, 1, 1], 3: [0, 1, 0], 4: [1, 0, -1], 5: [0, 1, 0]}),
    ],
)
def test_what_ignored_labels_are_in_training(uncertain, how, expected):
    cfg = make_cfg(
        DATASETS__TRAIN=(uncertain,),
        DATASETS__IGNORED_LABELS=how,
        DATALOADER__FILTER_EMPTY_ANNOTATIONS=True,
    )
    loader = build_multilabel_train_loader(cfg)
    samples = [sample for batch in take(loader, 3) for sample in batch]
    assert {s["image_id"]: s["labels"].tolist() for s in samples} == expected
    # The label graph counts the same.
    counts = [sum(c in d["labels"] for d in loader.dataset) for c in range(3)]
    assert counts == [sum(t[c] == 1 for t in expected.values()) for c in range(3)]
    # Evaluation has keys of its own.
    cfg.DATASETS.TEST = (uncertain,)
    tested = [s for batch in build_multilabel_test_loader(cfg, uncertain) for s in batch]
    assert [s["labels"].tolist() for s in tested] == [
        *([1, 0, 0], [-1, -1, 1], [0, -1, 0], [1, 0, -1], [0, -1, 0])
    ]
    cfg.TEST.FILTER_EMPTY_ANNOTATIONS = True
    tested = [s for batch in build_multilabel_test_loader(cfg, uncertain) for s in batch]
    assert [s["image_id"] for s in tested] == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("total", "fitting"), [(0, "2"), (-2, "2"), (1, "2"), (3, "2 or 4"), (5, "4 or 6")]
)
def test_a_batch_that_cannot_be_divided_is_refused(tiny, as_process, error_line, total, fitting):
    as_process(0, 2)
    cfg = make_cfg(SOLVER__IMS_PER_BATCH=total)
    message = error_line(build_multilabel_train_loader, cfg)
    assert message == (
        f"SOLVER.IMS_PER_BATCH = {total} can't be divided among 2 process(es): {fitting} can"
    )


# ----------------------------------------------------------------------------------------- chance


def generator_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_workers_leave_the_generators_of_this_process_alone(tiny):
    before = generator_states()
    train_batches(2, DATALOADER__NUM_WORKERS=2)
    assert generator_states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_the_generators_alone(tiny, workers):
    before = generator_states()
    cfg = make_cfg(DATALOADER__NUM_WORKERS=workers)
    assert sum(len(batch) for batch in build_multilabel_test_loader(cfg, "tiny")) == 10
    assert generator_states() == before


at_fork = []
os.register_at_fork(after_in_child=lambda: [call() for call in at_fork])


def test_a_signal_to_a_worker_that_starts_is_left_to_its_parent(tiny, monkeypatch):
    """As a batch system's, which ends all processes of a job, and Ctrl-C."""

    def hit():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys.modules[__name__], "at_fork", [hit])
    loader = build_multilabel_test_loader(make_cfg(DATALOADER__NUM_WORKERS=2), "tiny")
    assert sum(map(len, loader)) == 10
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not {signal.SIGTERM, signal.SIGINT} & blocked


# ------------------------------------------------------------------------------- unreadable images


def test_training_replaces_unreadable_images(tiny, whole, caplog):
    spoil(tiny, 2, 7)
    batches = train_batches(8)
    assert [len(batch) for batch in batches] == [4] * 8
    assert "000002.png" not in names(batches)
    assert "000007.png" not in names(batches)
    # The others are what they were; the next image takes the place of one that can't be read.
    next_one = {"000002.png": "000003.png", "000007.png": "000008.png"}
    assert names(batches) == [next_one.get(name, name) for name in names(whole)]
    for new, old in zip(itertools.chain(*batches), itertools.chain(*whole)):
        assert Path(old[0]).name in next_one or new == old
    assert train_batches(8, DATALOADER__NUM_WORKERS=2) == batches
    assert train_batches(5, start=12) == batches[3:]


def test_a_warning_per_unreadable_file(tiny, caplog):
    spoil(tiny, 2, 7)
    loader = build_multilabel_train_loader(make_cfg(DATALOADER__NUM_WORKERS=1))
    with caplog.at_level(logging.WARNING):
        take(loader, 10)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert Counter("000002.png" in w for w in warnings) == {True: 1, False: 1}
    assert set(map(Path, loader.unreadable)) == {tiny / "000002.png", tiny / "000007.png"}
    assert all(loader.unreadable.values())


def test_samples_do_not_carry_reports(tiny):
    spoil(tiny, 2)
    loader = build_multilabel_train_loader(make_cfg())
    assert not any("unreadable" in sample for batch in take(loader, 6) for sample in batch)


def test_evaluation_leaves_unreadable_images_out(tiny, caplog):
    spoil(tiny, 1, 2, 3, 4, 9)  # a whole batch, and one more
    loader = build_multilabel_test_loader(make_cfg(), "tiny")
    batches = list(loader)
    assert [[s["image_id"] for s in batch] for batch in batches] == [[5, 6, 7, 8], [10]]
    assert len(loader.unreadable) == 5
    assert caplog.text.count("000009.png") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_are_an_error(tiny, error_line, workers):
    spoil(tiny, 1, 5, 9)
    keys = {"DATALOADER__NUM_WORKERS": workers}
    assert len(take(build_multilabel_train_loader(make_cfg(**keys)), 6)) == 6
    cfg = make_cfg(DATASETS__MAX_UNREADABLE=2, **keys)
    for loader in (build_multilabel_train_loader(cfg), build_multilabel_test_loader(cfg, "tiny")):
        message = error_line(take, loader, 6)
        assert "DATASETS.MAX_UNREADABLE = 2" in message
        for number in (1, 5, 9):
            assert f"{number:06d}.png" in message
    cfg = make_cfg(DATASETS__MAX_UNREADABLE=3, **keys)
    assert sum(map(len, build_multilabel_test_loader(cfg, "tiny"))) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_unreadable_images_only_is_an_error(tiny, error_line, workers):
    spoil(tiny, *range(1, 11))
    loader = build_multilabel_train_loader(make_cfg(DATALOADER__NUM_WORKERS=workers))
    assert "none of the 10 images can be read" in error_line(take, loader, 1)


# -------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once_in_order(tiny, workers):
    loader = build_multilabel_test_loader(make_cfg(DATALOADER__NUM_WORKERS=workers), "tiny")
    assert len(loader) == 3
    for _ in range(2):
        assert [s["image_id"] for batch in loader for s in batch] == list(range(1, 11))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_evaluation(tiny, as_process, world_size):
    seen = []
    for rank in range(world_size):
        as_process(rank, world_size)
        batches = list(build_multilabel_test_loader(make_cfg(), "tiny"))
        seen += [s["image_id"] for batch in batches for s in batch]
    assert sorted(seen) == list(range(1, 11))


def test_evaluation_reads_unlabelled_images_whatever_training_does(tiny):
    cfg = make_cfg(DATALOADER__FILTER_EMPTY_ANNOTATIONS=True)
    assert sum(map(len, build_multilabel_test_loader(cfg, "tiny"))) == 10


def test_the_data_set_must_be_there(tiny):
    (tiny / "000004.png").unlink()
    for build in (
        lambda: build_multilabel_train_loader(make_cfg()),
        lambda: build_multilabel_test_loader(make_cfg(), "tiny"),
    ):
        with pytest.raises(InputError, match=r"1 of 10 .*000004\.png"):
            build()
