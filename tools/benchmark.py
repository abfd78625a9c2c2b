#!/usr/bin/env python3
"""Measure what the parts of ia_gcn cost, on this machine's CPU.

Everything compared is run in turn, A, B, C, A, B, C, ..., after a round that isn't counted, so that
what else the machine does falls on all alike. The tables are Markdown: median, shortest and longest
time, and the ratio of the medians to the first row's.

Examples:
  all comparisons of models and label graphs (minutes):
    tools/benchmark.py model
  data loading (a minute):
    tools/benchmark.py loading
  what a subcommand takes:
    tools/benchmark.py model --help
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import platform
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Iterator, List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from sklearn.datasets import load_sample_images
from tabulate import tabulate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import pil_loader
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

from ia_gcn.data import MultiLabelDatasetMapper
from ia_gcn.data.build import TrainingSamples
from ia_gcn.data.dataset_mapper import read_picture
from ia_gcn.data.samplers import mix_seeds
from ia_gcn.engine import Trainer, label_graphs, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.modeling import GCNHead, LabelGraph, optimize_for_inference

# ------------------------------------------------------------------------- measuring and reporting


class Table(NamedTuple):
    title: str
    rows: List[Dict]
    """Each with a name, and of the keys of COLUMNS those that were measured."""
    note: str = ""


def measure(calls: Dict[str, Callable], rounds: int, what: str) -> Dict[str, List[float]]:
    """Seconds of each call, by name: `rounds` times each in turn, after a round for warming up."""
    seconds = {name: [] for name in calls}
    # Without a terminal, no bar.
    total = (rounds + 1) * len(calls)
    with tqdm(total=total, desc=what, leave=False, disable=None) as progress:
        for number in range(rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if number > 0:
                    seconds[name].append(elapsed)
                progress.update()
    return seconds


def timed_rows(seconds: Dict[str, List[float]]) -> List[Dict]:
    """The rows of a table of times, whose ratios are to the first."""
    medians = {name: median(values) for name, values in seconds.items()}
    return [
        {
            "name": name,
            "median_s": medians[name],
            "min_s": min(values),
            "max_s": max(values),
            "ratio": medians[name] / next(iter(medians.values())),
        }
        for name, values in seconds.items()
    ]


# By the key of a row: what stands above its column, and in its cells.
COLUMNS: Dict[str, tuple] = {
    "name": ("", lambda row: row["name"]),
    "not_run": ("not run", lambda row: row["not_run"]),
    "median_s": ("median s", lambda row: f"{row['median_s']:.3g}"),
    "min_s": ("min–max s", lambda row: f"{row['min_s']:.3g}–{row['max_s']:.3g}"),
    "ratio": ("ratio", lambda row: f"{row['ratio']:.2f}"),
    "regions": (
        "regions per image",
        lambda row: "–".join(str(count) for count in sorted(set(row["regions"]))),
    ),
    "logit_deviation": ("deviation of logits", lambda row: f"{row['logit_deviation']:.2g}"),
    "max_difference": ("max difference of logits", lambda row: f"{row['max_difference']:.1e}"),
    "step_bytes": ("memory of the step", lambda row: describe_bytes(row["step_bytes"])),
    "peak_bytes": ("peak of the process", lambda row: describe_bytes(row["peak_bytes"])),
    "per_second": ("pictures/s", lambda row: f"{row['per_second']:.0f}"),
    "min_per_second": (
        "min–max pictures/s",
        lambda row: f"{row['min_per_second']:.0f}–{row['max_per_second']:.0f}",
    ),
    "speed": ("times as many", lambda row: f"{row['speed']:.2f}"),
    "level_difference": ("max difference of 0–255", lambda row: f"{row['level_difference']}"),
    "differing_share": ("values that differ", lambda row: f"{row['differing_share']:.3%}"),
}


def describe_bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def markdown(table: Table) -> str:
    columns = {key: column for key, column in COLUMNS.items() if any(key in r for r in table.rows)}
    cells = [
        [cell(row) if key in row else "–" for key, (_, cell) in columns.items()]
        for row in table.rows
    ]
    align = ["left" if key in ("name", "not_run") else "right" for key in columns]
    headers = [header for header, _ in columns.values()]
    grid = tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=align)
    return "\n\n".join(filter(None, [f"### {table.title}", grid, table.note]))


def describe_machine() -> Dict:
    """What the times depend on; nothing that says whose machine it is."""
    return {
        "cpu": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------- networks

CONFIGS = Path(__file__).parent.parent / "configs" / "COCO"

# By the name of a row: the config file, and what is set beside it.
RECOGNISERS = {
    "LinearHead": ("resnet101.yaml",),
    "ML-GCN": ("ml_gcn_R_101.yaml",),
    "IA-GCN": ("ia_gcn_R_101.yaml",),
    "IA-GCN, the zoo's RPN head": ("ia_gcn_R_101.yaml", "MODEL.RPN.CONV_DIMS", "[-1]"),
    "IA-GCN, res5 on every region": (
        "ia_gcn_R_101.yaml",
        *("MODEL.REGION_BRANCH.RES5", "True"),
        *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14"),
        *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0"),
    ),
}

BOXES_PER_PICTURE = 7


def compare_inference(args) -> List[Table]:
    """A forward pass in evaluation, of each of RECOGNISERS."""
    return [time_recognisers(args, "Inference", lambda cfg, *run: partial(infer, *run))]


def compare_training(args) -> List[Table]:
    """A training step of each of RECOGNISERS, whose RPNs are trained along."""

    def prepare(cfg, model, batch):
        return partial(train_step, model.train(), Trainer.build_optimizer(cfg, model), batch)

    return [time_recognisers(args, "Training step", prepare)]


def time_recognisers(args, what: str, prepare: Callable) -> Table:
    """The times of what `prepare(cfg, model, batch)` returns for each of RECOGNISERS."""
    calls, regions = {}, {}
    for name in tqdm(RECOGNISERS, "networks", leave=False, disable=None):
        cfg, model, batch = build_recogniser(name, args)
        calls[name] = prepare(cfg, model, batch)
        regions[name] = watch_regions(model)
    rows = timed_rows(measure(calls, args.rounds, what))
    for row in rows:
        counts = regions[row["name"]]
        if counts:
            row["regions"] = [min(counts), max(counts)]
    return Table(heading(what, cfg, args), rows)


def compare_optimized(args) -> List[Table]:
    """A forward pass of networks as they are trained, and after optimize_for_inference."""
    calls, logits, titles = {}, {}, {}
    for network in ("LinearHead", "IA-GCN"):
        cfg, model, batch = build_recogniser(network, args)
        optimized = optimize_for_inference(copy.deepcopy(model))
        for name, form in ((network, model), (f"{network}, optimised", optimized)):
            calls[name] = partial(infer, form, batch)
            logits[name] = infer(form, batch)
        titles[network] = heading(f"Optimised inference of {network}", cfg, args)
    seconds = measure(calls, args.rounds, "Optimised inference")
    return [optimized_table(network, title, seconds, logits) for network, title in titles.items()]


def optimized_table(network: str, title: str, seconds, logits) -> Table:
    names = [network, f"{network}, optimised"]
    rows = timed_rows({name: seconds[name] for name in names})
    for row, name in zip(rows, names):
        row["logit_deviation"] = logits[name].std().item()
    rows[1]["max_difference"] = (logits[names[1]] - logits[names[0]]).abs().max().item()
    return Table(title, rows)


def heading(what: str, cfg: CfgNode, args) -> str:
    return (
        f"{what}: ResNet-{cfg.MODEL.RESNETS.DEPTH}, {args.batch} × {args.size}×{args.size} pixels"
    )


def build_recogniser(name: str, args):
    """The config, the model in evaluation mode, of random weights, and a batch for it."""
    config_file, *opts = RECOGNISERS[name]
    # A row is what its name says, whatever else is set.
    opts = [*args.opts, *opts, "MODEL.DEVICE", "cpu"]
    # So low that the weights stay what they are: their values make no difference to the times.
    opts += ["SOLVER.BASE_LR", "1e-9"]
    cfg = setup_cfg(str(CONFIGS / config_file), opts)
    batch = random_batch(args.batch, args.size, cfg.MODEL.LABEL_HEAD.NUM_LABELS)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    for graph in label_graphs(model):
        fill_sparsely(graph)
    calibrate(model, batch)
    if not infer(model, batch).isfinite().all():
        raise InputError(f"{name}: the logits of a network of random weights are not finite")
    return cfg, model, batch


def random_batch(batch: int, size: int, num_labels: int) -> List[Dict]:
    """What `MultiLabelRecognizer` takes: pictures of noise, with labels and boxes."""
    generator = torch.Generator().manual_seed(0)
    uniform = partial(torch.rand, generator=generator)
    inputs = []
    for _ in range(batch):
        sides = size * (0.1 + 0.4 * uniform(BOXES_PER_PICTURE, 2))
        corners = (size - sides) * uniform(BOXES_PER_PICTURE, 2)
        boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        inputs.append(
            {
                "image": (256 * uniform(3, size, size)).to(torch.uint8),
                "labels": (uniform(num_labels) < 0.04).float(),
                "instances": Instances((size, size), gt_boxes=boxes),
            }
        )
    return inputs


@torch.no_grad()
def calibrate(model: nn.Module, batch: List[Dict]) -> None:
    """Make a network of random weights behave like a trained one, and put it in evaluation mode.

    As it starts out, its activations overflow, and rounding errors grow 10⁴-fold on their way
    through a hundred layers; a trained block changes little of what it is added to.
    """
    for module in model.eval().modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.2)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(batch)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum


def watch_regions(model: nn.Module) -> set:
    """A set into which goes how many proposals any image gets from now on."""
    counts = set()
    if hasattr(model, "proposal_generator"):
        model.proposal_generator.register_forward_hook(
            lambda module, inputs, outputs: counts.update(map(len, outputs[0]))
        )
    return counts


@torch.no_grad()
def infer(model: nn.Module, batch: List[Dict]) -> torch.Tensor:
    """Logits, (B, C)."""
    return torch.stack([output["logits"] for output in model(batch)])


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: List[Dict]) -> None:
    with EventStorage():
        loss = sum(model(batch).values())
    if not loss.isfinite():
        raise FloatingPointError("the loss of a training step is not finite")
    loss.backward()
    optimizer.step()
    # Now rather than before the next step: that is another network's.
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------ label graph

GRAPH_BATCH = 8
EMBEDDING_DIM = 300
HIDDEN_DIMS = (512, 1024)
FEATURE_DIM = 2048
# Share of the memory available that a step may take.
MEMORY_SHARE = 0.6


class GraphProblem(NamedTuple):
    head: GCNHead
    x: torch.Tensor
    """(B, D)"""
    presence: torch.Tensor
    """a, (B, C) in (0, 1)"""


def compare_label_graph(args) -> Iterator[Table]:
    """IA-GCN's global branch without its network, for each number of labels."""
    for num_labels in args.labels:
        yield time_label_graph(num_labels, args)


