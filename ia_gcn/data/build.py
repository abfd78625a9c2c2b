"""Data loaders for training and evaluation, and checks of the data."""

from __future__ import annotations

import gc
import logging
import os
import random
from typing import Callable, Dict, Iterator, List, Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, DatasetFromList, Metadata, MetadataCatalog
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ..errors import InputError, ProcessDied
from ..io.images import UnreadableImage
from ..io.shards import (
    Shard,
    UnreadableShard,
    damaged_shards,
    is_member,
    is_remote,
    number_shards,
    parse_member,
)
from ..label_names import check_label_name, describe_mismatch
from ..processes import blocked_stop_signals, ignore_lost_parent, leave_signals_to_parent
from .dataset_mapper import LABEL_KEYS, MultiLabelDatasetMapper
from .datasets.common import read_label_file
from .proposals import add_proposals
from .samplers import (
    PositionSampler,
    ShuffleShards,
    mix_seeds,
    repeat_factors_from_config,
    shuffle_all,
)
from .shard_fetching import FetchAhead

logger = logging.getLogger(__name__)

# How many missing images an error message lists before it says "and n more".
MAX_LISTED = 20


def get_label_names(dataset_names: Sequence[str]) -> List[str]:
    """The label names of registered data sets, which must agree.

    A data set whose metadata has a `label_file` and no `thing_classes` gets them from it.

    Raises:
        InputError: there is no data set, or one is not registered, has no labels, a name that can't
            be a label's, or others than the first; or a label file can't be read.
    """
    if not dataset_names:
        raise InputError("DATASETS.TRAIN and DATASETS.TEST are empty")
    first = None
    for name in dataset_names:
        if name not in DatasetCatalog.list():
            raise InputError(
                f"DATASETS: {name!r} is not registered; known multi-label data sets: "
                + ", ".join(_multi_label_datasets())
            )
        metadata = MetadataCatalog.get(name)
        if not metadata.get("thing_classes") and metadata.get("label_file"):
            metadata.thing_classes = read_label_file(metadata.label_file)
        labels = list(metadata.get("thing_classes", []))
        if not labels:
            raise InputError(f"DATASETS: {name} has no label names (metadata thing_classes)")
        for label in labels:
            check_label_name(label, f"DATASETS: {name}")
        first = first or labels
        if labels != first:
            raise InputError(f"DATASETS: {name} {describe_mismatch(labels, first)}")
    return first


def _multi_label_datasets() -> List[str]:
    names = DatasetCatalog.list()
    return [n for n in names if MetadataCatalog.get(n).get("evaluator_type") == "multi_label"]


def get_multilabel_dicts(
    dataset_names: Sequence[str],
    drop_unlabelled: bool = False,
    proposal_files: Sequence[str] | None = None,
    ignored: str = "nowhere",
    max_unreadable: int | None = None,
) -> List[Dict]:
    """The dicts of one or several registered data sets, checked.

    Args:
        dataset_names: registered with detectron2.
        drop_unlabelled: leave out images without a label, but for those of which some label is
            known to be absent while others are unknown.
        proposal_files: one for each data set, see `add_proposals`; None: no proposals.
        ignored: what becomes of ignored and unknown labels, see `settle_ignored`.
        max_unreadable: see `check_images_exist`.
    Raises:
        InputError: see `load_multilabel_dicts` and `add_proposals`; or images are missing, or all
            were dropped.
    """
    if proposal_files is not None and len(proposal_files) != len(dataset_names):
        raise InputError(
            f"{len(proposal_files)} proposal files (DATASETS.PROPOSAL_FILES_TRAIN, _TEST) for the "
            f"{len(dataset_names)} data sets {', '.join(dataset_names)}"
        )
    dicts, dropped = [], 0
    for i, name in enumerate(dataset_names):
        found = load_multilabel_dicts(name)
        check_images_exist(name, found, max_unreadable)
        if proposal_files is not None:
            add_proposals(found, proposal_files[i])
        for record in found:
            settled = settle_ignored(record, ignored)
            if drop_unlabelled and not settled["labels"] and not record.get("absent_labels"):
                dropped += 1
            else:
                dicts.append(settled)
    if drop_unlabelled:
        logger.info(f"Dropped {dropped} images without a label; {len(dicts)} left")
        if not dicts:
            raise InputError(f"no image of {', '.join(dataset_names)} has a label")
    return dicts


