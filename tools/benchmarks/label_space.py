"""The way from annotations to predictions, by the number of labels."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Dict, Iterator, List

import numpy as np
from PIL import Image
from tqdm import tqdm

from ia_gcn.errors import InputError

from .arguments import positive, positive_numbers
from .measuring import Table, describe_bytes, measure_command
from .networks import CONFIGS

ROOT = CONFIGS.parents[1]
# By the name of a row, in configs/COCO.
HEADS = {
    "linear, ASL": "asl_tresnet_m.yaml",
    "ML-Decoder": "ml_decoder_tresnet_m.yaml",
    "CSRA": "csra_R_101.yaml",
    "ML-GCN": "ml_gcn_R_101.yaml",
}
# Labels that people were asked about, in each image: half of them are present.
ASKED = 20
# The part of the images that is evaluated and predicted, after the training images.
EVALUATED = 1 / 4


def write_data(root: Path, num_labels: int, num_images: int, size: int) -> None:
    """Images of noise with labels in Open Images' own form; a label's frequency falls as 1 / rank.

    Args:
        root: where data sets live.
        size: of the images, in pixels.
    """
    folder = root / "open_images"
    mids = [f"/m/{number:06x}" for number in range(num_labels)]
    frequency = 1 / np.arange(1, num_labels + 1)
    frequency /= frequency.sum()
    random = np.random.RandomState(0)
    names = [f"{i:016x}" for i in range(num_images)]
    num_train = num_images - round(EVALUATED * num_images)
    for split, images in (("train", names[:num_train]), ("validation", names[num_train:])):
        (folder / split).mkdir(parents=True)
        table = folder / f"oidv7-{split}-annotations-human-imagelabels.csv"
        with open(table, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["ImageID", "Source", "LabelName", "Confidence"])
            for name in images:
                pixels = random.randint(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{name}.jpg")
                asked = np.unique(random.choice(num_labels, ASKED, p=frequency))
                present = random.randint(0, 2, len(asked))
                rows.writerows(
                    [name, "verification", mids[label], there]
                    for label, there in zip(asked, present)
                )
    (folder / "oidv7-classes-trainable.txt").write_text("".join(f"{mid}\n" for mid in mids))
    with open(folder / "oidv7-class-descriptions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["LabelName", "DisplayName"])
        rows.writerows([mid, f"Label number {number}"] for number, mid in enumerate(mids))


class Way:
    """The commands of a user with so many labels, each a process of its own."""

    def __init__(self, root: Path, num_labels: int, args):
        self.root, self.num_labels, self.args = root, num_labels, args
        self.rows: List[Dict] = []
        write_data(root, num_labels, args.images, args.size)

    def run(self, name: str, script: str, *options) -> Dict:
        """Measure a command, as a row of the table, which is returned."""
        found = measure_command(
            self.args.threads,
            [sys.executable, "-W", "ignore", str(ROOT / script), *map(str, options)],
            self.args.limit,
            DETECTRON2_DATASETS=str(self.root),
        )
        row = {"name": name, **found}
        self.rows.append(row)
        return row

    def prepare(self) -> None:
        """The data set, before any head."""
        self.run("prepare_open_images.py", "datasets/prepare_open_images.py")
        output = ["--output", self.root / "inspect"]
        self.run("inspect_dataset.py", "tools/inspect_dataset.py", "open_images_train", *output)

    def go(self, head: str) -> None:
        """From training to predictions, by a head; what comes after a failure is left out."""
        output = self.root / head
        weights, exported = output / "model_final.pth", output / "model.onnx"
        options = ["--config-file", CONFIGS / HEADS[head], *self.opts(output), *self.args.opts]
        row = self.run(f"{head}: training", "tools/train_net.py", *options)
        if "not_run" in row:
            return
        row.update(seconds_of_steps(output / "metrics.json"))
        row.update(sizes(weights, output / "log.txt"))
        evaluation = ["--eval-only", *options, "MODEL.WEIGHTS", weights]
        row = self.run(f"{head}: evaluation", "tools/train_net.py", *evaluation)
        results = output / "inference/open_images_val"
        row.update(
            sizes(results / "predictions.npz", results / "metrics.json", results / "report.html")
        )
        export = ["--weights", weights, "--format", "onnx", "--output", exported]
        row = self.run(f"{head}: export", "tools/export_model.py", *export)
        row.update(sizes(exported))
        images = self.root / "open_images/validation"
        for what, file in (("prediction", weights), ("prediction, ONNX", exported)):
            self.run(
                f"{head}: {what}",
                *("tools/predict.py", "--weights", file, images, "--top-k", 10),
                *("--output", output / "predictions.jsonl"),
            )

    def opts(self, output: Path) -> List:
        """Config keys and values of a small network on small images, on the CPU."""
        args = self.args
        return [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", output),
            *("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet10t"),
            *("MODEL.TIMM.PRETRAINED", False, "MODEL.LABEL_EMBEDDINGS.SOURCE", "names"),
            *("MODEL.LABEL_HEAD.NUM_LABELS", self.num_labels),
            *("DATASETS.TRAIN", "('open_images_train',)", "DATASETS.TEST", "('open_images_val',)"),
            *("DATALOADER.NUM_WORKERS", 0, "INPUT.IMAGE_SIZE", f"({args.size}, {args.size})"),
            *("SOLVER.IMS_PER_BATCH", args.batch, "SOLVER.MAX_EPOCHS", 0),
            *("SOLVER.MAX_ITER", args.steps, "SOLVER.STEP_EPOCHS", "()", "SOLVER.WARMUP_ITERS", 0),
            *("SOLVER.CHECKPOINT_EPOCHS", 0, "TEST.EVAL_EPOCHS", 0),
        ]


def sizes(*files: Path) -> Dict[str, str]:
    """The sizes of those files that there are, as cells of a row, by the columns' names."""
    return {file.name: describe_bytes(os.path.getsize(file)) for file in files if file.exists()}


