"""Prediction over millions of images on a cluster of Ray, by Ray Data.

Ray Data's rows are parts of the input. Each worker, an actor with a predictor of its own, takes one
after the other: it reads and predicts a part's images, and returns its Parquet file, which this
process writes. What a lost worker had begun is begun anew by another one.

Ray is imported by the functions that need it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Sequence

from ..errors import InputError, ProcessDied
from ..extensions import import_extensions
from ..memory import share_freed_memory
from ..processes import EXPECTED_ERRORS
from .files import predict_batches
from .loading import load_predictor
from .parts import (
    Job,
    ResultFolder,
    Source,
    count_images,
    decode_part,
    describe_job,
    encode_part,
    encode_results,
    open_sources,
    split_sources,
)

# A worker has about so many cores: beyond, its threads would wait for each other.
CORES_OF_WORKER = 8
# Seconds until what is given back counts as free.
LAG = 10
# How often a part is begun; an image may end each process that reads it.
TRIES = 3


class Share(NamedTuple):
    """Workers, and what each of them has of the cluster."""

    workers: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


class Progress(NamedTuple):
    """What of a job is done."""

    images: int
    """Of the parts that are there."""
    total: int
    """Of all parts."""
    unreadable: int
    """Of the images that are done."""
    lost: int = 0
    """How often a worker was lost over a part."""


def predict_dataset(
    sources: Sequence[Source],
    output: str | os.PathLike[str],
    job: Job,
    *,
    workers: int | None = None,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
    address: str | None = None,
) -> Iterator[Progress]:
    """Predict the labels of images into a folder of Parquet files, see `encode_results`.

    What is in the folder of the same job stays, and the parts that are missing are made. The same
    job makes the same rows, bit for bit, on processors of one kind, whatever the number of workers.

    Args:
        sources: of `find_sources`; workers open them by these names.
        output: the folder, which this process writes.
        workers, cpus_per_worker, gpus_per_worker: see `choose_share`.
        address: of a cluster to join; None: the one that this process has joined, or a cluster of
            this machine alone, which ends with this.
    Yields:
        what is done, at first and after each part.
    Raises:
        InputError: the folder, the model or the share can't be used, or Ray is missing.
        ProcessDied: over one part, all of TRIES workers were lost.
    """
    rows, counts = [], []
    for part in split_sources(sources, job.part_size):
        rows.append(encode_part(part))
        counts.append(count_images(part))
    folder = ResultFolder(output, describe_job(job, rows, sum(counts)))
    missing = folder.missing()
    there = sorted(set(range(len(rows))) - set(missing))
    progress = Progress(
        images=sum(counts[i] for i in there),
        total=sum(counts),
        unreadable=sum(map(folder.unreadable, there)),
    )
    yield progress
    if not missing:
        return
    ray = import_ray()
    with joined_cluster(address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = choose_share(nodes, workers, cpus_per_worker, gpus_per_worker)
        share = share._replace(workers=min(share.workers, len(missing)))
        _wait_for_room(ray, share)
        for result in _predict_parts({i: rows[i] for i in missing}, job, share):
            part = result["part"]
            folder.write(part, result["content"])
            progress = progress._replace(
                images=progress.images + counts[part],
                unreadable=progress.unreadable + folder.unreadable(part),
                lost=progress.lost + result["lost"],
            )
            yield progress


def choose_share(
    nodes: Sequence[Mapping[str, float]],
    workers: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
) -> Share:
    """A predictor per GPU where there are some; else one per CORES_OF_WORKER cores or fewer.

    Args:
        nodes: of each machine, its CPU and GPU.
        workers: None: as many as fit.
        cpus, gpus: of each worker; None: its equal share of a machine.
    Raises:
        InputError: they do not fit.
    """
    if gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
    if cpus is None:
        able = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
        cpus = min((_even_share(node, gpus) for node in able), default=1)
    fit = sum(_how_many(node, cpus, gpus) for node in nodes)
    if fit < (workers or 1):
        each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        largest = max((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
        raise InputError(
            f"of workers with {each} each, {fit} fit into the cluster and not {workers or 1}: its "
            "largest machine has {:g} CPUs and {:g} GPUs (--workers, --cpus-per-worker, "
            "--gpus-per-worker)".format(*largest)
        )
    return Share(workers or fit, cpus, gpus)


def check_free(share: Share, free: Mapping[str, float]) -> None:
    """Refuse to wait for what others use of a cluster.

    Args:
        free: CPU and GPU of all machines.
    Raises:
        InputError: the share is more.
    """
    for kind, each in (("CPU", share.cpus), ("GPU", share.gpus)):
        if share.workers * each > free.get(kind, 0) + 1e-6:
            raise InputError(
                f"{share.workers} workers need {share.workers * each:g} {kind}s, of which others "
                f"leave {free.get(kind, 0):g} in the cluster (--workers)"
            )


def _even_share(node: Mapping[str, float], gpus: float) -> float:
    """The CPUs, in whole ones, of one of the workers that share a machine."""
    workers = node["GPU"] // gpus if gpus else math.ceil(node["CPU"] / CORES_OF_WORKER)
    return max(1, node["CPU"] // workers)


def _how_many(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    # What was divided need not be exact: 1 / 0.1 is, 1 // 0.1 is not.
    by_cpus = math.floor(node.get("CPU", 0) / cpus + 1e-6)
    return min(by_cpus, math.floor(node.get("GPU", 0) / gpus + 1e-6)) if gpus else by_cpus


# --------------------------------------------------------------------------------------------- Ray


def import_ray():
    """
    Raises:
        InputError: it is not installed.
    """
    # Nothing is sent to Ray's makers. It is read when Ray is imported or starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f'{error}: this needs pip install -e ".[ray]"') from None
    return ray


@contextmanager
def joined_cluster(address: str | None) -> Iterator[None]:
    """While this process is part of a cluster. One that it is part of already is kept as it is.

    Ray says on standard output, and only there, that a worker was lost.

    Args:
        address: None: a cluster of this machine alone.
    Raises:
        InputError: there is no cluster at the address, or none can be started.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        with _kept_sigterm(), _silent_stderr():
            _start(ray, address)
    except Exception as error:  # one that takes too long to start has no class of its own
        ray.shutdown()
        raise InputError(f"Ray (--address {address}): {' '.join(str(error).split())}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray, address: str) -> None:
    # Of Ray's part in C++, which warns of what Ray Data does.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Its ports ask for a token, unless RAY_AUTH_MODE says otherwise.
    local = {"include_dashboard": False} if address == "local" else {}
    ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **local)


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Ray sets a handler of its own; the one of before is set again."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """While nothing of this process gets there, its parts in C++ included."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _wait_for_room(ray, share: Share) -> None:
    """As `check_free`; Ray knows a while later what an earlier job has given back."""
    for left in reversed(range(LAG)):
        try:
            check_free(share, ray.available_resources())
            return
        except InputError:
            if not left:
                raise
            time.sleep(1)