def settle_ignored(record: Dict, how: str) -> Dict:
    """A dict without ignored labels.

    Args:
        record: see `MultiLabelDatasetMapper`.
        how: DATASETS.IGNORED_LABELS. nowhere: the dict as it is; absent: its ignored and unknown
            labels are absent; present: its `ignored_labels` are present. Unknown labels, which may
            be thousands, then stay unknown.
    """
    if how == "absent" and "absent_labels" in record:
        record = {key: value for key, value in record.items() if key != "absent_labels"}
    if how == "nowhere" or not record.get("ignored_labels"):
        return record
    settled = {**record, "ignored_labels": []}
    if how == "present":
        settled["labels"] = sorted({*record["labels"], *record["ignored_labels"]})
    return settled


def get_test_dicts(cfg, dataset_name: str) -> List[Dict]:
    """Those of one of DATASETS.TEST, with its proposals where MODEL.LOAD_PROPOSALS asks for them.

    Raises:
        InputError: see `get_multilabel_dicts`.
    """
    files = None
    if cfg.MODEL.LOAD_PROPOSALS:
        place = cfg.DATASETS.TEST.index(dataset_name)
        files = cfg.DATASETS.PROPOSAL_FILES_TEST[place : place + 1]
    return get_multilabel_dicts(
        [dataset_name],
        cfg.TEST.FILTER_EMPTY_ANNOTATIONS,
        files,
        max_unreadable=cfg.DATASETS.MAX_UNREADABLE,
    )


def load_multilabel_dicts(name: str) -> List[Dict]:
    """The dicts of a registered data set, whether or not its images are there.

    A detection data set works too: without `labels`, an image has those of its annotations. With
    `neg_category_ids`, as detectron2 loads LVIS, the others are unknown.

    Raises:
        InputError: the data set is not registered or is empty, or a label is outside its
            metadata's thing_classes.
    """
    num_labels = len(get_label_names([name]))
    dicts = []
    for record in DatasetCatalog.get(name):
        if "labels" not in record:
            record = _with_labels_of_boxes(record, MetadataCatalog.get(name))
        labels = [label for key in LABEL_KEYS for label in record.get(key, ())]
        if not all(0 <= label < num_labels for label in labels):
            raise InputError(
                f"data set {name}: {record['file_name']} has a label outside 0 to "
                f"{num_labels - 1}: {labels}"
            )
        dicts.append(record)
    if not dicts:
        raise InputError(f"data set {name} is empty")
    return dicts


