"""Train on several hosts, of which some are lost or come later: nothing may differ but rounding.

A short training of a narrow network on tiny images is started by torchrun on hosts that are network
namespaces of this machine, see `network`. Every process writes down its images and losses of each
iteration, see `observe`. They must be those of a training in one process, and so must the
predictions and the weights in the end, to within TOLERANCE. That is owed by a model that has no
batch norm and no dropout: their statistics and draws are each process's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

import numpy as np
import torch

from .harness import Trial
from .kill import OUTPUT, ROOT, make_data
from .network import Host, Network, unavailable

# Seconds after which a job hangs.
PATIENCE = 1200

# Of losses, scores in [0, 1] and weights, which are sums of float32 in another order.
TOLERANCE = 1e-4

ITERATIONS = 40

OPTIONS = {
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.CHECKPOINT_PERIOD": 5,
    "SOLVER.IMS_PER_BATCH": 12,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.OPTIMIZER": "SGD",
    "TEST.EVAL_PERIOD": 10,
}


def add_hosts(subcommands, common: argparse.ArgumentParser) -> None:
    """The subcommand."""
    parser = subcommands.add_parser(
        "hosts", parents=[common], help="trainings over several hosts, some of which are lost"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of all trials (default 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Iterator[Trial]:
    """Every kind of trial once a round, at moments drawn from --seed."""
    reason = unavailable()
    if reason:
        yield Trial("hosts", "", "skipped", reason)
        return
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        for round_ in range(args.rounds):
            for kind, attempt in KINDS.items():
                seed = f"{args.seed}-{round_}-{kind}"
                start = time.monotonic()
                problems, detail = attempt(folder, random.Random(seed))
                seconds = round(time.monotonic() - start, 1)
                outcome = "not as promised" if problems else "as promised"
                detail = "; ".join([*problems, detail])
                yield Trial(kind, seed, outcome, detail, bool(problems), seconds)


class Result(NamedTuple):
    """What came of a trial: what should not have been, and what was measured."""

    problems: List[str]
    detail: str


class Line(NamedTuple):
    """What a process has seen in an iteration, see `observe.Observe`."""

    start: str
    processes: int
    iteration: int
    images: List
    loss: float


class Training:
    """A training on hosts, in a new folder, which all of them share.

    Attributes:
        folder: in which the commands are called.
        hosts: by their numbers, the latest of each.
    """

    def __init__(self, folder: Path, network: Network | None = None, **options):
        """
        Args:
            folder: which has the data, see `make_data`, or will have it.
            network: with the hosts; None: for `run_here`.
            options: config keys, with __ for a dot.
        """
        if not (folder / "options.json").exists():
            (folder / "options.json").write_text(json.dumps(make_data(folder)))
        keys = {**OPTIONS, **{name.replace("__", "."): value for name, value in options.items()}}
        self._options = json.loads((folder / "options.json").read_text())
        self._options += [str(item) for pair in keys.items() for item in pair]
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self._network = network
        self.hosts: Dict[int, Host] = {}
        (self.folder / OUTPUT).mkdir()
        (self.folder / "observed").mkdir()

    def start(
        self,
        numbers: Sequence[int],
        nodes: str,
        processes: int = 1,
        first: int = 1,
        restarts: int = 0,
        pause: float = 0,
        own_output: Sequence[int] = (),
    ) -> None:
        """Start torchrun on hosts.

        Args:
            numbers: of the hosts.
            nodes: torchrun's --nnodes, for example 1:2.
            processes: on each.
            first: the host at which they meet.
            restarts: torchrun's --max-restarts.
            pause: seconds that an iteration takes more.
            own_output: hosts that do not share OUTPUT_DIR.
        """
        torchrun = {
            "--nnodes": nodes,
            "--nproc-per-node": processes,
            "--max-restarts": restarts,
            "--rdzv-backend": "c10d",
            "--rdzv-endpoint": f"host{first}:29500",
            "--rdzv-id": self.folder.name,
            # Seconds that the hosts wait for more of them; by default 30.
            "--rdzv-conf": "last_call_timeout=5",
        }
        flat = [item for pair in torchrun.items() for item in pair]
        launcher = ["-m", "torch.distributed.run", *flat]
        for number in numbers:
            mounts = {}
            if number in own_output:
                own = self.folder / f"output-of-host{number}"
                own.mkdir(exist_ok=True)
                mounts[self.folder / OUTPUT] = own
            command = self._command(launcher)
            self.hosts[number] = self._network.start(
                number, command, self._environment(pause), self.folder, mounts
            )

    def run_here(self) -> int:
        """Train on this machine, in one process; its exit status."""
        with open(self.folder / "here.txt", "w") as file:
            return subprocess.run(
                self._command([]),
                cwd=self.folder,
                env={**os.environ, **self._environment()},
                stdout=file,
                stderr=file,
                check=False,
            ).returncode

    def _command(self, launcher: Sequence) -> List[str]:
        script = [ROOT / "tools/train_net.py", "--import", ROOT / "tools/tortures/observe.py"]
        return [*map(str, [sys.executable, *launcher, *script, "--resume", *self._options])]

    def _environment(self, pause: float = 0) -> Dict[str, str]:
        return {
            "OBSERVED": str(self.folder / "observed"),
            "OBSERVED_PAUSE": str(pause),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            # Else the hosts that are left look for each other at a first one that is lost.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def lines(self) -> List[Line]:
        """What all processes have seen until now."""
        found = []
        for path in (self.folder / "observed").iterdir():
            whole = path.read_text().rpartition("\n")[0]
            found += [Line(*json.loads(line)) for line in whole.splitlines()]
        return found

    def wait_for(self, happened: Callable[[], bool]) -> float:
        """Wait until something has happened, or all hosts have ended: the seconds that it took.

        Raises:
            TimeoutError: it has not within PATIENCE seconds; with what the hosts have printed.
        """
        start = time.monotonic()
        while not happened() and any(host.status() is None for host in self.hosts.values()):
            time.sleep(0.05)
            if time.monotonic() - start > PATIENCE:
                raise TimeoutError(f"more than {PATIENCE} s: {self.text()}")
        return time.monotonic() - start

    def wait_for_iteration(self, iteration: int) -> None:
        """Wait until a process has begun it."""
        self.wait_for(lambda: any(line.iteration >= iteration for line in self.lines()))

    def wait_for_start(self, processes: int, after: Sequence[Line]) -> float:
        """Wait until a job that was not there before trains in so many processes."""
        known = {line.start for line in after}
        return self.wait_for(
            lambda: any(
                line.start not in known and line.processes == processes for line in self.lines()
            )
        )

    def end(self) -> List[str]:
        """Wait for the end of all hosts: what was wrong with it."""
        self.wait_for(lambda: False)
        statuses = {host.name: host.status() for host in self.hosts.values()}
        if any(statuses.values()):
            return [f"ended with {statuses}: {self.text()}"]
        return []

    def text(self) -> str:
        """The end of what the hosts have printed."""
        return " | ".join(f"{host.name}: {host.text()[-1500:]}" for host in self.hosts.values())

    def predictions(self) -> np.ndarray:
        with np.load(self.folder / OUTPUT / "inference/custom_test/predictions.npz") as content:
            return content["scores"]

    def weights(self) -> Dict[str, torch.Tensor]:
        path = self.folder / OUTPUT / "model_final.pth"
        content = torch.load(path, weights_only=True)
        parts = {"model": content["model"], "ema": content["ema"]}
        return {f"{p}/{name}": x for p, state in parts.items() for name, x in state.items()}


class Step(NamedTuple):
    """An iteration of all processes: their images, and the mean of their losses."""

    images: List
    loss: float


def steps(lines: Sequence[Line]) -> Dict[tuple, Step]:
    """The iterations that all processes of a job have begun, by (start, iteration)."""
    together: Dict[tuple, List[Line]] = {}
    for line in lines:
        together.setdefault((line.start, line.iteration), []).append(line)
    return {
        key: Step(
            sorted(image for line in found for image in line.images),
            float(np.mean([line.loss for line in found])),
        )
        for key, found in together.items()
        if len(found) == found[0].processes
    }


def compare(uncut: Training, training: Training) -> Result:
    """A finished training with one that was left alone."""
    expected = {iteration: step for (_, iteration), step in steps(uncut.lines()).items()}
    found = steps(training.lines())
    problems = []
    missing = sorted(set(expected) - {iteration for _, iteration in found})
    if missing:
        problems.append(f"iterations that were not done: {missing}")
    others = [i for (_, i), step in found.items() if step.images != expected[i].images]
    if others:
        problems.append(f"other images in iterations {sorted(others)}")
    loss = max(abs(step.loss / expected[i].loss - 1) for (_, i), step in found.items())
    score = np.abs(uncut.predictions() - training.predictions()).max()
    weights = uncut.weights(), training.weights()
    weight = max(float((x - weights[1][name]).abs().max()) for name, x in weights[0].items())
    measured = {"losses": loss, "scores": score, "weights": weight}
    problems += [f"other {what}: {x:.2g}" for what, x in measured.items() if not x < TOLERANCE]
    return Result(problems, ", ".join(f"{what} to {x:.1g}" for what, x in measured.items()))


def left_alone(folder: Path) -> Training:
    """The training in one process, made once in a folder."""
    path = folder / "uncut"
    if path.exists():
        training = Training(folder)
        training.folder = Path(path.read_text())
        return training
    training = Training(folder)
    if training.run_here():
        raise SystemExit(f"hosts: {(training.folder / 'here.txt').read_text()[-2000:]}")
    path.write_text(str(training.folder))
    return training


def judge(folder: Path, training: Training, *measured: str) -> Result:
    """The result of a training that is to end as one that was left alone."""
    problems = training.end()
    if problems:
        return Result(problems, "; ".join(measured))
    result = compare(left_alone(folder), training)
    return Result(result.problems, "; ".join([*measured, result.detail]))


# ---- kinds of trials


def new_network(folder: Path) -> Network:
    return Network(Path(tempfile.mkdtemp(prefix="network-", dir=folder)))


def same(folder: Path, rng: random.Random, hosts: int, processes: int) -> Result:
    """So many hosts with so many processes each."""
    left_alone(folder)
    with new_network(folder) as network:
        training = Training(folder, network)
        training.start(range(1, hosts + 1), str(hosts), processes)
        return judge(folder, training)


def resumed(folder: Path, rng: random.Random) -> Result:
    """Stopped by SIGTERM and resumed with 1, 2, 4 and again 1 processes."""
    left_alone(folder)
    with new_network(folder) as network:
        training = Training(folder, network)
        for n, stop in ((1, 8), (2, 17), (4, 28)):
            training.start(range(1, n + 1), str(n), pause=0.2)
            training.wait_for_iteration(stop)
            training.hosts[1].interrupt()
            training.wait_for(lambda: False)
        training.hosts = {}
        training.start([1], "1")
        return judge(folder, training)


def lost(
    folder: Path, rng: random.Random, number: int, hosts: int = 2, silently: bool = True
) -> Result:
    """One of the hosts is lost; silently: its network fails, and its processes live on."""
    left_alone(folder)
    with new_network(folder) as network:
        training = Training(folder, network)
        # The one at which they meet has to stay.
        first = hosts if number == 1 else 1
        training.start(range(1, hosts + 1), f"{hosts - 1}:{hosts}", first=first, restarts=3)
        training.wait_for_iteration(rng.randint(8, 25))
        before = training.lines()
        victim = training.hosts.pop(number)
        if silently:
            network.unplug(number)
        else:
            victim.kill()
        noticed = training.wait_for(lambda: "lost" in training.text())
        went_on = noticed + training.wait_for_start(hosts - 1, before)
        measured = f"noticed after {noticed:.0f} s, went on after {went_on:.0f} s"
        return judge(folder, training, measured)


def joined(folder: Path, rng: random.Random) -> Result:
    """A host comes when the training has begun."""
    left_alone(folder)
    with new_network(folder) as network:
        training = Training(folder, network)
        training.start([1], "1:2", pause=1)
        training.wait_for_iteration(1)
        before = training.lines()
        training.start([2], "1:2")
        went_on = training.wait_for_start(2, before)
        return judge(folder, training, f"went on in two processes after {went_on:.0f} s")


def not_shared(folder: Path, rng: random.Random) -> Result:
    """The second host does not see the checkpoint in OUTPUT_DIR."""
    with new_network(folder) as network:
        training = Training(folder, network)
        training.start([1], "1", pause=0.1)
        training.wait_for_iteration(7)
        training.hosts[1].interrupt()
        training.wait_for(lambda: False)
        training.start([1, 2], "2", own_output=[2])
        training.wait_for(lambda: False)
        problems = []
        for host in training.hosts.values():
            line = f"train: OUTPUT_DIR: the last checkpoint in {OUTPUT} is "
            if line not in host.text() or "none on host2: let it be" not in host.text():
                problems.append(f"{host.name}: no such line: {host.text()[-1500:]}")
            if not host.status():
                problems.append(f"{host.name} ended with {host.status()}")
        return Result(problems, "")


KINDS = {
    "2 hosts": partial(same, hosts=2, processes=1),
    "4 hosts": partial(same, hosts=4, processes=1),
    "2 hosts with 2 processes": partial(same, hosts=2, processes=2),
    "resumed with 1, 2, 4, 1 processes": resumed,
    "second host killed": partial(lost, number=2, silently=False),
    "network of second host lost": partial(lost, number=2),
    "network of first host lost": partial(lost, number=1),
    "network of first of three hosts lost": partial(lost, number=1, hosts=3),
    "host joins": joined,
    "folder is not shared": not_shared,
}
