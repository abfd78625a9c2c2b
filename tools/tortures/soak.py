"""Hours of a training and of the demo page side by side: nothing they hold may keep growing."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence

import numpy as np
from PIL import Image
from scipy.stats import theilslopes

from .harness import Trial

REPOSITORY = Path(__file__).parents[2]
SECONDS_PER_REQUEST = 2.0
SECONDS_PER_SAMPLE = 5.0
# As a person who drops some images and leaves.
REQUESTS_PER_SESSION = 10
SECONDS_TO_START = 300
SECONDS_TO_ANSWER = 600
SECONDS_TO_END = 60

# A quantity may grow by this share and by this much, from the second quarter of the time to the
# last one: the first quarter is for caches to fill.
SHARE = 0.05
SLACK = {"memory": 20e6, "output": 20e6, "descriptors": 10, "threads": 10, "files": 10}

# gradio deletes uploads by their age; of two hours, the page's own hour would be too much.
PAGE = """
import sys
from ia_gcn.demo import page
page.CLEAN_UP = (int(sys.argv[1]),) * 2
from ia_gcn.commands.demo import main
sys.exit(main(sys.argv[2:]))
"""


class Sample(NamedTuple):
    """What a process and all its descendants hold at a moment.

    seconds: since the start.
    memory: bytes, of anonymous and shared memory; what several of them share counts once. Files
        that are mapped, such as libraries, are left out: other programs have a share in them.
    descriptors: open files, sockets and pipes.
    threads: of all processes.
    files: in the folder for temporary files.
    output: bytes, in the output folder.
    """

    seconds: float
    memory: int
    descriptors: int
    threads: int
    files: int
    output: int


# ------------------------------------------------------------------------------------ the samples


def descendants(pid: int) -> List[int]:
    """A process and all below it, from /proc."""
    children: Dict[int, List[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in parentheses, may have blanks.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def read_numbers(path: Path) -> Dict[str, int]:
    """The lines `name: number ...` of a file in /proc."""
    numbers = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.split()[:1] and rest.split()[0].isdigit():
            numbers[name] = int(rest.split()[0])
    return numbers


def take_sample(seconds: float, pid: int, temporary: Path, output: Path) -> Sample:
    """Of a process, the folder of its temporary files, and that of its output."""
    memory = descriptors = threads = 0
    for process in descendants(pid):
        folder = Path("/proc") / str(process)
        try:
            shares = read_numbers(folder / "smaps_rollup")
            memory += 1024 * (shares["Pss_Anon"] + shares["Pss_Shmem"])
            threads += read_numbers(folder / "status")["Threads"]
            descriptors += len(os.listdir(folder / "fd"))
        # It has ended.
        except (OSError, KeyError):
            continue
    return Sample(seconds, memory, descriptors, threads, len(sizes(temporary)), sum(sizes(output)))


def sizes(folder: Path) -> List[int]:
    """Bytes of each file in a folder and below; of those that vanish meanwhile, none."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found.append(os.lstat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return found


# ------------------------------------------------------------------------------------ the verdicts


def verdicts(what: str, samples: Sequence[Sample]) -> Iterator[Trial]:
    """Whether each quantity keeps growing.

    The median of the last quarter of the time is held against that of the second; and the
    Theil-Sen slope of all after the first quarter, which single samples do not change, times
    their time. Neither may be more than SHARE of the second quarter's median and SLACK.

    Args:
        what: had them.
        samples: in the order of time.
    """
    if not samples:
        yield Trial(f"{what}: memory", "trend", "not measured", "no sample", True)
        return
    start, end = samples[0].seconds, samples[-1].seconds
    quarter = (end - start) / 4
    later = [sample for sample in samples if sample.seconds >= start + quarter]
    for name, slack in SLACK.items():
        times = np.array([sample.seconds for sample in later])
        values = np.array([getattr(sample, name) for sample in later], float)
        second = np.median(values[times <= start + 2 * quarter])
        last = np.median(values[times >= start + 3 * quarter])
        trend = theilslopes(values, times)[0] * 3 * quarter if quarter else 0.0
        bound = SHARE * second + slack
        grows = bool(max(last - second, trend) > bound)
        detail = (
            f"{len(later)} samples in {3 * quarter / 60:.1f} min; median {second:.4g} in the "
            f"second quarter, {last:.4g} in the last; trend {trend:+.3g}; bound {bound:.3g}"
        )
        yield Trial(f"{what}: {name}", "trend", "grows" if grows else "stays", detail, grows)