def _with_labels_of_boxes(record: Dict, metadata: Metadata) -> Dict:
    present = {box["category_id"] for box in record.get("annotations", ())}
    if "neg_category_ids" not in record:
        return {**record, "labels": sorted(present)}
    # detectron2 keeps LVIS's own ids here. Those of LVIS's categories begin with 1.
    labels = metadata.get("thing_dataset_id_to_contiguous_id")
    absent, doubtful = (
        {i - 1 if labels is None else labels[i] for i in record.get(key, ())}
        for key in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    return {
        **record,
        "labels": sorted(present),
        "absent_labels": sorted(absent - present - doubtful),
        "ignored_labels": sorted(doubtful - present),
    }


def check_images_exist(
    dataset_name: str, dataset_dicts: Sequence[Dict], max_unreadable: int | None = None
) -> None:
    """Refuse a data set whose images are not all there; each folder is listed once.

    Tar shards that are missing, or have another size than in their index, only get a warning with
    their names. Those on other machines are not looked for.

    Args:
        max_unreadable: how many of its shards may be; None: all but one.
    Raises:
        InputError: with the number of missing images, or shards, and their names.
    """
    missing = missing_images(dataset_dicts)
    loose = [name for name in missing if not is_member(name)]
    if loose:
        if len(loose) > MAX_LISTED:
            logger.debug("Missing images of %s:\n%s", dataset_name, "\n".join(loose))
        raise InputError(
            f"data set {dataset_name}: {len(loose)} of {len(dataset_dicts)} images are missing: "
            f"{shorten(loose)}"
        )
    if missing:
        damaged = damaged_shards(missing)
        message = (
            f"data set {dataset_name}: {len(damaged)} shard(s) with {len(missing)} of "
            f"{len(dataset_dicts)} images are missing or damaged: "
            f"{shorten([f'{shard} ({why})' for shard, why in damaged.items()])}"
        )
        if max_unreadable is not None and len(damaged) > max_unreadable:
            raise InputError(f"{message}; DATASETS.MAX_UNREADABLE is {max_unreadable}")
        if len(missing) == len(dataset_dicts):
            raise InputError(message)
        logger.warning(f"{message}; these images will be skipped")


def shorten(names: Sequence[str]) -> str:
    """The first MAX_LISTED of some names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more}"


def missing_images(dataset_dicts: Sequence[Dict]) -> List[str]:
    """The file names that are not there, or in a shard that isn't, in the data set's order."""
    damaged = damaged_shards(record["file_name"] for record in dataset_dicts)
    folders: Dict[str, set] = {}
    missing = []
    for record in dataset_dicts:
        file_name = record["file_name"]
        if is_member(file_name):
            is_there = not damaged or parse_member(file_name).shard.path not in damaged
        else:
            folder, name = os.path.split(file_name)
            if folder not in folders:
                local = folder or "."
                folders[folder] = set(PathManager.ls(local)) if PathManager.isdir(local) else set()
            is_there = name in folders[folder]
        if not is_there:
            missing.append(file_name)
    return missing


class TrainingSamples(Dataset):
    """Maps (place in the stream, index) to a sample, whose augmentation depends on the place only.

    A sample has its image's place in the data set as `image_index`.

    An image that can't be read is replaced by the next one that can, and one of a shard that can't
    be read by that of the next shard at the same place: then all images of that one come twice, and
    not the first one all the time. Where that leads to an image that was tried, or to a shard that
    was, the next other one follows. The sample lists the unreadable files under `unreadable`, and
    has nothing else where none can be read.
    """

    def __init__(
        self,
        dataset: Sequence[Dict],
        mapper: Callable,
        seed: int,
        shards: Sequence[int] | None = None,
    ):
        """
        Args:
            dataset: n dicts.
            mapper: from such a dict to a sample.
            seed: the same in all processes.
            shards: (n,), the number of each image's shard, see `number_shards`; None: there are no
                shards.
        """
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed
        self.shards = np.full(len(dataset), -1) if shards is None else np.array(shards)
        self.shard_sizes = np.bincount(self.shards[self.shards >= 0])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item) -> Dict:
        place, index = item
        seed = mix_seeds(self.seed, place)
        unreadable = []
        shift, tried, failed_shards = 0, set(), set()
        # Without worker processes, torch's generator is the model's too.
        with torch.random.fork_rng(devices=[]):
            while len(tried) < len(self.dataset):
                place_of_image = (index + shift) % len(self.dataset)
                shard = self.shards[place_of_image]
                if place_of_image in tried or shard in failed_shards:
                    tried.add(place_of_image)
                    shift += 1
                    continue
                tried.add(place_of_image)
                random.seed(seed)
                np.random.seed(seed)
                # torch.manual_seed would seed the GPUs as well, at twice a sample's cost.
                torch.default_generator.manual_seed(seed)
                try:
                    sample = self.mapper(self.dataset[place_of_image])
                except UnreadableShard as error:
                    unreadable.append(error)
                    failed_shards.add(shard)
                    shift += int(self.shard_sizes[shard])
                except UnreadableImage as error:
                    unreadable.append(error)
                    shift += 1
                else:
                    sample = {**sample, "image_index": place_of_image}
                    return {**sample, "unreadable": unreadable} if unreadable else sample
        return {"unreadable": unreadable}


class EvaluationSamples(Dataset):
    """Maps an index to a sample, or to {"unreadable": [why]} where its image can't be read."""

    def __init__(self, dataset: Sequence[Dict], mapper: Callable):
        self.dataset = dataset
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Dict:
        try:
            return self.mapper(self.dataset[index])
        except UnreadableImage as error:
            return {"unreadable": [error]}


class ReadableBatches:
    """The batches of a data loader without unreadable images, which are reported and counted.

    The loader's iterator, and with it its worker processes, starts at the first batch that is
    asked for, not before.

    Attributes:
        unreadable: why, by file name, for each file that could not be read.
    """

    def __init__(self, loader: DataLoader, max_unreadable: int):
        self.loader = loader
        self.max_unreadable = max_unreadable
        self.unreadable: Dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[List[Dict]]:
        left_out = 0
        for batch in self._batches():
            for sample in batch:
                for error in sample.pop("unreadable", []):
                    self._report(error)
            readable = [sample for sample in batch if sample]
            left_out += len(batch) - len(readable)
            if self._is_none_readable(left_out):
                raise InputError(f"none of the {len(self.loader.dataset)} images can be read")
            if readable:
                yield readable
        if left_out:
            logger.warning(f"{left_out} images were left out, as they can't be read")

    def _is_none_readable(self, left_out: int) -> bool:
        """Whether so many samples without an image mean that there is none at all."""
        return left_out == len(self.loader.dataset)

    def _batches(self) -> Iterator[List[Dict]]:
        """
        Raises:
            ProcessDied: a worker was ended from outside.
        """
        try:
            # Its workers start here.
            with blocked_stop_signals():
                batches = iter(self.loader)
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:
            # Errors of the worker's own work name it otherwise.
            reason = str(error).splitlines()[:1]
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(reason):
                raise
            if "in DataLoader worker process" in str(reason):
                raise
            raise ProcessDied(
                "a process that loads images was ended from outside (out of memory? "
                f"DATALOADER.NUM_WORKERS is {self.loader.num_workers})"
            ) from error

    def _report(self, error: UnreadableImage) -> None:
        if error.file_name in self.unreadable:
            return
        self.unreadable[error.file_name] = error.reason
        kind = "tar shard" if isinstance(error, UnreadableShard) else "image"
        logger.warning(f"Skipped an unreadable {kind}: {error}")
        if len(self.unreadable) > self.max_unreadable:
            raise InputError(
                f"{len(self.unreadable)} images or shards can't be read, more than "
                f"DATASETS.MAX_UNREADABLE = {self.max_unreadable}: {', '.join(self.unreadable)}"
            )


class TrainingBatches(ReadableBatches):
    """The endless batches of a training set, from any place in the stream."""

    def __init__(self, loader: DataLoader, max_unreadable: int, sampler: PositionSampler):
        """
        Args:
            sampler: where the loader's places come from.
        """
        super().__init__(loader, max_unreadable)
        self.sampler = sampler

    def _is_none_readable(self, left_out: int) -> bool:
        # Each sample has tried all of them.
        return left_out > 0

    @property
    def dataset(self) -> Sequence[Dict]:
        """The training set's dicts."""
        return self.loader.dataset.dataset

    def start_at(self, place: int, seed: int) -> None:
        """Begin with the stream's image number `place`; to be called before the first batch.

        Args:
            place: iterations done × images per iteration of all processes.
            seed: of the stream, the same in all processes.
        """
        self.sampler.start = place
        self.sampler.seed = seed
        self.loader.dataset.seed = seed


def _train_loader_from_config(cfg, mapper=None, *, dataset=None):
    if dataset is None:
        dataset = get_multilabel_dicts(
            cfg.DATASETS.TRAIN,
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
            cfg.DATASETS.IGNORED_LABELS,
            cfg.DATASETS.MAX_UNREADABLE,
        )
    if not any(record["labels"] for record in dataset):
        raise InputError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} has a label")
    if cfg.INPUT.WITH_BOXES and not any(record.get("annotations") for record in dataset):
        raise InputError(
            f"INPUT.WITH_BOXES: no image of {', '.join(cfg.DATASETS.TRAIN)} has a box; an RPN "
            "needs none if it is frozen (MODEL.RPN.FROZEN)"
        )
    return {
        "dataset": dataset,
        "mapper": mapper or MultiLabelDatasetMapper(cfg, is_train=True),
        "seed": cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        "batch_size": images_per_process(cfg.SOLVER.IMS_PER_BATCH),
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "max_unreadable": cfg.DATASETS.MAX_UNREADABLE,
        "repeat_factors": repeat_factors_from_config(cfg, [d["labels"] for d in dataset]),
        "shard_window": cfg.DATALOADER.SHARD_WINDOW,
        "shard_streams": cfg.DATALOADER.SHARD_STREAMS,
    }


