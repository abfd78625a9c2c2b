"""Trainings while something fails: the disk, a process, the clock; and stopped by signals."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image

from ia_gcn.commands.train import main as train

from .harness import Trial

# Seconds until a training counts as hung, and until its last process must be gone.
HUNG, GONE = 180, 30

OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "DATALOADER.NUM_WORKERS": 2,
    "INPUT.IMAGE_SIZE": "(32, 32)",
    "SEED": 1,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_EPOCHS": 0,
    "SOLVER.MAX_ITER": 24,
    "SOLVER.CHECKPOINT_EPOCHS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 7,
    "TEST.EVAL_EPOCHS": 0,
    "TEST.EVAL_PERIOD": 5,
    "TEST.REPORT": False,
}

# Of a training that is to last until something happens to it.
ENDLESS = {"SOLVER.MAX_ITER": 10**6, "SOLVER.CHECKPOINT_PERIOD": 10**6, "TEST.EVAL_PERIOD": 0}


def add_faults(subcommands, common: argparse.ArgumentParser) -> None:
    """The subcommand `faults`."""
    parser = subcommands.add_parser(
        "faults",
        parents=[common],
        help="trainings whose disk, processes or clock fail, or that signals stop",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all faults (default 3)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Iterator[Trial]:
    """Every fault once a round, at moments drawn from --seed."""
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        write_images(folder / "data")
        for round_ in range(args.rounds):
            for kind, fault in FAULTS.items():
                seed = f"{args.seed}-{round_}-{kind}"
                start = time.monotonic()
                outcome, detail = fault(folder, random.Random(seed))
                is_finding = outcome not in ("as promised", "skipped")
                seconds = time.monotonic() - start
                yield Trial(kind, seed, outcome, detail, is_finding, round(seconds, 1))


def write_images(folder: Path, count: int = 16) -> None:
    """Images of noise, and labels.csv with up to two labels for each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file,labels"]
    for i in range(count):
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png," + ";".join(["round", "red", "old"][i % 3 : i % 3 + 2]))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


class Training:
    """tools/train_net.py in a process of its own, with the processes that it starts.

    Attributes:
        pid: of the process.
        log: the file of what it prints.
    """

    def __init__(
        self,
        data: Path,
        output: Path,
        *flags: str,
        prepare: Callable[[], object] | None = None,
        **options,
    ):
        """
        Args:
            data: the folder of `write_images`.
            output: OUTPUT_DIR.
            flags: of the command line.
            prepare: called in the process before all else; can be pickled.
            options: config keys, with __ for a dot.
        """
        values = {
            "DATASETS.CUSTOM.TRAIN": data / "labels.csv",
            "DATASETS.CUSTOM.TEST": data / "labels.csv",
            "DATASETS.CUSTOM.IMAGE_ROOT": data,
            **OPTIONS,
            "OUTPUT_DIR": output,
            **{name.replace("__", "."): value for name, value in options.items()},
        }
        flat = [str(item) for pair in values.items() for item in pair]
        argv = ["--config-file", "DigitScenes/ml_gcn.yaml", *flags, *flat]
        self.log = Path(tempfile.mkstemp(prefix="log-", dir=data.parent)[1])
        # The server trains nothing: a fork of a process that has can't always.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ia_gcn.commands.train"])
        self._process = context.Process(target=_train, args=(self.log, argv, prepare))
        self._process.start()
        self.pid = self._process.pid

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def wait_for_iterations(self) -> None:
        """Wait until it shows progress, or has ended."""
        while "\niteration " not in self.text() and self._process.is_alive():
            time.sleep(0.05)

    def processes(self) -> Dict[int, int]:
        """The parents of all its processes that run, by the id of each."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            state, parent, session = fields[0], int(fields[1]), int(fields[3])
            if session == self.pid and state not in "ZX":
                found[int(stat.parent.name)] = parent
        return found

    def children(self, pid: int) -> List[int]:
        """Those of a process, the last one first, without multiprocessing's own."""
        found = [child for child, parent in self.processes().items() if parent == pid]
        return [child for child in sorted(found, reverse=True) if not _is_tracker(child)]

    def end(self) -> End:
        """Wait for its end and that of all its processes."""
        try:
            end = time.monotonic() + HUNG
            # join() would also wait for processes that are left, which hold its sentinel.
            while self._process.exitcode is None:
                if time.monotonic() > end:
                    return End("hung", None, self.text())
                time.sleep(0.05)
            end = time.monotonic() + GONE
            while self.processes():
                if time.monotonic() > end:
                    return End("left processes", self._process.exitcode, self.text())
                time.sleep(0.05)
            return End("", self._process.exitcode, self.text())
        finally:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while self.processes():
                time.sleep(0.01)
            self._process.join()


def _train(log: Path, argv: Sequence[str], prepare: Callable | None) -> None:
    # As in a process that is not one of multiprocessing's.
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Whoever runs this in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if prepare:
        prepare()
    sys.exit(train(argv))


def _is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


class End(NamedTuple):
    """How a training has ended; `problem` is "" or what should not have been."""

    problem: str
    status: int | None
    text: str

    def judge(self, statuses: Sequence[int], line: str) -> tuple:
        """Outcome and detail.

        Args:
            statuses: that are right.
            line: what one of the last lines has in it; after it, only progress may be shown.
        """
        lines = [x for x in self.text.splitlines() if x and not x.startswith("iteration ")]
        last = (lines or [""])[-1]
        if self.problem:
            return self.problem, last
        if self.status in statuses and line in last and "Traceback" not in self.text:
            return "as promised", last
        return "not as promised", f"status {self.status}: {self.text[-2000:]}"


def fresh(folder: Path, name: str) -> Path:
    """The path of a folder that isn't there."""
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    return path


