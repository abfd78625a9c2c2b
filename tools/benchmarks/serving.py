"""What serving a model on one core of a CPU costs, in PyTorch and ONNX Runtime, float and int8."""

from __future__ import annotations

import argparse
import inspect
import os
from collections import deque
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode

from ia_gcn.data import get_multilabel_dicts, get_test_dicts, register_custom
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.engine import setup_cfg
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.export import export_model, quantize_onnx
from ia_gcn.inference import MultiLabelPredictor, OnnxPredictor, predict_files
from ia_gcn.inference.precision import has_fast_bf16
from ia_gcn.memory import keep_freed_memory

from .arguments import positive
from .cpu import EFFICIENTNET, save_checkpoint
from .loading import rate_rows, write_photos
from .measuring import Table, measure
from .networks import Recipe

ROOT = Path(__file__).parents[2]
DEMO = Recipe(str(ROOT / "configs/DigitScenes/demo.yaml"))
# By the name of a network: how it is made, and the height and width of its images.
NETWORKS = {
    "DigitScenes demo": (DEMO, 96),
    "EfficientNet-Lite0": (EFFICIENTNET, 192),
    "TResNet-M": (Recipe("asl_tresnet_m.yaml"), 448),
    "ResNet-101": (Recipe("resnet101.yaml"), 448),
}
BATCH = 16
# Batches of BATCH are timed less often by this.
FEWER = 10
CALIBRATION_IMAGES = 300


class Served(NamedTuple):
    """A model in every form that it can be served in."""

    predictors: Dict[str, MultiLabelPredictor | OnnxPredictor]
    """By the name of a row."""
    sizes: Dict[str, int]
    """Bytes of the files, by the same names."""


def serve(weights: str, folder: str, calibration: Sequence[str]) -> Served:
    """The predictors of a checkpoint.

    Args:
        folder: of the ONNX files.
        calibration: files of images.
    """
    float32, int8 = (os.path.join(folder, f"{name}.onnx") for name in ("float32", "int8"))
    load = partial(MultiLabelPredictor, weights, device="cpu")
    predictors = {"PyTorch": load()}
    if has_fast_bf16(torch.device("cpu")):
        predictors["PyTorch, bf16"] = load(precision="bf16")
    export_model(predictors["PyTorch"], float32, "onnx")
    quantize_onnx(float32, int8, calibration)
    files = {"ONNX Runtime": float32, "ONNX Runtime, int8": int8}
    run = partial(OnnxPredictor, device="cpu", threads=torch.get_num_threads())
    predictors.update((name, run(path)) for name, path in files.items())
    paths = {name: files.get(name, weights) for name in predictors}
    return Served(predictors, {name: os.path.getsize(path) for name, path in paths.items()})


def latency_table(served: Served, what: str, files: Sequence[str], calls: int) -> Table:
    """One image at a time, of the model alone."""
    samples = {name: [p.view(files[0])] for name, p in served.predictors.items()}
    seconds = measure(model_calls(served, samples), calls, "one image")
    rows = [
        {
            "name": name,
            "p50_ms": 1000 * np.percentile(values, 50),
            "p99_ms": 1000 * np.percentile(values, 99),
            "per_second": 1 / np.median(values),
            "speed": np.median(seconds["PyTorch"]) / np.median(values),
            "file_bytes": served.sizes[name],
        }
        for name, values in seconds.items()
    ]
    note = f"{calls} calls of each."
    if not has_fast_bf16(torch.device("cpu")):
        note += " Without bf16, for which this processor has no instructions."
    return Table(f"One image at a time: {what}", rows, note)


def batch_table(served: Served, what: str, files: Sequence[str], calls: int) -> Table:
    """Batches of images, of the model alone."""
    samples = {name: [p.view(file) for file in files] for name, p in served.predictors.items()}
    rows = rate_rows(measure(model_calls(served, samples), calls, "batches"), len(files))
    return Table(f"Batches of {len(files)}: {what}", rows, f"{calls} calls of each.")


def file_table(served: Served, what: str, files: Sequence[str], calls: int) -> Table:
    """From files to records, as tools/predict.py has them, in one thread."""

    def records(predictor) -> None:
        results = predict_files(predictor, files, batch_size=len(files), num_workers=0)
        deque((result.record() for result in results), 0)

    timed = {name: partial(records, p) for name, p in served.predictors.items()}
    rows = rate_rows(measure(timed, calls, "files"), len(files))
    note = f"{len(files)} JPEGs of about 640×480 pixels, {calls} calls of each."
    return Table(f"From files to records: {what}", rows, note)


def model_calls(served: Served, samples: Dict[str, List[Dict]]) -> Dict[str, Callable[[], object]]:
    return {name: partial(p.predict_views, samples[name]) for name, p in served.predictors.items()}