def time_label_graph(num_labels: int, args) -> Table:
    """Forward and backward pass of FORMS: their times here, their memory in a process each."""
    memory, not_run = {}, {}
    for form in FORMS:
        refusal = refuse(estimate_bytes(form, num_labels), available_memory())
        try:
            if refusal is None:
                memory[form] = in_new_process(peak_memory, form, num_labels, args.threads)
        except BrokenProcessPool:
            refusal = "the process was killed; out of memory?"
        if refusal is not None:
            not_run[form] = refusal
    note, seconds = "", {}
    if memory:
        problem = make_graph_problem(num_labels)
        calls = {form: partial(graph_step, form, problem) for form in memory}
        seconds = measure(calls, args.rounds, f"label graph, {num_labels} labels")
        if not not_run:
            note = compare_logits(problem)
    rows = [{**row, **memory[row["name"]]} for row in timed_rows(seconds)]
    rows += [{"name": form, "not_run": why} for form, why in not_run.items()]
    title = f"Label graph alone, forward and backward: {num_labels} labels, {GRAPH_BATCH} images"
    return Table(title, rows, note)


def make_graph_problem(num_labels: int) -> GraphProblem:
    torch.manual_seed(0)
    graph = LabelGraph(num_labels, EMBEDDING_DIM, threshold=0.4, reweight=0.25)
    fill_sparsely(graph)
    head = GCNHead(
        feature_dim=FEATURE_DIM, label_graph=graph, hidden_dims=HIDDEN_DIMS, negative_slope=0.0
    )
    # Both have a gradient, as they come from the backbone and from the region branch.
    x = torch.randn(GRAPH_BATCH, FEATURE_DIM, requires_grad=True)
    presence = torch.rand(GRAPH_BATCH, num_labels, requires_grad=True)
    return GraphProblem(head, x, presence)


