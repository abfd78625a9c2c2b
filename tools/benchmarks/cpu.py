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
from typing import Callable, Iterator, List, Sequence

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
# By the name of a row: KEEP_FREED_MEMORY and MODEL.CHANNELS_LAST, and whether it is bf16.
SETTINGS = {"neither": (False, False), "both": (True, False), BF16: (True, True)}
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
    settings: bool,
    bf16: bool,
) -> Callable[[], None]:
    torch.set_num_threads(threads)
    if settings:
        keep_freed_memory()
    network = build_network(recipe, batch, size, [*opts, "MODEL.CHANNELS_LAST", str(settings)])
    network.model.train()
    return partial(train_step, network, bf16)


def compare_prediction(args) -> Table:
    """Prediction over a folder of JPEGs beside the model alone, and in ONNX Runtime."""
    batch, size = args.batch or BATCH, args.size or SIZE
    keep_freed_memory()
    with TemporaryDirectory() as folder:
        weights, exported = (os.path.join(folder, f"model.{end}") for end in ("pth", "onnx"))
        save_checkpoint(weights, EFFICIENTNET, size, args.opts)
        plain, optimised = (
            MultiLabelPredictor(weights, device="cpu", optimize=optimize)
            for optimize in (False, True)
        )
        export_model(plain, exported, "onnx")
        onnx = OnnxPredictor(exported, device="cpu")
        files = write_photos(Path(folder), args.num_images)
        samples = [optimised.view(file) for file in files]
        images = np.stack([sample["image"] for sample in samples])
        calls = {
            "the optimised model alone": batch_calls(optimised.model, samples, batch),
            "a folder": lambda: deque(predict_files(optimised, files, batch_size=batch), 0),
            "the model as it is trained, alone": batch_calls(plain.model, samples, batch),
            "ONNX Runtime alone": batch_calls(onnx.run, images, batch),
        }
        with torch.no_grad():
            rows = rate_rows(measure(calls, args.rounds, "prediction"), len(files))
    return Table(
        f"Prediction: tf_efficientnet_lite0, {size}×{size} pixels, in batches of {batch}",
        rows,
        f"{len(files)} JPEGs of about 640×480 pixels; memory is kept.",
    )


def save_checkpoint(path: str, recipe: Recipe, size: int, opts: List[str]) -> None:
    """A checkpoint of a network whose weights are random."""
    opts = [*opts, "INPUT.IMAGE_SIZE", f"({size}, {size})", "SOLVER.AMP.ENABLED", "False"]
    network = build_network(recipe, 1, size, opts)
    names = [f"label {i}" for i in range(network.cfg.MODEL.LABEL_HEAD.NUM_LABELS)]
    folder, name = os.path.split(path)
    checkpointer = MultiLabelCheckpointer(
        network.model, folder, label_names=names, config=network.cfg.dump()
    )
    checkpointer.save(os.path.splitext(name)[0])


def batch_calls(run: Callable, samples: Sequence, batch: int) -> Callable[[], None]:
    """`run` on one batch of `samples` after the other."""
    starts = range(0, len(samples), batch)
    return lambda: deque((run(samples[start : start + batch]) for start in starts), 0)


def run_cpu(args) -> Iterator[Table]:
    """Time what makes training and prediction on a CPU faster, with random weights.

    A training step of ResNet-101 (4 × 448×448 pixels) and of EfficientNet-Lite0 (32 × 192×192)
    without KEEP_FREED_MEMORY and MODEL.CHANNELS_LAST, with both, and beside them in bf16 where the
    processor multiplies in it, each in a process of its own.

    Images per second of EfficientNet-Lite0 (192×192 pixels, batches of 16): the optimised model on
    images that lie in memory; from the files of a folder to predictions, as predict.py does it; the
    model before it is optimised; and ONNX Runtime on images that lie in memory.
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
