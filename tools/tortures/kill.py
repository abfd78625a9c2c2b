"""Kill a training again and again, and resume it: nothing may be lost, nothing may differ.

A short training of a narrow network on tiny images, with an EMA, a best model, evaluations and
checkpoints, is killed by SIGKILL: at random moments, and just before or shortly after it writes
something, reads an image for an evaluation, or opens a file while it starts. It is resumed with
--resume until it ends. What it leaves must equal, to the bit, what an uncut one leaves.

The processes are forks of this one, which has imported everything, and call the `main` of the train
command; two of them form a job as those of torchrun do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
import torch.utils.tensorboard  # so that the forks need not import it
from PIL import Image

from ia_gcn.commands import train
from ia_gcn.engine.metrics_log import TIMES

from .harness import Trial

ROOT = Path(__file__).parents[2]

# The folder of a training, in the folder in which the command is called.
OUTPUT = "output"

# Seconds after which a start that has not ended hangs.
PATIENCE = 120

# Processes, and workers of each.
VARIANTS = ((1, 0), (1, 1), (2, 0))

# What a kill is aimed at, by the letter that a process reports.
AIMS = {"w": "write", "e": "evaluation", "s": "start"}


class Aim(NamedTuple):
    """When a training is killed.

    what: a letter of AIMS, or "" for a moment.
    at: seconds after the start; or the number of the event, from 1.
    delay: seconds from the event to the kill; 0: the process gets no further.
    rank: which of the processes it is.
    alone: only that process is killed at first; its workers live on, other processes for a while.
    """

    what: str
    at: float
    delay: float
    rank: int
    alone: bool


def add_kill(subcommands, common: argparse.ArgumentParser) -> None:
    """The subcommand."""
    parser = subcommands.add_parser("kill", parents=[common], help="trainings that are killed")
    parser.add_argument("--runs", type=int, default=100, help="trainings (default 100)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Iterator[Trial]:
    """A trial for each training, which is killed one to four times."""
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        options = make_data(Path(folder))
        uncut = {}
        for n in range(args.runs):
            variant = VARIANTS[n % len(VARIANTS)]
            if variant not in uncut:
                uncut[variant] = Uncut(Path(folder), options, *variant)
            yield try_kills(uncut[variant], draw.randrange(2**32))


class Uncut:
    """A training that is left alone, with which the others are compared.

    Attributes:
        folder: in which it was called.
        command: arguments of the train command.
        processes: that train.
        seconds: that it took.
        events: how many there were of each letter of AIMS in a process.
    """

    def __init__(self, folder: Path, options: List[str], processes: int, workers: int):
        self.name = f"{processes} process{'es' * (processes > 1)}, {workers} workers"
        self.folder = folder / f"uncut_{processes}_{workers}"
        self.command = [*options, "DATALOADER.NUM_WORKERS", str(workers)]
        self.processes = processes
        self.folder.mkdir()
        start = time.monotonic()
        job = Job(self.folder, self.command, processes)
        statuses = job.wait()
        self.seconds = time.monotonic() - start
        self.events = Counter(job.reports)
        if any(statuses):
            raise SystemExit(f"kill: the uncut training ended with {statuses}: {job.screen()}")


def try_kills(uncut: Uncut, seed: int) -> Trial:
    """Kill and resume one training until it ends, and compare it."""
    draw = random.Random(seed)
    aims = [draw_aim(draw, uncut) for _ in range(draw.randint(1, 4))]
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=uncut.folder.parent))
    kills, problems, jobs = [], [], []
    for aim in [*aims, None]:
        resume = ["--resume"] * bool(jobs)
        job = Job(folder, [*resume, *uncut.command], uncut.processes, aim)
        jobs.append(job)
        statuses = job.wait()
        if statuses is None:
            kills.append(f"{AIMS.get(aim.what, 'moment')} {aim.at:.3g} + {aim.delay:.2g} s")
            problems += half_written(folder / OUTPUT)
            continue
        if any(statuses):
            problems.append(f"ended with {statuses}: {job.screen()}")
        else:
            problems += differences(uncut.folder / OUTPUT, folder / OUTPUT)
        break
    for job in jobs:
        job.clean_up()
    # None of the checkpoints was ever damaged.
    if any("Going on from" in job.screen() for job in jobs):
        problems.append("resumed from an older checkpoint")
    shutil.rmtree(folder)
    name = f"{seed} ({'; '.join(kills)})"
    outcome = "differs" if problems else f"equal after {len(kills)} kills"
    seconds = time.monotonic() - start
    return Trial(uncut.name, name, outcome, "; ".join(problems), bool(problems), seconds)


def draw_aim(draw: random.Random, uncut: Uncut) -> Aim:
    what = draw.choice(["", *AIMS])
    last = uncut.events[what]
    return Aim(
        what,
        draw.randint(1, last) if what else draw.uniform(0, uncut.seconds),
        draw.choice([0, 10 ** draw.uniform(-4, -1.5)]),
        draw.randrange(uncut.processes),
        draw.random() < 0.5,
    )


class Job:
    """The processes of one start of the train command, in a folder.

    Attributes:
        reports: letters of AIMS, for the events in the first process; only without an aim.
    """

    def __init__(self, folder: Path, command: List[str], processes: int, aim: Aim | None = None):
        self.aim = aim
        self.reports = ""
        self._log = folder / f"screen{len(list(folder.glob('screen*')))}.txt"
        self._start = time.monotonic()
        self._pipe, reports = os.pipe()
        port = free_port()
        self._processes = {}
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                watched = rank == (aim.rank if aim else 0)
                _work(self._log, command, (rank, processes, port), aim, watched and reports)
            self._processes[child] = None
        os.close(reports)

    def wait(self) -> List[int] | None:
        """The exit statuses; None if the job was killed."""
        aim, end = self.aim, self._start + PATIENCE
        moment = self._start + aim.at if aim and not aim.what else end
        listening = [self._pipe]
        while None in self._processes.values():
            left = min(moment, end) - time.monotonic()
            ready = select.select(listening, [], [], max(0, min(left, 0.02)))[0]
            report = os.read(self._pipe, 4096).decode() if ready else ""
            self.reports += report
            if ready and not report:
                listening = []
            if aim and (report or time.monotonic() > moment):
                time.sleep(aim.delay)
                self._kill()
                return None
            if time.monotonic() > end:
                self.clean_up()
            self._reap()
        os.close(self._pipe)
        return list(self._processes.values())

    def _kill(self) -> None:
        victim = list(self._processes)[self.aim.rank]
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        if not self.aim.alone:
            self.clean_up()
        elif len(self._processes) > 1:
            time.sleep(0.2)  # until a launcher notices
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process, status in self._processes.items():
            if status is None:
                os.waitpid(process, 0)
        os.close(self._pipe)

    def _reap(self) -> None:
        for process, status in self._processes.items():
            if status is None:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self._processes[process] = os.waitstatus_to_exitcode(status)
        if any(self._processes.values()) and None in self._processes.values():
            # The others wait for the one that failed; a launcher would end them.
            time.sleep(0.2)
            self.clean_up()

    def clean_up(self) -> None:
        """End what is left of it, workers too."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)

    def screen(self) -> str:
        """The end of what it has printed."""
        return self._log.read_text(errors="replace")[-2000:]