@torch.no_grad()
def fill_sparsely(graph: LabelGraph, partners: int = 3) -> None:
    """Give a graph statistics of labels that go with a few others each, about 2 × `partners`."""
    num_labels = len(graph.label_counts)
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(num_labels).repeat_interleave(partners)
    j = torch.randint(num_labels, i.shape, generator=generator)
    pair_counts = torch.ones_like(graph.pair_counts)
    pair_counts[i, j] = pair_counts[j, i] = 50
    pair_counts.fill_diagonal_(100)
    graph.fill(torch.full((num_labels,), 100), pair_counts, graph.embeddings)


def rank_one_logits(problem: GraphProblem) -> torch.Tensor:
    """(B, C), as GCNHead has it: nothing of B×C×C, and no classifiers."""
    return problem.head(problem.x, problem.presence)


def dense_logits(problem: GraphProblem) -> torch.Tensor:
    """(B, C), as IA-GCN Eq. 1-6 are written: an LCM per image, and its classifiers M."""
    head, x, presence = problem
    individual = presence[:, :, None] * presence[:, None, :]
    fused = head.label_graph.lcm * individual
    scale = fused.sum(dim=2).rsqrt()
    normalized = scale[:, :, None] * fused.mT * scale[:, None, :]
    nodes = head.label_graph.embeddings
    for layer in head.layers[:-1]:
        nodes = F.leaky_relu(normalized @ (nodes @ layer.weight), head.negative_slope)
    classifiers = normalized @ (nodes @ head.layers[-1].weight)
    return (classifiers @ x[:, :, None])[:, :, 0]