# ---- the disk


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[bool]:
    """A file system of its own at the folder; yields whether this process may mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield bool(done)
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(folder: Path, rng: random.Random) -> tuple:
    """The disk is full before the training's end; what was written before can be resumed."""
    output = fresh(folder, "full")
    with mounted(output, f"{rng.randint(1, 12)}m") as is_mounted:
        if is_mounted:
            return Training(folder / "data", output).end().judge([1], "train: ")
        limit = rng.randint(20_000, 400_000)

        prepare = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        return Training(folder / "data", output, prepare=prepare).end().judge([1], "train: ")


def read_only(folder: Path, rng: random.Random) -> tuple:
    """OUTPUT_DIR can't be written to."""
    output = fresh(folder, "read-only")
    with mounted(output, "1m") as is_mounted:
        if is_mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(output)], check=False)
        elif os.getuid() == 0:
            return "skipped", "root may write everywhere, and may not mount"
        else:
            output.chmod(0o555)
        return Training(folder / "data", output).end().judge([1], "ead-only" * is_mounted)


def slow_disk(folder: Path, rng: random.Random) -> tuple:
    """A quarter of a second and more until data is on the disk."""
    prepare = partial(_delay_fsync, rng.uniform(0.25, 1))
    output = fresh(folder, "slow")
    return Training(folder / "data", output, prepare=prepare).end().judge([0], "")


def _delay_fsync(seconds: float) -> None:
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(seconds), fsync(file))[1]


# ---- processes


def killed_worker(folder: Path, rng: random.Random) -> tuple:
    """A process that loads images is killed."""
    training = Training(folder / "data", fresh(folder, "run"), **ENDLESS)
    training.wait_for_iterations()
    time.sleep(rng.uniform(0, 1))
    for pid in training.children(training.pid)[:1]:
        os.kill(pid, signal.SIGKILL)
    return training.end().judge([1], "train: a process that loads images was ended")


def killed_rank(folder: Path, rng: random.Random) -> tuple:
    """One of two processes is killed."""
    training = Training(folder / "data", fresh(folder, "run"), "--num-gpus", "2", **ENDLESS)
    training.wait_for_iterations()
    time.sleep(rng.uniform(0, 1))
    signum = rng.choice([signal.SIGKILL, signal.SIGSEGV])
    for pid in rng.sample(training.children(training.pid), 1):
        os.kill(pid, signum)
    return training.end().judge([1], f"of 2 was ended by {signum.name}")


def killed_launcher(folder: Path, rng: random.Random) -> tuple:
    """The parent of two processes is killed."""
    training = Training(folder / "data", fresh(folder, "run"), "--num-gpus", "2", **ENDLESS)
    training.wait_for_iterations()
    time.sleep(rng.uniform(0, 1))
    os.kill(training.pid, signal.SIGKILL)
    # What they print as they are killed is no promise.
    return training.end()._replace(text="").judge([-signal.SIGKILL], "")


# ---- the clock


def clock_set_back(folder: Path, rng: random.Random) -> tuple:
    """An hour back, in the middle of the training."""
    prepare = partial(_set_clock_back, rng.randint(1, 400))
    output = fresh(folder, "clock")
    return Training(folder / "data", output, prepare=prepare).end().judge([0], "")


def _set_clock_back(calls: int) -> None:
    """After so many calls of time.time."""
    clock, left = time.time, [calls]

    def set_back():
        left[0] -= 1
        return clock() - 3600 * (left[0] < 0)

    time.time = set_back


# ---- signals


def stop(
    folder: Path, rng: random.Random, signum: int, processes: int = 1, group: bool = False
) -> tuple:
    """A signal at a random moment; --resume then ends with an uncut training's weights."""
    flags = ["--num-gpus", str(processes)]
    uncut = folder / f"uncut-{processes}"
    if not (uncut / "seconds").exists():
        start = time.monotonic()
        outcome = Training(folder / "data", uncut, *flags).end().judge([0], "")
        if outcome[0] != "as promised":
            return outcome
        (uncut / "seconds").write_text(str(time.monotonic() - start))
    output = fresh(folder, "run")
    training = Training(folder / "data", output, *flags)
    time.sleep(rng.uniform(0.3, float((uncut / "seconds").read_text())))
    if training.processes():
        (os.killpg if group else os.kill)(training.pid, signum)
    end = training.end()
    outcome = end.judge([0, 128 + signum], "train: " if end.status else "")
    if outcome[0] != "as promised":
        return outcome
    resumed = Training(folder / "data", output, *flags, "--resume").end().judge([0], "")
    if resumed[0] != "as promised":
        return resumed
    if not same_weights(uncut / "model_final.pth", output / "model_final.pth"):
        return "other weights", outcome[1]
    return outcome


def same_weights(path: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit for bit."""
    a, b = (torch.load(file, weights_only=True)["model"] for file in (path, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FAULTS = {
    "full disk": full_disk,
    "read-only folder": read_only,
    "slow disk": slow_disk,
    "data-loading worker killed": killed_worker,
    "one of two processes killed": killed_rank,
    "parent of two processes killed": killed_launcher,
    "clock set back": clock_set_back,
    "SIGTERM": lambda folder, rng: stop(folder, rng, signal.SIGTERM),
    "SIGTERM to all processes": lambda folder, rng: stop(folder, rng, signal.SIGTERM, group=True),
    "Ctrl-C": lambda folder, rng: stop(folder, rng, signal.SIGINT, group=True),
    "SIGTERM, two processes": lambda folder, rng: stop(folder, rng, signal.SIGTERM, 2),
    "Ctrl-C, two processes": lambda folder, rng: stop(folder, rng, signal.SIGINT, 2, group=True),
}
