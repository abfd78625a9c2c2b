"""Times and memory, and the tables that they are reported in."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence

import torch
import torchvision
from tabulate import tabulate
from tqdm import tqdm

# Share of the memory available that a step may take.
MEMORY_SHARE = 0.6


class Table(NamedTuple):
    title: str
    rows: List[Dict]
    """Each with a name, of the keys of COLUMNS those that were measured, and texts by the names of
    other columns."""
    note: str = ""


def measure(
    calls: Dict[str, Callable], rounds: int, what: str, before: Callable = lambda: None
) -> Dict[str, List[float]]:
    """Seconds of each call, by name: `rounds` times each in turn, after a round for warming up.

    Args:
        before: called before each call, which is not timed.
    """
    seconds = {name: [] for name in calls}
    # Without a terminal, no bar.
    total = (rounds + 1) * len(calls)
    with tqdm(total=total, desc=what, leave=False, disable=None) as progress:
        for number in range(rounds + 1):
            for name, call in calls.items():
                before()
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if number > 0:
                    seconds[name].append(elapsed)
                progress.update()
    return seconds


def timed_rows(
    seconds: Dict[str, List[float]], memory: Mapping[str, Dict] | None = None
) -> List[Dict]:
    """The rows of a table.

    Args:
        seconds: by name, of what was timed; the ratios are to the first.
        memory: by name, what `measure_memory` returned, also of what was not timed.
    """
    memory = memory or {}
    medians = {name: median(values) for name, values in seconds.items()}
    rows = [
        {
            "name": name,
            "median_s": medians[name],
            "min_s": min(values),
            "max_s": max(values),
            "ratio": medians[name] / next(iter(medians.values())),
            **memory.get(name, {}),
        }
        for name, values in seconds.items()
    ]
    return rows + [{"name": name, **row} for name, row in memory.items() if name not in seconds]


# By the key of a row: what stands above its column, and in its cells.
COLUMNS: Dict[str, tuple] = {
    "name": ("", lambda row: row["name"]),
    "not_run": ("not run", lambda row: row["not_run"]),
    "wall_s": ("s", lambda row: f"{row['wall_s']:.1f}"),
    "cpu_s": ("CPU s", lambda row: f"{row['cpu_s']:.1f}"),
    "median_s": ("median s", lambda row: f"{row['median_s']:.3g}"),
    "min_s": ("min–max s", lambda row: f"{row['min_s']:.3g}–{row['max_s']:.3g}"),
    "ratio": ("ratio", lambda row: f"{row['ratio']:.2f}"),
    "p50_ms": ("p50 ms", lambda row: f"{row['p50_ms']:.3g}"),
    "p99_ms": ("p99 ms", lambda row: f"{row['p99_ms']:.3g}"),
    "forward_s": ("forward s", lambda row: f"{row['forward_s']:.3g}"),
    "backward_s": ("backward s", lambda row: f"{row['backward_s']:.3g}"),
    "share": ("share of the step", lambda row: f"{row['share']:.1%}"),
    "exponent": ("growth exponent", lambda row: f"{row['exponent']:.2f}"),
    "regions": (
        "regions per image",
        lambda row: "–".join(str(count) for count in sorted(set(row["regions"]))),
    ),
    "logit_deviation": ("deviation of logits", lambda row: f"{row['logit_deviation']:.2g}"),
    "max_difference": ("max difference of logits", lambda row: f"{row['max_difference']:.1e}"),
    "metric_difference": (
        "max difference from ours, %",
        lambda row: f"{row['metric_difference']:.1e}",
    ),
    "per_second": ("images/s", lambda row: f"{row['per_second']:.0f}"),
    "min_per_second": (
        "min–max images/s",
        lambda row: f"{row['min_per_second']:.0f}–{row['max_per_second']:.0f}",
    ),
    "speed": ("times as many", lambda row: f"{row['speed']:.2f}"),
    "level_difference": ("max difference of 0–255", lambda row: f"{row['level_difference']}"),
    "differing_share": ("values that differ", lambda row: f"{row['differing_share']:.3%}"),
    "precision": ("precision", lambda row: f"{row['precision']:.1%}"),
    "recall": ("recall", lambda row: f"{row['recall']:.1%}"),
    "random_precision": ("at random", lambda row: f"{row['random_precision']:.1%}"),
    "random_recall": ("at random", lambda row: f"{row['random_recall']:.1%}"),
    "step_bytes": ("memory of the step", lambda row: describe_bytes(row["step_bytes"])),
    "file_bytes": ("file", lambda row: describe_bytes(row["file_bytes"])),
    "peak_bytes": ("peak of the process", lambda row: describe_bytes(row["peak_bytes"])),
}


def describe_bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def markdown(table: Table) -> str:
    columns = {key: column for key, column in COLUMNS.items() if any(key in r for r in table.rows)}
    # What is text already has the name of its column.
    own = {key for row in table.rows for key, value in row.items() if isinstance(value, str)}
    for key in dict.fromkeys(key for row in table.rows for key in row if key in own - set(COLUMNS)):
        columns[key] = key, lambda row, key=key: row[key]
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


def measure_memory(
    threads: int, prepare: Callable[..., Callable], *args, seconds: float | None = None
) -> Dict:
    """What a step takes, in a process of its own that has done nothing else.

    Args:
        threads: of torch.
        prepare: called there with `args`, it returns the step, a function of nothing.
        seconds: how long that may take in all, with two steps; None: as long as it takes.
    Returns:
        what a row says of it:
            step_s: seconds of the second step;
            step_bytes: resident at the peak of two steps beyond what was before the first;
            peak_bytes: resident at that peak in all: with Python, libraries and what was prepared;
        nothing where the system doesn't say; or, if that is more than MEMORY_SHARE of the memory
        that could be had, or takes longer,
            not_run: why.
    """
    available = read_bytes("/proc/meminfo", "MemAvailable")
    limit = None if available is None else int(MEMORY_SHARE * available)
    context = get_context("forkserver")
    # What takes long to import is imported once, not by each process anew.
    context.set_forkserver_preload(["ia_gcn.engine", "sklearn.metrics"])
    try:
        with ProcessPoolExecutor(1, context) as pool:
            result = pool.submit(peak_memory, threads, limit, prepare, args)
            try:
                found = result.result(seconds)
            except TimeoutError:
                for process in active_children():
                    process.kill()
                return {"not_run": f"takes longer than {seconds:g} s"}
    except BrokenProcessPool:
        return {"not_run": "the process was killed; out of memory?"}
    if found is None:
        share = f"{MEMORY_SHARE:.0%} of what is available"
        return {"not_run": f"takes more memory than {describe_bytes(limit)}, {share}"}
    return found


def peak_memory(threads: int, limit: int | None, prepare: Callable, args) -> Dict | None:
    """What `measure_memory` returns, of this process; None if more than `limit` bytes are asked."""
    torch.set_num_threads(threads)
    if limit is not None:
        limit += read_bytes("/proc/self/status", "VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        step = prepare(*args)
        hand_back_memory()
        before = read_bytes("/proc/self/status", "VmRSS")
        if before is None:
            return {}
        forget_peak()
        # What the first one leaves, such as an optimizer's momenta, all others have beside them.
        for _ in range(2):
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for it on a CPU.
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return None
    peak = read_bytes("/proc/self/status", "VmHWM")
    return {"step_s": seconds, "step_bytes": peak - before, "peak_bytes": peak}


def measure_command(
    threads: int, command: Sequence[str], seconds: float | None = None, **environment: str
) -> Dict:
    """What a command takes, which is run once.

    Args:
        threads: of torch.
        command: a program and its arguments.
        seconds: how long it may take; None: as long as it takes.
        environment: what is added to this process's.
    Returns:
        what a row says of it:
            wall_s, cpu_s: seconds, and those of all its threads on a processor;
            peak_bytes: resident at its peak;
        or, if it fails, takes longer, or more than MEMORY_SHARE of the memory that could be had,
            not_run: why, or the last line that it said.
    """
    available = read_bytes("/proc/meminfo", "MemAvailable")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        if available is not None:
            limit = int(MEMORY_SHARE * available)
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        timer = Timer(seconds, process.kill) if seconds else None
        if timer:
            timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        if timer:
            timer.cancel()
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            if seconds and wall_s >= seconds:
                return {"not_run": f"takes longer than {seconds:g} s"}
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            return {"not_run": last or f"ended by signal {-process.returncode}"}
    # Linux has KiB, macOS bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": unit * usage.ru_maxrss}


def hand_back_memory() -> None:
    """Give the system what was freed and is kept for later, where the C library can do that."""
    # glibc's; a step that makes do with such memory would seem to take none.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Let the peak of this process's memory, VmHWM, start anew from what it has now."""
    # Where that isn't allowed, what is measured is an upper bound.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_bytes(path: str, key: str) -> int | None:
    """What the line `key: n kB` of one of Linux's status files says; None on another system."""
    if not os.path.exists(path):
        return None
    lines = Path(path).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
