"""Predictions for files and folders: finding images, working in threads, records.

Neither torch nor detectron2 is needed.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import (
    TYPE_CHECKING,
    BinaryIO,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Sequence,
    Tuple,
    TypeVar,
)

import numpy as np

from ..errors import InputError
from ..io.images import UnreadableImage, source_name, turn_to_decode
from .known_labels import KnownLabels, check_known, with_known
from .onnx_predictor import OnnxPredictor
from .prediction import Prediction

if TYPE_CHECKING:
    from .predictor import MultiLabelPredictor

# Endings of the files in a folder that are images.
IMAGE_ENDINGS = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
URL = re.compile(r"(https?|ftp)://", re.IGNORECASE)

Item = TypeVar("Item")
Result = TypeVar("Result")


class FilePrediction(NamedTuple):
    """A model's prediction for a file: either `prediction` or `error` is None."""

    file: str
    """Its name."""
    prediction: Prediction | None
    error: str | None
    """Why it could not be read."""

    def record(
        self,
        threshold: float | np.ndarray = 0.5,
        top_k: int | None = None,
        with_regions: bool = False,
    ) -> Dict:
        """The same as a dict for JSON.

        Args:
            threshold, top_k: which labels, see `Prediction.above`.
            with_regions: of a model with a region branch.
        Returns:
            file, and error or
                known: where labels were known, whether each of them is there, by its name;
                labels: label and probability of each, the highest first;
                regions: where asked for, box (x0, y0, x1, y1 in pixels of the image), weight and
                    the likeliest label and its probability of each, best first by objectness.
        """
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        record = {"file": self.file}
        if self.prediction.known:
            record["known"] = dict(self.prediction.known)
        labels = self.prediction.above(threshold, top_k)
        record["labels"] = [_label_record(*label) for label in labels]
        if with_regions:
            names, regions = self.prediction.labels, self.prediction.regions
            record["regions"] = [
                {
                    "box": [round(side, 2) for side in box],
                    "weight": round(weight, 6),
                    **_label_record(names[scores.argmax()], float(scores.max())),
                }
                for box, weight, scores in zip(
                    regions.boxes.tolist(), regions.weights.tolist(), regions.scores
                )
            ]
        return record


def find_images(name: str) -> List[str]:
    """The files that a name stands for: a file, a folder, or a pattern such as photos/*.jpg.

    Of a folder these are the files below it with one of IMAGE_ENDINGS, sorted. A name of nothing,
    or of a folder without images, is returned itself: `predict_files` says what is wrong with it.

    Raises:
        InputError: it is a URL.
    """
    if URL.match(name):
        raise InputError(
            f"{name}: URLs are not downloaded; pipe the image instead: curl -sL {name} | "
            "tools/predict.py --weights FILE -"
        )
    matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    files = []
    for match in matches or [name]:
        files += (_images_below(match) if os.path.isdir(match) else []) or [match]
    return files


def predict_files(
    predictor: MultiLabelPredictor | OnnxPredictor,
    files: Iterable[str | os.PathLike[str] | BinaryIO],
    *,
    known: Iterable[KnownLabels | None] = (),
    batch_size: int = 16,
    num_workers: int | None = None,
) -> Iterator[FilePrediction]:
    """Predict the labels of each file's image, in order.

        p = MultiLabelPredictor("model.pth")
        for result in predict_files(p, find_images("photos")):
            print(result.record())

    Each of several threads reads a batch of files and puts it through the model. On a CPU they
    share its cores: threads that work apart from each other get more done than as many that wait
    for each other within every layer. A GPU does one batch at a time, while other threads read.

    Args:
        predictor: its `view` reads files, `predict_views` takes them in batches, and `used_by` is
            told of the threads.
        files: names, or binary files that are open.
        known: of each file in order, the labels that are known of its image, see `predict_batch`;
            nothing is known of the files beyond.
        batch_size: images that go through the model at once; fewer where there are too few files
            for all threads.
        num_workers: threads; None: see `default_workers`; 0: no threads.
    Raises:
        InputError: the model makes no use of known labels, or has no label of a name.
    """
    if num_workers is None:
        num_workers = default_workers()
    items = itertools.zip_longest(files, known)
    first = list(itertools.islice(items, max(1, num_workers) * batch_size))
    num_workers = min(num_workers, len(first))
    if num_workers:
        batch_size = math.ceil(len(first) / num_workers)
    items = itertools.chain(first, items)
    batches = iter(lambda: list(itertools.islice(items, batch_size)), [])
    with closing(predict_batches(predictor, batches, num_workers)) as results:
        yield from itertools.chain.from_iterable(results)


def predict_batches(
    predictor: MultiLabelPredictor | OnnxPredictor,
    batches: Iterable[Sequence[Tuple[str | os.PathLike[str] | BinaryIO, KnownLabels | None]]],
    num_workers: int,
) -> Iterator[List[FilePrediction]]:
    """The same for batches as they are, each in one piece through the model.

    Args:
        batches: of files, each with the labels that are known of its image.
    Yields:
        of each batch in order, its predictions.
    """
    with predictor.used_by(num_workers) as (start_thread, turn):
        work = partial(_predict_batch, predictor, turn)
        results = map_ahead(work, batches, num_workers, num_workers, start_thread)
        with closing(results):
            yield from results


def _predict_batch(predictor, turn: ContextManager, items: Sequence) -> List[FilePrediction]:
    samples = [_load(predictor, *item) for item in items]
    readable = [sample for _, sample in samples if "error" not in sample]
    with turn:
        predictions = iter(predictor.predict_views(readable))
    return [
        FilePrediction(name, None, sample["error"])
        if "error" in sample
        else FilePrediction(name, next(predictions), None)
        for name, sample in samples
    ]


def default_workers() -> int:
    """Threads that predict: one a processor core, 8 at most."""
    return min(8, os.cpu_count() or 1)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    ahead: int,
    start_thread: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """The built-in map, by threads that work up to `ahead` results in advance.

    With 0 threads, it is the built-in map. Each thread calls `start_thread` first.
    """
    if not num_workers:
        yield from map(function, items)
        return
    # Warning filters are per process: another thread may reset those that `decode_image` sets.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    threads = ThreadPoolExecutor(num_workers, initializer=start_thread)
    try:
        waiting = deque()
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _load(
    predictor, file: str | os.PathLike[str] | BinaryIO, known: KnownLabels | None
) -> Tuple[str, Dict]:
    """A file's name and its sample for a predictor, or {"error": why} where it can't be read."""
    check_known(predictor, known)
    name = source_name(file)
    if not hasattr(file, "read"):
        if URL.match(name):
            return name, {"error": "URLs are not downloaded"}
        if os.path.isdir(name):
            return name, {"error": "there is no image in this folder"}
    try:
        with turn_to_decode(file):
            return name, with_known(predictor.view(file), known, predictor.label_names)
    except UnreadableImage as error:
        return name, {"error": error.reason}


def _images_below(folder: str) -> List[str]:
    """The files with one of IMAGE_ENDINGS in a folder and its folders, sorted."""
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS
    )


def _label_record(name: str, probability: float) -> Dict:
    return {"label": name, "probability": round(probability, 6)}