def _work(log: Path, command: List[str], rank: Tuple[int, int, int], aim, reports: int) -> None:
    """In the child: become a process of the job, and train."""
    status = 70
    try:
        os.setsid()
        screen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(screen, stream)
        os.chdir(log.parent)
        if rank[1] > 1:
            names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
            os.environ.update(zip(names, map(str, rank)))
            os.environ.update(LOCAL_RANK=os.environ["RANK"], LOCAL_WORLD_SIZE=str(rank[1]))
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if reports:
            _report_events(aim, reports)
        status = train.main(command)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _report_events(aim: Aim | None, pipe: int) -> None:
    """Write a letter of AIMS to a pipe when there is such an event, or at the one of an aim."""
    output = os.path.abspath(OUTPUT) + os.sep
    counts: Counter = Counter()
    started = False

    def letter(event: str, args) -> str:
        nonlocal started
        if event in ("os.rename", "os.remove", "os.truncate"):
            return "w"
        if event != "open" or not isinstance(args[0], (str, bytes, os.PathLike)):
            return ""
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.endswith(".png"):
            started = True
            return "e" if f"{os.sep}test{os.sep}" in path else ""
        if path.startswith(output) and (args[1] is None or args[1][0] != "r"):
            return "w"
        return "" if started else "s"

    def audit(event: str, args) -> None:
        what = letter(event, args)
        if not what:
            return
        if aim is None:
            os.write(pipe, what.encode())
            return
        counts[what] += 1
        if what == aim.what and counts[what] == aim.at:
            os.write(pipe, what.encode())
            if not aim.delay:
                time.sleep(PATIENCE)

    if aim is None or aim.what:
        sys.addaudithook(audit)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def half_written(folder: Path) -> List[str]:
    """What a killed training left that it should not have."""
    problems = []
    last = folder / "last_checkpoint"
    names = {last.read_text()} if last.exists() else set()
    for name in sorted({*names, *(path.name for path in folder.glob("*.pth"))}):
        try:
            torch.load(folder / name, weights_only=True)
        except Exception as error:  # of a damaged file, nearly anything
            problems.append(f"{name} is damaged: {type(error).__name__}")
    periodic = list(folder.glob("model_0*.pth"))
    # The fourth is removed right after it was written.
    if len(periodic) > 4:
        problems.append(f"{len(periodic)} periodic checkpoints")
    return problems