@configurable(from_config=_train_loader_from_config)
def build_multilabel_train_loader(
    dataset: Sequence[Dict],
    *,
    mapper: Callable,
    seed: int,
    batch_size: int,
    num_workers: int,
    max_unreadable: int,
    repeat_factors: torch.Tensor | None = None,
    shard_window: int = 0,
    shard_streams: int = 1,
) -> TrainingBatches:
    """An endless loader whose every sample is a function of the seed and its place in the stream.

    So it doesn't depend on the number of workers or processes. Called as (cfg) or (cfg, mapper),
    like detectron2's, or with all arguments.

    Args:
        dataset: dicts as `get_multilabel_dicts` returns them.
        mapper: from such a dict to a sample.
        seed: the same in all processes.
        batch_size: images per batch of this process.
        num_workers: loader processes.
        max_unreadable: DATASETS.MAX_UNREADABLE.
        repeat_factors: see `PositionSampler`.
        shard_window, shard_streams: of data in tar shards, see `ShuffleShards`; a window of 0: the
            images are shuffled as those of loose files are.
    """
    numbers, shards = number_shards(record["file_name"] for record in dataset)
    shuffle = shuffle_all
    if shards and shard_window:
        shuffle = ShuffleShards(numbers, shard_window, shard_streams)
        if shard_streams % comm.get_world_size():
            logger.warning(
                f"DATALOADER.SHARD_STREAMS is {shard_streams}, no multiple of the "
                f"{comm.get_world_size()} processes: several read the same shards"
            )
    samples = TrainingSamples(DatasetFromList(dataset, copy=False), mapper, seed, numbers)
    sampler = PositionSampler(len(samples), seed, repeat_factors, shuffle)
    fetching = _fetch_ahead(sampler, numbers, shards)
    loader = _build_loader(samples, fetching, batch_size, num_workers)
    return TrainingBatches(loader, max_unreadable, sampler)


