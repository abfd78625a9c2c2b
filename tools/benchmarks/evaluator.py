"""The evaluator and its measures, beside scikit-learn's and torchmetrics's."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
from functools import partial
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from tqdm import tqdm

from ia_gcn.errors import InputError
from ia_gcn.evaluation import MultiLabelEvaluator, multi_label_metrics

from .arguments import positive
from .measuring import Table, measure, measure_memory, timed_rows

# mAP, and CP, CR, CF1, OP, OR, OF1, in percent: CF1 is of the mean CP and CR.
Measures = Dict[str, float]


class Predictions(NamedTuple):
    scores: np.ndarray
    """(n, C) float32 in [0, 1]."""
    targets: np.ndarray
    """(n, C) int8 in {0, 1}; every label is present somewhere."""


def random_predictions(num_images: int, num_labels: int) -> Predictions:
    """About 4 % of the labels are present, and have higher scores than the others on average."""
    generator = np.random.default_rng(0)
    targets = generator.random((num_images, num_labels)) < 0.04
    targets[np.arange(num_labels) % num_images, np.arange(num_labels)] = True
    logits = generator.standard_normal(targets.shape, np.float32) + 3 * targets - 2
    scores = 1 / (1 + np.exp(-logits))
    return Predictions(scores.astype(np.float32), targets.astype(np.int8))


# ------------------------------------------------------------------------------ of whole arrays


def sklearn_measures(predictions: Predictions) -> Measures:
    scores, targets = predictions
    predicted = scores >= 0.5
    mean_ap = average_precision_score(targets, scores, average="macro")
    of = partial(precision_recall_fscore_support, targets, predicted, zero_division=0)
    cp, cr, _, _ = of(average="macro")
    op, or_, of1, _ = of(average="micro")
    return percent(mean_ap, cp, cr, op, or_, of1)


def torchmetrics_measures(batches: List[Tuple[torch.Tensor, torch.Tensor]]) -> Measures:
    """Of batches of scores and targets (B, C)."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import (
        MultilabelAveragePrecision,
        MultilabelF1Score,
        MultilabelPrecision,
        MultilabelRecall,
    )

    num_labels = batches[0][0].shape[1]
    metrics = MetricCollection(
        {
            "mAP": MultilabelAveragePrecision(num_labels, average="macro"),
            "CP": MultilabelPrecision(num_labels, average="macro"),
            "CR": MultilabelRecall(num_labels, average="macro"),
            "OP": MultilabelPrecision(num_labels, average="micro"),
            "OR": MultilabelRecall(num_labels, average="micro"),
            "OF1": MultilabelF1Score(num_labels, average="micro"),
        }
    )
    for scores, targets in batches:
        metrics.update(scores, targets)
    values = {name: value.item() for name, value in metrics.compute().items()}
    return percent(*(values[name] for name in ("mAP", "CP", "CR", "OP", "OR", "OF1")))


def percent(mean_ap, cp, cr, op, or_, of1) -> Measures:
    cf1 = 2 * cp * cr / (cp + cr)
    shares = {"mAP": mean_ap, "CP": cp, "CR": cr, "CF1": cf1, "OP": op, "OR": or_, "OF1": of1}
    return {name: 100 * float(share) for name, share in shares.items()}


def prepare_sklearn(predictions: Predictions) -> Callable[[], Measures]:
    return partial(sklearn_measures, predictions)


def prepare_torchmetrics(predictions: Predictions) -> Callable[[], Measures]:
    return partial(torchmetrics_measures, [tuple(map(torch.from_numpy, predictions))])


def prepare_ours(predictions: Predictions) -> Callable[[], Measures]:
    return partial(multi_label_metrics, *predictions)


# ---------------------------------------------------------------------------- of batch after batch


def split(predictions: Predictions, batch: int) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    scores, targets = (torch.from_numpy(array).split(batch) for array in predictions)
    return list(zip(scores, targets))