def differences(expected: Path, found: Path) -> List[str]:
    """Between the folders of two trainings; TensorBoard's files, logs and times are left out."""
    problems = []
    names = [files_of(folder) for folder in (expected, found)]
    if names[0] != names[1]:
        problems.append(f"other files: {', '.join(sorted(names[0] ^ names[1]))}")
    for name in sorted(names[0] & names[1]):
        where = difference(*(read(folder / name) for folder in (expected, found)))
        if where is not None:
            problems.append(f"{name} differs{where}")
    return problems


def files_of(folder: Path) -> set:
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if "tfevents" not in path}


def read(path: Path) -> Any:
    """The content of a file, of nested containers, as far as it is to be equal."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    if path.suffix == ".npz":
        with np.load(path) as content:
            return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in content.items()}
    if path.name.startswith(("log.txt", ".lock")):
        return None
    if path.name == "metrics.json" and path.parent.name == OUTPUT:
        records = map(json.loads, path.read_text().splitlines())
        return [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    return path.read_bytes()


def difference(expected: Any, found: Any, where: str = "") -> str | None:
    """Where the first difference is; None: they are equal to the bit."""
    if type(expected) is not type(found):
        return f"{where}: {type(found).__name__}"
    if isinstance(expected, torch.Tensor):
        same = expected.dtype == found.dtype and torch.equal(expected, found)
        return None if same else where
    if isinstance(expected, dict):
        if list(expected) != list(found):
            return f"{where}: {list(found)}"
        parts = [(f"{where}/{key}", expected[key], found[key]) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            return f"{where}: {len(found)} items"
        parts = [(f"{where}/{i}", *pair) for i, pair in enumerate(zip(expected, found))]
    else:
        return None if expected == found else f"{where}: {str(found)[:60]}"
    return next((d for w, e, f in parts if (d := difference(e, f, w)) is not None), None)


def make_data(folder: Path) -> List[str]:
    """Write tiny images with rectangles in the colours that are their labels.

    Returns:
        arguments of the train command.
    """
    colours = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
    categories = [{"id": i, "name": name} for i, name in enumerate(colours, start=1)]
    draw = np.random.default_rng(0)
    for part, count in (("train", 13), ("test", 7)):
        (folder / part).mkdir()
        images, annotations = [], []
        for i in range(1, count + 1):
            pixels = draw.integers(100, 156, (24, 32, 3)).astype(np.uint8)
            for place, colour in enumerate(colours.values()):
                if not (i % 7 + 1) >> place & 1:
                    continue
                box = [10 * place, 4, 8, 12]
                pixels[4:16, 10 * place : 10 * place + 8] = colour
                place = {"category_id": place + 1, "bbox": box, "area": 96, "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": i, **place})
            Image.fromarray(pixels).save(folder / part / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 32, "height": 24})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{part}.json").write_text(json.dumps(content))
    keys: Dict[str, Any] = {
        "DATASETS.CUSTOM.TRAIN": folder / "train.json",
        "DATASETS.CUSTOM.IMAGE_ROOT": folder / "train",
        "DATASETS.CUSTOM.TEST": folder / "test.json",
        "DATASETS.CUSTOM.TEST_IMAGE_ROOT": folder / "test",
        "INPUT.IMAGE_SIZE": "(32, 32)",
        "MODEL.DEVICE": "cpu",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_EPOCHS": 0,
        "SOLVER.MAX_ITER": 25,
        "SOLVER.EMA_DECAY": 0.8,
        "SOLVER.CHECKPOINT_EPOCHS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "TEST.EVAL_EPOCHS": 0,
        "TEST.EVAL_PERIOD": 6,
        "TEST.IMS_PER_BATCH": 4,
        "TEST.REPORT": False,
        "OUTPUT_DIR": OUTPUT,
        "SEED": 1,
    }
    config = ["--config-file", str(ROOT / "configs/DigitScenes/ml_gcn.yaml")]
    return config + [str(item) for pair in keys.items() for item in pair]