def _test_loader_from_config(cfg, dataset_name, mapper=None):
    return {
        "dataset": get_test_dicts(cfg, dataset_name),
        "mapper": mapper or MultiLabelDatasetMapper(cfg, is_train=False),
        "batch_size": cfg.TEST.IMS_PER_BATCH,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "max_unreadable": cfg.DATASETS.MAX_UNREADABLE,
    }


@configurable(from_config=_test_loader_from_config)
def build_multilabel_test_loader(
    dataset: Sequence[Dict],
    *,
    mapper: Callable,
    batch_size: int,
    num_workers: int,
    max_unreadable: int,
) -> ReadableBatches:
    """A loader that gives every process its part of the images, each of them once.

    Called as (cfg, dataset_name), like detectron2's, or with all arguments; see
    `build_multilabel_train_loader`.
    """
    samples = EvaluationSamples(DatasetFromList(dataset, copy=False), mapper)
    numbers, shards = number_shards(record["file_name"] for record in dataset)
    sampler = _fetch_ahead(InferenceSampler(len(samples)), numbers, shards)
    return ReadableBatches(_build_loader(samples, sampler, batch_size, num_workers), max_unreadable)


def _fetch_ahead(sampler, numbers: Sequence[int], shards: Sequence[Shard]):
    """The sampler itself, where all shards are on this machine."""
    has_remote = any(is_remote(shard.path) for shard in shards)
    return FetchAhead(sampler, numbers, shards) if has_remote else sampler


def _build_loader(samples: Dataset, sampler, batch_size: int, num_workers: int) -> DataLoader:
    # Else torch raises the death of a worker in a signal handler, in the middle of whatever this
    # process is doing, such as writing a file or a log; so, when its next batch is asked for.
    signal_handling._SIGCHLD_handler_set = True
    return DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        # More workers than processors would not be faster; the samples are the same.
        num_workers=min(num_workers, available_processors()),
        collate_fn=trivial_batch_collator,
        # Worker seeds are never used; without a generator of its own, drawing them would move
        # torch's global one.
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
    )


def _start_worker(worker_id: int) -> None:
    # A full garbage collection writes to every object, and a forked worker's would so copy all that
    # it shares with its parent, some 100 MB, once in an hour or two.
    gc.freeze()
    leave_signals_to_parent(worker_id)
    ignore_lost_parent()


def available_processors() -> int:
    """The processors of this process, which may be fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def images_per_process(total: int) -> int:
    """SOLVER.IMS_PER_BATCH divided among the processes.

    Raises:
        InputError: it doesn't come out even.
    """
    processes = comm.get_world_size()
    if total < 1 or total % processes:
        below = max(total, 0) // processes * processes
        fitting = " or ".join(str(n) for n in (below, below + processes) if n)
        raise InputError(
            f"SOLVER.IMS_PER_BATCH = {total} can't be divided among {processes} process(es): "
            f"{fitting} can"
        )
    return total // processes