FORMS = {
    "rank one (GCNHead)": rank_one_logits,
    "dense, an LCM per image": dense_logits,
}


def graph_step(form: str, problem: GraphProblem) -> None:
    FORMS[form](problem).sum().backward()
    problem.head.zero_grad()
    problem.x.grad = problem.presence.grad = None


@torch.no_grad()
def compare_logits(problem: GraphProblem) -> str:
    expected, found = (logits(problem) for logits in FORMS.values())
    difference = (expected - found).abs().max()
    return f"Largest logit {expected.abs().max():.2g}, largest difference {difference:.1e}."


def estimate_bytes(form: str, num_labels: int) -> int:
    """About what a step and its label graph take at their peak, in bytes, beyond Python and torch.

    These are the tensors that are there at once when most are, in the middle of the backward pass.
    """
    # int32 pair counts and float32 LCM.
    graph = (4 + 4) * num_labels**2
    per_node = 4 * GRAPH_BATCH * num_labels
    first, second = HIDDEN_DIMS
    if FORMS[form] is rank_one_logits:
        return graph + per_node * (2 * first + 3 * second)
    # A_F, its two products with D^-½, a transposed copy, and the gradients of two layers; with few
    # labels, the classifiers, their product with W and a gradient.
    return graph + per_node * (6 * num_labels + 4 * FEATURE_DIM)


def refuse(needed: int, available: float) -> str | None:
    """Why a step isn't run that takes `needed` bytes where `available` are; None if it is."""
    if needed <= MEMORY_SHARE * available:
        return None
    return (
        f"would take about {describe_bytes(needed)}, more than {MEMORY_SHARE:.0%} of the "
        f"{describe_bytes(available)} available"
    )


def available_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system doesn't say."""
    return read_bytes("/proc/meminfo", "MemAvailable") or float("inf")