def time_tables(
    weights: str, name: str, calibration: Sequence[str], rounds: int
) -> Iterator[Table]:
    """The three tables of times of a checkpoint."""
    with TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), BATCH)
        served = serve(weights, folder, calibration or photos)
        height, width = served.predictors["PyTorch"].cfg.INPUT.IMAGE_SIZE
        what = f"{name}, {height}×{width} pixels"
        few = max(1, rounds // FEWER)
        yield latency_table(served, what, photos, rounds)
        yield batch_table(served, what, photos, few)
        yield file_table(served, what, photos, few)


def quality_table(weights: str, cfg: CfgNode, calibration: Sequence[str]) -> Table:
    """mAP on DATASETS.TEST."""
    records = [record for name in cfg.DATASETS.TEST for record in get_test_dicts(cfg, name)]
    files = [record["file_name"] for record in records]
    with TemporaryDirectory() as folder:
        served = serve(weights, folder, calibration)
        scores = {name: score_files(p, files) for name, p in served.predictors.items()}
    count = len(served.predictors["PyTorch"].label_names)
    targets = np.stack([target_vector(record, count).numpy() for record in records])
    rows = [
        {
            "name": name,
            "mAP": f"{multi_label_metrics(values, targets)['mAP']:.2f}",
            "mean difference of scores": f"{np.abs(values - scores['PyTorch']).mean():.1e}",
            "max difference of scores": f"{np.abs(values - scores['PyTorch']).max():.1e}",
            "decisions that differ": f"{differing_share(values, scores['PyTorch']):.2%}",
        }
        for name, values in scores.items()
    ]
    note = f"{len(files)} images; int8 is calibrated with {len(calibration)} training images."
    return Table(f"mAP on {', '.join(cfg.DATASETS.TEST)}", rows, note)


def score_files(predictor, files: Sequence[str]) -> np.ndarray:
    """Probabilities (n, C) of n files."""
    results = predict_files(predictor, files, num_workers=0)
    return np.stack([result.prediction.scores for result in results])


def differing_share(scores: np.ndarray, others: np.ndarray) -> float:
    """Of the decisions at 0.5."""
    return float(np.mean((scores >= 0.5) != (others >= 0.5)))


def training_files(cfg: CfgNode) -> List[str]:
    """CALIBRATION_IMAGES files of DATASETS.TRAIN at even distances, or all where there are less."""
    records = get_multilabel_dicts(cfg.DATASETS.TRAIN)
    places = np.linspace(0, len(records) - 1, min(CALIBRATION_IMAGES, len(records))).astype(int)
    return [records[place]["file_name"] for place in places]


def run_serving(args) -> Iterator[Table]:
    """Time models on one core: in PyTorch, in ONNX Runtime, and there in int8.

    PyTorch's model is the predictor's, optimised, in float32, and in bfloat16 where the processor
    has instructions for it. A table of one image at a time: the latency's median and 99th
    percentile; one of batches of 16, in which a model with regions gets one image after the other
    from ONNX Runtime; and one from JPEGs to records. Batches are timed a tenth as often.

    Without --weights the weights are random. With them, there is a table of mAP on the checkpoint's
    DATASETS.TEST, and int8 is calibrated with 300 images of its DATASETS.TRAIN.
    """
    keep_freed_memory()
    if args.weights:
        cfg = MultiLabelPredictor(args.weights, device="cpu").cfg.clone()
        cfg.defrost()
        register_custom(cfg)
        calibration = training_files(cfg)
        yield from time_tables(args.weights, Path(args.weights).name, calibration, args.rounds)
        yield quality_table(args.weights, cfg, calibration)
        return
    networks = NETWORKS
    if args.config_file:
        size = args.size or setup_cfg(args.config_file, args.opts).INPUT.IMAGE_SIZE[0]
        networks = {Path(args.config_file).name: (Recipe(os.path.abspath(args.config_file)), size)}
    for name, (recipe, size) in networks.items():
        with TemporaryDirectory() as folder:
            weights = os.path.join(folder, "model.pth")
            save_checkpoint(weights, recipe, args.size or size, args.opts)
            yield from time_tables(weights, name, (), args.rounds)


SERVING_EXAMPLES = """
Examples:
  four networks with random weights:
    tools/benchmark.py serving
  a trained model, with its mAP:
    tools/benchmark.py serving --weights output/demo/model_best.pth
  a config, with random weights:
    tools/benchmark.py serving --config-file configs/COCO/ml_gcn_R_101.yaml --rounds 100
"""


def add_serving(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "serving",
        help="latency, images per second and mAP on one core, in float32, bf16 and int8",
        description=inspect.getdoc(run_serving) + "\n" + SERVING_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_serving, rounds=300, threads=1)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--weights", metavar="FILE", help="a checkpoint in place of the networks")
    model.add_argument("--config-file", metavar="FILE", help="a config in place of the networks")
    parser.add_argument("--size", type=positive, help="height and width of images in pixels")
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="config keys and values, of random weights"
    )