def sklearn_evaluation(batches: List[Tuple[torch.Tensor, torch.Tensor]]) -> Measures:
    """Collected, and measured in the end."""
    scores, targets = zip(*batches)
    return sklearn_measures(Predictions(torch.cat(scores).numpy(), torch.cat(targets).numpy()))


def our_evaluation(evaluator: MultiLabelEvaluator, batches: List[Tuple]) -> Measures:
    evaluator.reset()
    for inputs, outputs in batches:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()["multi_label"]


def prepare_sklearn_batches(predictions: Predictions, batch: int) -> Callable[[], Measures]:
    return partial(sklearn_evaluation, split(predictions, batch))


def prepare_torchmetrics_batches(predictions: Predictions, batch: int) -> Callable[[], Measures]:
    return partial(torchmetrics_measures, split(predictions, batch))


def prepare_our_batches(predictions: Predictions, batch: int) -> Callable[[], Measures]:
    name = register(predictions.scores.shape[1])
    batches, first = [], 0
    for scores, targets in split(predictions, batch):
        inputs = [{"image_id": first + i, "labels": row} for i, row in enumerate(targets.float())]
        batches.append((inputs, [{"scores": row} for row in scores]))
        first += len(inputs)
    return partial(our_evaluation, MultiLabelEvaluator(name, top_k=None), batches)


def register(num_labels: int) -> str:
    """The name of a data set of so many labels."""
    name = f"benchmark_{num_labels}_labels"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).thing_classes = [f"label {i}" for i in range(num_labels)]
    return name


# By the name of a row; the last is ours.
WHOLE = {
    "scikit-learn": prepare_sklearn,
    "torchmetrics": prepare_torchmetrics,
    "multi_label_metrics": prepare_ours,
}
BATCHES = {
    "scikit-learn": prepare_sklearn_batches,
    "torchmetrics": prepare_torchmetrics_batches,
    "MultiLabelEvaluator": prepare_our_batches,
}


def compare(what: str, size: Tuple[int, int], prepares: Dict[str, Callable], settings, args):
    """A table of what `prepares` make of predictions of a size and of the settings."""
    memory = {
        name: measure_memory(args.threads, prepare_step, prepare, size, settings)
        for name, prepare in tqdm(prepares.items(), "memory", leave=False, disable=None)
    }
    predictions = random_predictions(*size)
    calls = {
        name: prepare(predictions, *settings)
        for name, prepare in prepares.items()
        if "not_run" not in memory[name]
    }
    rows = timed_rows(measure(calls, args.rounds, what), memory)
    ours = prepare_ours(predictions)()
    for row in rows:
        if row["name"] in calls:
            row["metric_difference"] = largest_difference(calls[row["name"]](), ours)
    return Table(f"{what}: {size[0]:,} images × {size[1]} labels", rows)


def prepare_step(prepare: Callable, size: Tuple[int, int], settings) -> Callable:
    # What libraries take once, whatever the size, is none of the step's.
    prepare(random_predictions(50, 5), *settings)()
    return prepare(random_predictions(*size), *settings)


def largest_difference(measures: Measures, others: Measures) -> float:
    """Of those of the seven measures that both have, in percent."""
    return max(abs(measures[name] - others[name]) for name in ("mAP", "CF1", "OF1"))


# -------------------------------------------------------------------------- with all of its files

# By the name of a row: the limit of scores in memory, in MiB, and whether there is a report.
WITH_FILES = {
    "in memory": (2**20, False),
    "in files": (0, False),
    "in files, with report.html": (0, True),
}
# Of so many images, rolled over the labels, all others are made.
DIFFERENT_IMAGES = 256