def read_bytes(path: str, key: str) -> int | None:
    """What the line `key: n kB` of one of Linux's status files says; None on another system."""
    if not os.path.exists(path):
        return None
    lines = Path(path).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def in_new_process(function: Callable, *args):
    """function(*args) in a process that has imported this file and done nothing else."""
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(form: str, num_labels: int, threads: int) -> Dict:
    """What a step takes in this process, in bytes; nothing where the system doesn't say.

    Returns:
        step_bytes: resident at the peak beyond what was before the step;
        peak_bytes: resident at the peak in all: Python, torch, the label graph and the step.
    """
    torch.set_num_threads(threads)
    # What libraries take once, whatever the size, is none of the step's.
    graph_step(form, make_graph_problem(8))
    problem = make_graph_problem(num_labels)
    before = read_bytes("/proc/self/status", "VmRSS")
    if before is None:
        return {}
    forget_peak()
    graph_step(form, problem)
    peak = read_bytes("/proc/self/status", "VmHWM")
    return {"step_bytes": peak - before, "peak_bytes": peak}


def forget_peak() -> None:
    """Let the peak of this process's memory, VmHWM, start anew from what it has now."""
    # Where that isn't allowed, what is measured is an upper bound.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------ data loading

# Height and width of COCO's commonest pictures.
PHOTO_SIZES = ((480, 640), (640, 480), (427, 640), (640, 427))
# With it, the photos below have about the bytes of COCO's.
JPEG_QUALITY = 95


class Place(NamedTuple):
    """What is seen of a picture: top, left, height and width in pixels, and whether mirrored."""

    box: tuple
    flip: bool


