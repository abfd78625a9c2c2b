"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile

# One thread a worker, and a process that a test starts; read when PyTorch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# A font list that matplotlib made elsewhere may lack fonts, of which it then warns. Workers and
# processes that tests start inherit this one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _matplotlib = tempfile.TemporaryDirectory(prefix="ia_gcn_matplotlib_")
    os.environ["MPLCONFIGDIR"] = _matplotlib.name

import io
import json
import signal
import sys
from pathlib import Path
from typing import List, NamedTuple

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, settings
from PIL import Image

from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError
from tests.helpers.commands import ROOT, load_command, own_log_handlers
from tests.helpers.models import NARROW

# A shell's background and nohup have them ignored, and so would be what tests start.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# On shared cores, how long an example takes says nothing about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what tests/gpu runs on (default cuda); cpu: to try these tests without a GPU",
    )


class TinyCoco(NamedTuple):
    """Where a data set was written; `label_names` is in the order of its category ids."""

    json_file: str
    image_root: str
    label_names: List[str]


@pytest.fixture
def tiny_coco(tmp_path):
    """A function that writes a small data set in COCO's format and returns a `TinyCoco`.

    tiny_coco(n, folder="tiny") makes n grey PNGs of 32×24 pixels, 000001.png and so on, with image
    ids from 1. Each shows one to three rectangles, red, green or blue, which are its labels and
    boxes; over 7 images, every combination of labels occurs once. So the labels can be learned.
    """

    def write(n: int, folder: str = "tiny") -> TinyCoco:
        return write_tiny_coco(tmp_path / folder, n)

    return write


def write_tiny_coco(root: Path, n: int) -> TinyCoco:
    """What `tiny_coco` calls, for fixtures of a wider scope."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for image_id in range(1, n + 1):
        pixels = np.full((24, 32, 3), 128, np.uint8)
        for category_id, colour in enumerate(COLOURS.values(), start=1):
            if not (image_id % 7 + 1) >> (category_id - 1) & 1:
                continue
            # A third of the width each, so that no rectangle covers another.
            width, height = rng.integers(4, 9), rng.integers(4, 15)
            x, y = 10 * (category_id - 1) + rng.integers(0, 3), rng.integers(0, 10)
            pixels[y : y + height, x : x + width] = colour
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [int(x), int(y), int(width), int(height)],
                    "area": int(width * height),
                    "iscrowd": 0,
                }
            )
        name = f"{image_id:06d}.png"
        Image.fromarray(pixels).save(root / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": 32, "height": 24})
    categories = [{"id": i, "name": name} for i, name in enumerate(COLOURS, start=1)]
    json_file = root / "annotations.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file.write_text(json.dumps(content))
    return TinyCoco(str(json_file), str(root / "images"), list(COLOURS))


@pytest.fixture
def make_cfg(tiny_coco, repository, monkeypatch, tmp_path):
    """A function that makes the config of a short run of a narrow network on 14 tiny images.

    Crops and flips are on.
    """
    monkeypatch.chdir(repository)
    data = tiny_coco(14)

    def make(name, *opts, config="ml_gcn"):
        options = {
            "MODEL.DEVICE": "cpu",
            **NARROW,
            "DATASETS.CUSTOM.TRAIN": data.json_file,
            "DATASETS.CUSTOM.TEST": data.json_file,
            "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.IMAGE_SIZE": (32, 32),
            "INPUT.RANDOM_FLIP": "horizontal",
            "INPUT.MULTI_SCALE_CROP.ENABLED": True,
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.MAX_EPOCHS": 0,
            "SOLVER.CHECKPOINT_EPOCHS": 0,
            "SOLVER.CHECKPOINT_PERIOD": 3,
            "SOLVER.MAX_ITER": 7,
            "TEST.EVAL_EPOCHS": 0,
            "TEST.EVAL_PERIOD": 2,
            "TEST.REPORT": False,
            "OUTPUT_DIR": str(tmp_path / name),
        }
        flat = [item for pair in options.items() for item in pair]
        cfg = setup_cfg(f"configs/DigitScenes/{config}.yaml", [*flat, *opts])
        cfg.freeze()
        return cfg

    return make


@pytest.fixture
def error_line():
    """A function that calls f(*args), which must end in an InputError, and returns its one line."""

    def call(f, *args) -> str:
        with pytest.raises(InputError) as caught:
            f(*args)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message

    return call


@pytest.fixture(scope="module")
def tool(request):
    """The module of the command that the test file's COMMAND names."""
    return load_command(request.module.COMMAND)


@pytest.fixture
def main(request, tool, monkeypatch, capsys):
    """A function that runs that command in this process: (exit status, stdout, stderr)."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", [request.module.COMMAND, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with own_log_handlers():
            status = tool.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def _forget_data_sets():
    """What a test registers with detectron2's catalogs is gone after it."""
    before = [(catalog, set(catalog.list())) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in before:
        for name in set(catalog.list()) - names:
            catalog.remove(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout, where configs/ and tools/ are."""
    return ROOT