def measure_files(size: Tuple[int, int], args) -> Table:
    """What an evaluation takes that writes its files, by the rows of WITH_FILES."""
    rows = []
    for name, settings in tqdm(WITH_FILES.items(), "evaluations", leave=False, disable=None):
        with TemporaryDirectory() as folder:
            found = measure_memory(args.threads, prepare_files, size, args.batch, folder, *settings)
            written = {
                file: f"{os.path.getsize(os.path.join(folder, file)) / 1e6:.1f} MB"
                for file in ("predictions.npz", "report.html")
                if os.path.exists(os.path.join(folder, file))
            }
        seconds = {"s": f"{found['step_s']:.1f}"} if "step_s" in found else {}
        rows.append({"name": name, **seconds, **found, **written})
    title = f"Evaluation with its files, batches of {args.batch}"
    return Table(f"{title}: {size[0]:,} images × {size[1]:,} labels", rows)


def prepare_files(
    size: Tuple[int, int], batch: int, folder: str, limit: int, report: bool
) -> Callable[[], Measures]:
    num_images, num_labels = size
    scores, targets = map(torch.from_numpy, random_predictions(DIFFERENT_IMAGES, num_labels))
    evaluator = MultiLabelEvaluator(
        register(num_labels), folder, report={} if report else None, memory_limit=limit
    )

    def batches() -> Iterator[Tuple[List[Dict], List[Dict]]]:
        for first in range(0, num_images, batch):
            ids = range(first, min(first + batch, num_images))
            # Which image it is, and how far it is rolled: too far for a compressed file to find
            # the same scores again.
            places = [(i % DIFFERENT_IMAGES, 7 * (i // DIFFERENT_IMAGES)) for i in ids]
            labels = [targets[row].roll(shift).float() for row, shift in places]
            inputs = [{"image_id": i, "labels": row} for i, row in zip(ids, labels)]
            yield inputs, [{"scores": scores[row].roll(shift)} for row, shift in places]

    return lambda: our_evaluation(evaluator, batches())


# ----------------------------------------------------------------------------------- command line


def run_evaluator(args) -> Iterator[Table]:
    """Time mAP, CP, CR, CF1, OP, OR and OF1 of random scores, beside scikit-learn and torchmetrics.

    First the measures alone, of whole arrays, by ia_gcn.evaluation.multi_label_metrics; then an
    evaluation batch after batch, by MultiLabelEvaluator without its files. The memory of each is
    measured in a process of its own. How far mAP, CF1 and OF1 are from those of multi_label_metrics
    is the last column but two.

    With --files: what an evaluation takes that writes predictions.npz and metrics.json, with its
    scores in memory, and in files as above TEST.MEMORY_LIMIT. The second evaluation in a process of
    its own is timed.
    """
    if args.files:
        yield from (measure_files(size, args) for size in args.sizes)
        return
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError(
            'needs torchmetrics: pip install "ia_gcn[bench]" or pip install torchmetrics'
        )
    for size in args.sizes:
        yield compare("Measures", size, WHOLE, (), args)
        yield compare(f"Evaluation, batches of {args.batch}", size, BATCHES, (args.batch,), args)


def add_evaluator(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "evaluator",
        help="measures and evaluator",
        description=inspect.getdoc(run_evaluator),
        epilog=EVALUATOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_evaluator)
    parser.add_argument(
        "--sizes",
        metavar="NxC,...",
        type=sizes,
        default=[(40504, 80), (10000, 500)],
        help="numbers of images and labels (default 40504x80,10000x500: COCO's and VG-500's)",
    )
    parser.add_argument(
        "--files", action="store_true", help="measure an evaluation with its files, not measures"
    )
    parser.add_argument("--batch", type=positive, default=16, help="images in a batch (default 16)")


EVALUATOR_EXAMPLES = """
Examples:
  with the sizes of COCO's and VG-500's test sets:
    tools/benchmark.py evaluator
  with VOC's:
    tools/benchmark.py evaluator --sizes 4952x20
  with the labels of Open Images, and what its files take:
    tools/benchmark.py evaluator --files --sizes 5000x9605
"""


def sizes(text: str) -> List[Tuple[int, int]]:
    """An argparse type: NxC,... as pairs."""
    pairs = [tuple(map(positive, size.split("x"))) for size in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxC,...")
    return pairs