class Pictures(Dataset):
    """(view, labels) of each file, as torchvision's users write it."""

    def __init__(self, view: Callable, files: List[str], places: List[Place], num_labels: int):
        """
        Args:
            view: file and place to a (3, H, W) tensor.
        """
        self.view, self.files, self.places = view, files, places
        self.labels = torch.zeros(num_labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        return self.view(self.files[index], self.places[index]), self.labels


def compare_loading(cfg: CfgNode, is_train: bool, files: List[str], args) -> Table:
    """From files to batches (B, 3, H, W), through data loaders without worker processes."""
    mapper = MultiLabelDatasetMapper(cfg, is_train=is_train)
    records = [{"file_name": file, "image_id": i, "labels": []} for i, file in enumerate(files)]
    samples = TrainingSamples(records, mapper, seed=0)
    places = [find_place(mapper, i, file) for i, file in enumerate(files)]
    loader = partial(DataLoader, batch_size=args.batch)
    # The place in the stream decides over crop and flip; of the test view, over nothing.
    batches = {OWN: loader(samples, sampler=[(i, i) for i in range(len(files))], collate_fn=stack)}
    for name, view in torchvision_views(tuple(cfg.INPUT.IMAGE_SIZE), cfg).items():
        batches[name] = loader(Pictures(view, files, places, mapper.num_labels))

    names = [PEER, *(name for name in batches if name != PEER)]
    # A deque of no length keeps nothing of what it is given.
    calls = {name: partial(deque, batches[name], 0) for name in names}
    calls["pil_loader alone: decoding"] = lambda: [pil_loader(file) for file in files]
    title = "Training view" if is_train else "Test view"
    rows = rate_rows(measure(calls, args.rounds, title), len(files))
    expected = torch.cat([images for images, _ in batches[PEER]])
    for row in rows[1:]:
        images = [images for images, _ in batches.get(row["name"], ())]
        if images and images[0].dtype == torch.uint8:
            difference = (torch.cat(images).int() - expected).abs()
            row["level_difference"] = difference.max().item()
            row["differing_share"] = (difference > 0).float().mean().item()
    height, width = cfg.INPUT.IMAGE_SIZE
    kilobytes = sum(os.path.getsize(file) for file in files) / len(files) / 1e3
    return Table(
        f"{title}: to {height}×{width} pixels, in batches of {args.batch}, one process",
        rows,
        f"{len(files)} JPEGs of about 640×480 pixels and {kilobytes:.0f} kB.",
    )


OWN = "ia_gcn"
PEER = "torchvision on Pillow images, uint8"


def torchvision_views(size: tuple, cfg: CfgNode) -> Dict[str, Callable]:
    """By the name of a row: from a file and a `Place` to a tensor of this height and width."""
    crop = partial(vision.resized_crop, size=size, antialias=True)
    mean = [value / 255 for value in cfg.MODEL.PIXEL_MEAN]
    deviation = [value / 255 for value in cfg.MODEL.PIXEL_STD]

    def view(image, place: Place):
        image = crop(image, *place.box)
        return vision.horizontal_flip(image) if place.flip else image

    def of_pillow(file: str, place: Place) -> torch.Tensor:
        return vision.pil_to_tensor(view(pil_loader(file), place))

    def of_floats(file: str, place: Place) -> torch.Tensor:
        image = vision.to_dtype(of_pillow(file, place), torch.float32, scale=True)
        return vision.normalize(image, mean, deviation)

    def of_tensors(file: str, place: Place) -> torch.Tensor:
        content = torchvision.io.read_file(file)
        return view(torchvision.io.decode_jpeg(content, ImageReadMode.RGB), place)

    return {
        PEER: of_pillow,
        "the same, float32 and normalised": of_floats,
        "torchvision on tensors, uint8": of_tensors,
    }


def find_place(mapper: MultiLabelDatasetMapper, index: int, file: str) -> Place:
    """What `mapper` shows of the picture that is number `index` in the stream of seed 0."""
    image = read_picture(file)
    np.random.seed(mix_seeds(0, index))
    transforms = mapper.augmentations(T.AugInput(image)).transforms
    box = (0, 0, *image.shape[:2])
    for transform in transforms:
        if isinstance(transform, T.CropTransform):
            box = (transform.y0, transform.x0, transform.h, transform.w)
    return Place(box, any(isinstance(t, T.HFlipTransform) for t in transforms))


def stack(samples: List[Dict]) -> tuple:
    """(B, 3, H, W) and (B, C); the model does it itself, after it has normalised the images."""
    return tuple(torch.stack([sample[key] for sample in samples]) for key in ("image", "labels"))


def rate_rows(seconds: Dict[str, List[float]], pictures: int) -> List[Dict]:
    """The rows of a table of pictures per second, compared with the first's."""
    rows = timed_rows(seconds)
    return [
        {
            "name": row["name"],
            "per_second": pictures / row["median_s"],
            "min_per_second": pictures / row["max_s"],
            "max_per_second": pictures / row["min_s"],
            "speed": 1 / row["ratio"],
        }
        for row in rows
    ]


def write_photos(folder: Path, number: int) -> List[str]:
    """Write JPEGs of COCO's sizes, mixed of pieces of scikit-learn's two photos; their paths."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for i in range(number):
        height, width = PHOTO_SIZES[i % len(PHOTO_SIZES)]
        pieces = []
        for photo in photos:
            share = rng.uniform(0.7, 1)
            w, h = round(share * photo.width), round(share * photo.height)
            left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
            piece = photo.crop((left, top, left + w, top + h))
            pieces.append(piece.resize((width, height), Image.BICUBIC))
        files.append(str(folder / f"{i:05}.jpg"))
        Image.blend(*pieces, rng.uniform(0, 0.5)).save(files[-1], quality=JPEG_QUALITY)
    return files


def run_loading(args) -> Iterator[Table]:
    """Count the pictures per second and core that are decoded, cropped and collated to batches.

    ia_gcn's data loading, and torchvision's of the same pieces of the same JPEGs:
    on Pillow images, to uint8 and to normalised floats, and on tensors. Training view, which is
    cropped and mirrored, and test view, which is not. What is counted are pictures of one process;
    pixels are compared with the first row's.
    """
    cfg = setup_cfg(str(CONFIGS / "resnet101.yaml"), ["INPUT.IMAGE_SIZE", [args.size, args.size]])
    with TemporaryDirectory() as folder:
        files = write_photos(Path(folder), args.pictures)
        for is_train in (True, False):
            yield compare_loading(cfg, is_train, files, args)


def add_loading(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "loading",
        help="decoding, cropping and collating of pictures",
        description=inspect.getdoc(run_loading),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    # Pictures per core are those of one thread.
    parser.set_defaults(run=run_loading, threads=1)
    parser.add_argument(
        "--pictures", type=positive, default=64, help="how many each round loads (default 64)"
    )
    parser.add_argument(
        "--batch", type=positive, default=16, help="pictures in a batch (default 16)"
    )
    parser.add_argument(
        "--size", type=positive, default=448, help="a view's height and width (default 448)"
    )


# ----------------------------------------------------------------------------------- command line

COMPARISONS = {
    "inference": compare_inference,
    "training": compare_training,
    "optimized": compare_optimized,
    "label-graph": compare_label_graph,
}


def run_model(args) -> Iterator[Table]:
    """Time recognisers and the label graph, on pictures, weights and label statistics of chance.

    inference    a forward pass: linear head, ML-GCN, IA-GCN and two dearer ways to its regions
    training     a training step of the same, forward, backward and optimizer
    optimized    a forward pass before and after ia_gcn.modeling.optimize_for_inference
    label-graph  IA-GCN's label graph alone, as it is computed here and as its paper writes it,
                 forward and backward: time, and memory of each in a process of its own
    """
    names = args.only.split(",")
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: must be of {', '.join(COMPARISONS)}")
    if args.size < 64:
        raise InputError(f"--size {args.size}: batch norms need 64 or more")
    for name in names:
        yield from COMPARISONS[name](args)


def add_model(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "model",
        help="recognisers and label graphs",
        description=inspect.getdoc(run_model),
        epilog=MODEL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_model)
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=",".join(COMPARISONS),
        help="comparisons to run (default all)",
    )
    parser.add_argument("--batch", type=positive, default=4, help="pictures in a batch (default 4)")
    parser.add_argument(
        "--size", type=positive, default=448, help="their height and width in pixels (default 448)"
    )
    parser.add_argument(
        "--labels",
        metavar="C,...",
        type=positive_numbers,
        default=[80, 500, 9605],
        help="of label-graph: the numbers of labels (default 80,500,9605)",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="config keys and values, for all networks"
    )


MODEL_EXAMPLES = """
Examples:
  the times of a forward pass, on 8 threads:
    tools/benchmark.py model --only inference --threads 8
  one picture at a time, with a smaller network:
    tools/benchmark.py model --batch 1 MODEL.RESNETS.DEPTH 50
  the label graph with 2000 labels:
    tools/benchmark.py model --only label-graph --labels 2000
"""


def positive(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def positive_numbers(text: str) -> List[int]:
    """An argparse type: numbers with commas between them."""
    return [positive(number) for number in text.split(",")]


def common_options() -> argparse.ArgumentParser:
    """What every subcommand takes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--rounds", type=positive, default=5, help="how often each is timed (default 5)"
    )
    parser.add_argument(
        "--threads", type=positive, default=2, help="of torch (default %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the tables as JSON, too")
    return parser


def report(args) -> None:
    """Print the tables of `args.run` as they come; in the end, write them to --output."""
    torch.set_num_threads(args.threads)
    settings = {
        key: value for key, value in vars(args).items() if key not in ("run", "output", "threads")
    }
    document = {"machine": describe_machine(), "settings": settings, "tables": []}
    if args.output:
        # What can't be written is said before the hours of measuring.
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "a"):
            pass
    for name in ("machine", "settings"):
        print(f"{name}: {describe_settings(document[name])}", end="\n\n", flush=True)
    for table in args.run(args):
        print(markdown(table), end="\n\n", flush=True)
        document["tables"].append(table._asdict())
    if args.output:
        text = json.dumps(document, indent=1, ensure_ascii=False)
        Path(args.output).write_text(text + "\n", encoding="utf-8")


def describe_settings(settings: Dict) -> str:
    """What is set, in a line."""
    texts = {
        key: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in settings.items()
    }
    return ", ".join(f"{key} {text}" for key, text in texts.items() if text)


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(metavar="WHAT", required=True)
    for add in (add_model, add_loading):
        add(subcommands, common_options())
    args = parser.parse_args()
    try:
        report(args)
    except (InputError, FloatingPointError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