# ----------------------------------------------------------------------------------- the processes


@contextmanager
def process(name: str, folder: Path, *command, **env) -> Iterator[subprocess.Popen]:
    """One with its output in NAME.log and its temporary files in NAME.tmp; it is gone
    afterwards, and so is all that it has started."""
    temporary = folder / f"{name}.tmp"
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
        "GRADIO_TEMP_DIR": str(temporary / "gradio"),
        **env,
    }
    with open(folder / f"{name}.log", "wb") as log:
        started = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        for pid in descendants(started.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        started.wait()


def end(name: str, running: subprocess.Popen, temporary: Path) -> Iterator[Trial]:
    """SIGTERM, and what is left then: of processes, and of temporary files."""
    if running.poll() is not None:
        yield Trial(name, "end", "ended early", f"exit status {running.returncode}", True)
        return
    family = descendants(running.pid)
    start = time.monotonic()
    running.terminate()
    try:
        status = running.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        detail = f"more than {SECONDS_TO_END} s after SIGTERM"
        yield Trial(name, "end", "hung", detail, True)
        return
    seconds = time.monotonic() - start
    # A worker may take a moment to notice.
    while any(is_alive(pid) for pid in family) and time.monotonic() < start + SECONDS_TO_END:
        time.sleep(0.1)
    left = [pid for pid in family if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    files = len(sizes(temporary))
    outcome = "processes left" if left else "files left" if files else "ended"
    detail = f"exit status {status}; {len(left)} processes and {files} temporary files left"
    yield Trial(name, "end", outcome, detail, bool(left or files), seconds)


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------ the requests


def write_images(folder: Path, seed: int) -> List[Path]:
    """Small and large ones of several formats, and damaged ones, whose names begin with bad."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i, (mode, suffix, shape) in enumerate(
        [
            ("RGB", "jpg", (96, 96, 3)),
            ("RGB", "jpg", (1500, 2000, 3)),
            ("RGB", "png", (300, 400, 3)),
            ("L", "png", (64, 300)),
            ("RGBA", "png", (200, 200, 4)),
            ("CMYK", "jpg", (120, 160, 4)),
            ("P", "gif", (90, 120)),
            ("RGB", "webp", (240, 320, 3)),
        ]
    ):
        image = Image.fromarray(
            rng.integers(0, 256, shape, np.uint8), None if mode == "P" else mode
        )
        path = folder / f"good{i}.{suffix}"
        image.convert(mode).save(path)
        content = path.read_bytes()
        (folder / f"bad{i}.{suffix}").write_bytes(content[: len(content) // 2])
    (folder / "bad8.jpg").write_bytes(rng.bytes(5000))
    (folder / "bad9.png").write_bytes(b"")
    return sorted(folder.iterdir())


class Visitor:
    """Uploads images to the page, one after the other."""

    def __init__(self, address: str, images: Sequence[Path], seed: int):
        self._address, self._images, self._random = address, images, random.Random(seed)
        self._client, self._count = None, 0

    def ask(self) -> Trial:
        """Upload an image and have it described; a damaged one must be refused."""
        from gradio_client import Client, handle_file
        from gradio_client.exceptions import AppError

        path = self._random.choice(self._images)
        is_bad = path.name.startswith("bad")
        kind = "page: damaged images" if is_bad else "page: images"
        start = time.monotonic()
        try:
            if self._count % REQUESTS_PER_SESSION == 0:
                self.close()
                self._client = Client(
                    self._address, verbose=False, analytics_enabled=False, download_files=False
                )
            self._count += 1
            job = self._client.submit(handle_file(str(path)), 0.5, api_name="/describe")
            labels, _ = job.result(SECONDS_TO_ANSWER)
            outcome, detail = "described", str(labels)[:200]
        except AppError as error:
            outcome, detail = "refused", error.message
        # Whatever else comes of it is what is looked for.
        except Exception as error:
            outcome, detail = "failed", f"{type(error).__name__}: {error}"
        # Decoders complete some truncated images.
        is_finding = outcome not in ({"described", "refused"} if is_bad else {"described"})
        return Trial(kind, path.name, outcome, detail, is_finding, time.monotonic() - start)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


# ------------------------------------------------------------------------------------- the torture


def run(args: argparse.Namespace) -> Iterator[Trial]:
    """Each request is a trial, and in the end the verdict on each quantity.

    The samples are in soak_samples.jsonl as they come. SIGTERM and Ctrl-C end the run early, with
    verdicts on what there is.
    """
    folder = args.output.resolve() / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    yield from soak(folder, args.minutes, args.seed, stopped)


def soak(folder: Path, minutes: float, seed: int, stopped: Sequence = ()) -> Iterator[Trial]:
    """The run itself.

    Args:
        folder: empty, for all that it writes.
        minutes: of both, after they have started.
        seed: of the images.
        stopped: ends the run once it is not empty.
    """
    images = write_images(folder / "images", seed)
    subprocess.run(
        [
            *(sys.executable, REPOSITORY / "datasets/prepare_digit_scenes.py"),
            *("--root", folder / "data", "--train", "400", "--val", "50"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    output, weights = folder / "training", folder / "model.pth"
    training = process(
        "training",
        folder,
        *("tools/train_net.py", "--config-file", "configs/DigitScenes/ia_gcn_plus.yaml"),
        *("OUTPUT_DIR", output, "DATALOADER.NUM_WORKERS", 2, "SOLVER.EMA_DECAY", 0.99),
        # Until it is ended. Most samples are of the training, and not of an evaluation with
        # workers of its own.
        *("SOLVER.MAX_EPOCHS", 10**6, "SOLVER.CHECKPOINT_EPOCHS", 1, "TEST.EVAL_EPOCHS", 5),
        DETECTRON2_DATASETS=str(folder / "data"),
    )
    with training as trains:
        log = folder / "training.log"
        wait_for(lambda: (output / "last_checkpoint").exists(), trains, log)
        shutil.copy(output / (output / "last_checkpoint").read_text(), weights)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        clean_up = max(1, min(60, round(10 * minutes)))
        page = process(
            "page",
            folder,
            *("-c", PAGE, clean_up, "--weights", weights, "--device", "cpu", "--port", port),
        )
        with page as serves:
            log = folder / "page.log"
            wait_for(lambda: b"http:" in log.read_bytes(), serves, log)
            visitor = Visitor(f"http://127.0.0.1:{port}/", images, seed)
            watched = {"training": (trains, output), "page": (serves, folder / "none")}
            samples: Dict[str, List[Sample]] = {name: [] for name in watched}
            start = time.monotonic()
            next_sample = next_request = 0.0
            with open(folder.parent / "soak_samples.jsonl", "w", encoding="utf-8") as lines:
                while (now := time.monotonic() - start) < 60 * minutes and not stopped:
                    if any(running.poll() is not None for running, _ in watched.values()):
                        break
                    if now >= next_sample:
                        next_sample = now + SECONDS_PER_SAMPLE
                        for name, (running, place) in watched.items():
                            sample = take_sample(now, running.pid, folder / f"{name}.tmp", place)
                            samples[name].append(sample)
                            print(json.dumps({"what": name, **sample._asdict()}), file=lines)
                        lines.flush()
                    if now >= next_request:
                        next_request = now + SECONDS_PER_REQUEST
                        yield visitor.ask()
                    time.sleep(0.1)
            visitor.close()
            for name, found in samples.items():
                yield from verdicts(name, found)
            for name, (running, _) in watched.items():
                yield from end(name, running, folder / f"{name}.tmp")


def wait_for(is_true, running: subprocess.Popen, log: Path) -> None:
    """Until a process that starts has come so far.

    Raises:
        RuntimeError: it has ended, or takes too long.
    """
    limit = time.monotonic() + SECONDS_TO_START
    while not is_true():
        if running.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"{log.stem} does not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def add_soak(subcommands, common: argparse.ArgumentParser) -> None:
    """`soak`."""
    parser = subcommands.add_parser(
        "soak",
        parents=[common],
        help="hours of a training and of the demo page: memory must not grow",
        description=__doc__,
    )
    parser.add_argument("--minutes", type=float, default=120, help="that both run (default 120)")
    # The minutes say it.
    parser.set_defaults(run=run, seconds=float("inf"))
