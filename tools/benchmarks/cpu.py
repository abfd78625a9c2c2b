"""What the settings for CPUs are worth: training steps and prediction over a folder."""

from __future__ import annotations

import argparse
import inspect
import os
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Iterator, List

import numpy as np
import torch

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.export import export_model
from ia_gcn.inference import MultiLabelPredictor, OnnxPredictor, predict_files
from ia_gcn.inference.precision import has_fast_bf16
from ia_gcn.memory import keep_freed_memory

from .arguments import positive
from .loading import rate_rows, write_photos
from .measuring import Table, measure, timed_rows
from .networks import Recipe, build_network, train_step

BF16 = "both, bf16"
# By the name of a row: KEEP_FREED_MEMORY, MODEL.CHANNELS_LAST and whether SOLVER.AMP.DTYPE is bf16.
SETTINGS = {
    "neither": (False, False, False),
    "memory kept": (True, False, False),
    "channels last": (False, True, False),
    "both": (True, True, False),
    BF16: (True, True, True),
}
EFFICIENTNET = Recipe("asl_tresnet_m.yaml", ("MODEL.TIMM.NAME", "tf_efficientnet_lite0"))
# By the name of a network: how it is made, images in a batch, and their height and width.
NETWORKS = {
    "ResNet-101": (Recipe("resnet101.yaml"), 4, 448),
    "EfficientNet-Lite0": (EFFICIENTNET, 32, 192),
}
# Of the prediction.
BATCH, SIZE = 16, 192


class Worker:
    """A process of its own that is asked for the same thing again and again.

    How memory is treated is a matter of a whole process.
    """

    def __init__(self, prepare: Callable[..., Callable], *args):
        """
        Args:
            prepare: called in the process with `args`, it returns what the process is asked for.
        """
        context = get_context("forkserver")
        context.set_forkserver_preload(["ia_gcn.engine"])
        self.pool = ProcessPoolExecutor(1, context, _prepare, (prepare, args))

    def __call__(self) -> None:
        self.pool.submit(_call).result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown()


def _prepare(prepare: Callable, args) -> None:
    global _call_prepared
    _call_prepared = prepare(*args)


def _call() -> None:
    _call_prepared()


def compare_training(args, name: str) -> Table:
    """Training steps of one of NETWORKS with each of SETTINGS."""
    recipe, batch, size = NETWORKS[name]
    batch, size = args.batch or batch, args.size or size
    with ExitStack() as stack:
        workers = {
            row: stack.enter_context(
                Worker(prepare_step, args.threads, recipe, batch, size, args.opts, *settings)
            )
            for row, settings in SETTINGS.items()
            if row != BF16 or has_fast_bf16(torch.device("cpu"))
        }
        rows = timed_rows(measure(workers, args.rounds, name))
    return Table(f"Training step: {name}, {batch} × {size}×{size} pixels", rows)


def prepare_step(
    threads: int,
    recipe: Recipe,
    batch: int,
    size: int,
    opts: List[str],
    keep_memory: bool,
    channels_last: bool,
    bf16: bool,
) -> Callable[[], None]:
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()
    network = build_network(recipe, batch, size, [*opts, "MODEL.CHANNELS_LAST", str(channels_last)])
    network.model.train()
    return partial(train_step, network, bf16)


def compare_prediction(args) -> Table:
    """Prediction over a folder of JPEGs beside the model alone, here and in ONNX Runtime."""
    batch, size = args.batch or BATCH, args.size or SIZE
    with TemporaryDirectory() as folder:
        weights, exported = (os.path.join(folder, f"model.{end}") for end in ("pth", "onnx"))
        save_checkpoint(weights, size, args.opts)
        export_model(MultiLabelPredictor(weights, device="cpu"), exported, "onnx")
        files = write_photos(Path(folder), args.num_images)
        settings = (args.threads, weights, exported, files, batch)
        with ExitStack() as stack:
            workers = {
                row: stack.enter_context(Worker(prepare, *settings))
                for row, prepare in PREDICTIONS.items()
            }
            rows = rate_rows(measure(workers, args.rounds, "prediction"), len(files))
    return Table(
        f"Prediction: tf_efficientnet_lite0, {size}×{size} pixels, in batches of {batch}",
        rows,
        f"{len(files)} JPEGs of about 640×480 pixels; memory is kept.",
    )