def _predict_parts(rows: Mapping[int, str], job: Job, share: Share) -> Iterator[Dict[str, Any]]:
    """What `PartPredictor` returns of each part, in the order in which they are done."""
    ray = import_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # It takes no core; one that is lost begins to count again.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    tries = ray.remote(**options)(Tries).remote()
    data = ray.data.from_items(
        [{"part": number, "sources": row} for number, row in rows.items()],
        # A task for each part, whose result comes as soon as it is there.
        override_num_blocks=len(rows),
    ).map(
        PartPredictor,
        fn_constructor_kwargs={"job": job, "share": share, "tries": tries},
        compute=ray.data.ActorPoolStrategy(size=share.workers),
        num_cpus=share.cpus,
        num_gpus=share.gpus or None,
    )
    for result in data.iter_rows():
        if result["lost"] >= TRIES:
            raise ProcessDied(f"{result['error']}: each of {TRIES} workers that read it was lost")
        if result["error"]:
            raise InputError(result["error"])
        yield result


class Tries:
    """Counts how often each part was begun, for all workers."""

    def __init__(self):
        self.begun = Counter()

    def begin(self, part: int) -> int:
        """How often it was begun before."""
        self.begun[part] += 1
        return self.begun[part] - 1


class PartPredictor:
    """A worker: predicts the labels of a part's images."""

    def __init__(self, job: Job, share: Share, tries):
        self.job, self.share, self.tries = job, share, tries
        self.predictor = None

    def __call__(self, row: Mapping[str, Any]) -> Dict[str, Any]:
        """
        Args:
            row: part, its number, and sources, of `encode_part`.
        Returns:
            part; content, its Parquet file; lost, how many workers were over it; error, why there
                is no content.
        """
        import ray

        part, sources = int(row["part"]), decode_part(row["sources"])
        lost = ray.get(self.tries.begin.remote(part))
        result = {"part": part, "content": b"", "lost": lost, "error": ""}
        if lost >= TRIES:
            first = sources[0]
            name = first if isinstance(first, str) else f"{first.path}, row {first.start}"
            return {**result, "error": f"part {part}, of {name} and what follows"}
        try:
            return {**result, "content": self.predict(sources)}
        except EXPECTED_ERRORS as error:
            return {**result, "error": str(error)}

    def predict(self, sources: Sequence[Source]) -> bytes:
        """The Parquet file of some images.

        Raises:
            InputError: the model can't be used, or its output is not finite.
        """
        job, threads = self.job, self.share.threads
        if self.predictor is None:
            import_extensions(job.imports)
            self.predictor = load_predictor(
                job.weights,
                config_file=job.config_file,
                device=self.share.device,
                threads=threads,
                precision=job.precision,
            )
            share_freed_memory()
        items = ((image, None) for image in open_sources(sources, job.columns))
        batches = iter(lambda: list(islice(items, job.batch_size)), [])
        results = predict_batches(self.predictor, batches, threads)
        return encode_results(list(chain.from_iterable(results)), job)