def seconds_of_steps(log: Path) -> Dict[str, str]:
    """The median time of a training step, from a run's metrics.json."""
    lines = map(json.loads, log.read_text().splitlines())
    times = [line["time"] for line in lines if "time" in line]
    return {"s of a step": f"{median(times):.3g}"} if times else {}


# ----------------------------------------------------------------------------------- command line


def run_label_space(args) -> Iterator[Table]:
    """Time and memory of all that a user does, by the number of labels.

    Synthetic images in Open Images' own form are prepared and looked at. With each head, a small
    network is trained for some steps and evaluated once, evaluated again, exported to ONNX, and
    predicts images, by PyTorch and by ONNX Runtime. Each is a command in a process of its own: what
    Python and the libraries take is part of it, and the first row. The CPU time depends less on
    what else the machine does.
    """
    names = args.only.split(";") if args.only else list(HEADS)
    unknown = [name for name in names if name not in HEADS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: must be of {'; '.join(HEADS)}")
    for num_labels in args.labels:
        with TemporaryDirectory(dir=args.folder) as folder:
            way = Way(Path(folder), num_labels, args)
            way.run("Python and the libraries alone", "tools/train_net.py", "--help")
            way.prepare()
            for name in tqdm(names, f"{num_labels} labels", leave=False, disable=None):
                way.go(name)
            yield Table(f"{num_labels:,} labels", way.rows)


def add_label_space(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "label-space",
        help="all that a user does, by the number of labels",
        description=inspect.getdoc(run_label_space),
        epilog=LABEL_SPACE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_label_space)
    parser.add_argument(
        "--labels",
        metavar="C,...",
        type=positive_numbers,
        default=[80, 500, 9605, 50_000],
        help="numbers of labels (default 80,500,9605,50000)",
    )
    parser.add_argument(
        "--only", metavar="NAME;...", help=f"heads: of {'; '.join(HEADS)} (default all)"
    )
    parser.add_argument(
        "--images", type=positive, default=320, help="of which a quarter is evaluated (default 320)"
    )
    parser.add_argument("--size", type=positive, default=64, help="in pixels (default 64)")
    parser.add_argument("--batch", type=positive, default=16, help="images in a step (default 16)")
    parser.add_argument("--steps", type=positive, default=20, help="of training (default 20)")
    parser.add_argument(
        "--limit",
        metavar="SECONDS",
        type=positive,
        default=3600,
        help="for each command; one that takes longer is ended (default 3600)",
    )
    parser.add_argument("--folder", help="for the files (default: of temporary ones)")
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")


LABEL_SPACE_EXAMPLES = """
Examples:
  the labels of Open Images, with two heads:
    tools/benchmark.py label-space --labels 9605 --only "linear, ASL;ML-Decoder"
"""