def save_checkpoint(path: str, size: int, opts: List[str]) -> None:
    """A checkpoint of an EfficientNet-Lite0 whose weights are random."""
    opts = [*opts, "INPUT.IMAGE_SIZE", f"({size}, {size})", "SOLVER.AMP.ENABLED", "False"]
    network = build_network(EFFICIENTNET, 1, size, opts)
    names = [f"label {i}" for i in range(network.cfg.MODEL.LABEL_HEAD.NUM_LABELS)]
    folder, name = os.path.split(path)
    checkpointer = MultiLabelCheckpointer(
        network.model, folder, label_names=names, config=network.cfg.dump()
    )
    checkpointer.save(os.path.splitext(name)[0])


def prepare_model(threads, weights, exported, files, batch, **options) -> Callable[[], None]:
    """The model on batches that lie in memory."""
    predictor = start_predictor(threads, weights, **options)
    samples = [predictor.view(file) for file in files]
    starts = range(0, len(samples), batch)

    @torch.no_grad()
    def call() -> None:
        for start in starts:
            predictor.model(samples[start : start + batch])

    return call


def prepare_folder(threads, weights, exported, files, batch) -> Callable[[], None]:
    """From files to predictions, as predict.py does it."""
    predictor = start_predictor(threads, weights)
    return lambda: deque(predict_files(predictor, files, batch_size=batch), 0)


def prepare_onnx(threads, weights, exported, files, batch) -> Callable[[], None]:
    """ONNX Runtime on batches that lie in memory."""
    predictor = OnnxPredictor(exported, device="cpu")
    images = np.stack([predictor.view(file)["image"] for file in files])
    starts = range(0, len(images), batch)

    def call() -> None:
        for start in starts:
            predictor.run(images[start : start + batch])

    return call


def start_predictor(threads: int, weights: str, **options) -> MultiLabelPredictor:
    torch.set_num_threads(threads)
    keep_freed_memory()
    return MultiLabelPredictor(weights, device="cpu", **options)


# By the name of a row. What the model alone does is what the others are compared with.
PREDICTIONS = {
    "the optimised model alone": prepare_model,
    "a folder": prepare_folder,
    "the model as it is trained, alone": partial(prepare_model, optimize=False),
    "ONNX Runtime alone": prepare_onnx,
}


def run_cpu(args) -> Iterator[Table]:
    """Time what makes training and prediction on a CPU faster, with weights of chance.

    A training step of ResNet-101 (4 × 448×448 pixels) and of EfficientNet-Lite0 (32 × 192×192), as
    PyTorch does it, with the memory kept that is freed (KEEP_FREED_MEMORY), with channels last in
    memory (MODEL.CHANNELS_LAST), with both, and in bf16 where the processor multiplies in it.

    Images per second of EfficientNet-Lite0 (192×192 pixels, batches of 16): the optimised model on
    images that lie in memory; from the files of a folder to predictions, as predict.py does it; the
    model before it is optimised; and ONNX Runtime on images that lie in memory.

    Each row is a process of its own. Together they take about 10 GB.
    """
    for name in NETWORKS:
        yield compare_training(args, name)
    yield compare_prediction(args)


def add_cpu(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "cpu",
        help="training and prediction with the settings for CPUs",
        description=inspect.getdoc(run_cpu),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_cpu)
    parser.add_argument("--batch", type=positive, help="images in a batch, of all networks")
    parser.add_argument("--size", type=positive, help="their height and width in pixels")
    parser.add_argument(
        "--num-images", type=positive, default=256, help="in the folder (default 256)"
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="config keys and values, for all networks"
    )
