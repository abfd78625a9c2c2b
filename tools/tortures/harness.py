"""What all tortures share: trials, processes with limits for them, and the table at the end.

A torture is a function from the parsed arguments to an iterator of `Trial`. What repeats a trial
is in its `name`, so that a finding can be looked into.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Collection, Dict, Iterable, Iterator, List, NamedTuple, Sequence

from tabulate import tabulate

from ia_gcn.errors import InputError
from ia_gcn.io.images import UnreadableImage

# Outcomes that nothing may have, see `run_in_child`.
FINDINGS = ("raised", "crashed", "hung", "out of memory", "ran code")

# What a file that is only read has no reason to do: the names of Python's audit events.
FORBIDDEN_EVENTS = frozenset(
    {
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.posix_spawn",
        "os.putenv",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.spawn",
        "os.system",
        "pty.spawn",
        "shutil.rmtree",
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "subprocess.Popen",
        "webbrowser.open",
    }
)


class Trial(NamedTuple):
    """One thing that was tried.

    kind: what is counted together, a row of the table.
    name: what repeats it, for example the seed of the kind.
    outcome: a column of the table.
    detail: of the outcome, such as the message.
    is_finding: whether it should not have come out like this.
    seconds: that it took.
    """

    kind: str
    name: str
    outcome: str
    detail: str = ""
    is_finding: bool = False
    seconds: float = 0.0


class Limits(NamedTuple):
    """Of a process of `run_in_child`: seconds, and bytes of memory beyond what it starts with."""

    seconds: float = 20
    memory: int = 2**30


LIMITS = Limits()


def run_in_child(
    kind: str,
    name: str,
    work: Callable[[], str],
    folder: Path,
    limits: Limits = LIMITS,
    allowed: Collection[str] = (),
) -> Trial:
    """Call `work` in a fork of this process, with limits.

    Args:
        kind, name: of the trial.
        work: returns an outcome, such as "read"; to be refused, by InputError or UnreadableImage,
            is an outcome as well.
        folder: the only one where files may be written. If a file `canary` comes to be there,
            code was run.
        limits: of the process.
        allowed: those of FORBIDDEN_EVENTS that `work` has reason to do.
    Returns:
        the trial; its outcome is what `work` returned, "refused", or one of FINDINGS.
    """
    start = time.monotonic()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work_and_exit(work, writer, Path(folder), limits, allowed)
    os.close(writer)
    chunks, hung = [], False
    while True:
        left = start + limits.seconds - time.monotonic()
        if not select.select([reader], [], [], max(0, left))[0]:
            os.kill(child, signal.SIGKILL)
            hung = True
            break
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        chunks.append(chunk)
    os.close(reader)
    _, status, _ = os.wait4(child, 0)
    seconds = time.monotonic() - start
    canary = Path(folder) / "canary"
    if hung:
        outcome, detail = "hung", f"more than {limits.seconds:g} s"
    elif os.WIFSIGNALED(status):
        outcome, detail = "crashed", signal.Signals(os.WTERMSIG(status)).name
    else:
        answer = b"".join(chunks).decode(errors="replace")
        outcome, _, detail = answer.partition("\n")
        if not answer:
            outcome, detail = "crashed", f"exit status {os.waitstatus_to_exitcode(status)}"
    if canary.exists():
        outcome, detail = "ran code", f"{detail} canary"
        canary.unlink()
    return Trial(kind, name, outcome, detail, outcome in FINDINGS, seconds)


class Task(NamedTuple):
    """A trial to come: the first three arguments of `run_in_child`."""

    kind: str
    name: str
    work: Callable[[], str]


def run_in_children(
    tasks: Sequence[Task],
    folder: Path,
    limits: Limits = LIMITS,
    allowed: Collection[str] = (),
) -> Iterator[Trial]:
    """`run_in_child` for many small tasks: in one process together, if all of them come out well.

    A fork takes longer than most of them. Otherwise each half of them gets a process, and so on.
    """
    if len(tasks) == 1:
        yield run_in_child(*tasks[0], folder, limits, allowed)
        return

    def together() -> str:
        outcomes = []
        for task in tasks:
            try:
                outcomes.append((task.work(), ""))
            except (InputError, UnreadableImage) as error:
                outcomes.append(("refused", str(error)[:300]))
        return f"well\n{json.dumps(outcomes)}"

    # One that hangs is found when it is alone.
    patient = limits._replace(seconds=10 * limits.seconds)
    whole = run_in_child("", "", together, folder, patient, allowed)
    if whole.outcome == "well":
        for task, (outcome, detail) in zip(tasks, json.loads(whole.detail)):
            yield Trial(task.kind, task.name, outcome, detail, False, whole.seconds / len(tasks))
    else:
        half = len(tasks) // 2
        for part in (tasks[:half], tasks[half:]):
            yield from run_in_children(part, folder, limits, allowed)


def _work_and_exit(
    work: Callable[[], str], writer: int, folder: Path, limits: Limits, allowed: Collection[str]
) -> None:
    """In the child: write the outcome and, after a line break, what there is to say of it."""
    answer = "raised\n"
    forbidden: List[str] = []

    def audit(event: str, args) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)) and _writes(args[1], args[2]):
            path = Path(os.path.abspath(os.fsdecode(args[0])))
            if folder.resolve() not in path.resolve().parents and path != Path(os.devnull):
                forbidden.append(f"writes {path}")
        elif event in FORBIDDEN_EVENTS and event not in allowed:
            forbidden.append(event)

    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = 1024 * next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData:")
        )
        most = used + limits.memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.addaudithook(audit)
        try:
            answer = f"{work()}\n"
        except (InputError, UnreadableImage) as error:
            answer = f"refused\n{error}"
        except MemoryError as error:
            answer = f"out of memory\n{error}"
        except BaseException as error:
            answer = f"raised\n{type(error).__name__}: {error}"
        if forbidden:
            answer = f"ran code\n{', '.join(sorted(set(forbidden)))}"
    finally:
        os.write(writer, answer.encode(errors="replace")[:60000])
        os._exit(0)


def _writes(mode: str | None, flags: int) -> bool:
    if mode is None:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return any(letter in mode for letter in "wax+")


class Log:
    """Trials as they come: a line of JSON each, findings on the screen, and the table.

    Attributes:
        findings: trials that should not have come out as they did.
    """

    def __init__(self, path: Path):
        """
        Args:
            path: of the JSON Lines; what was there is replaced.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.findings: List[Trial] = []
        self._counts: Dict[str, Counter] = {}

    def record(self, trials: Iterable[Trial], every: float = 10) -> None:
        """Take all trials, with a line of progress every so many seconds."""
        last = time.monotonic()
        with open(self.path, "w", encoding="utf-8") as file:
            for n, trial in enumerate(trials, start=1):
                self._counts.setdefault(trial.kind, Counter())[trial.outcome] += 1
                file.write(json.dumps(trial._asdict(), ensure_ascii=True) + "\n")
                file.flush()
                if trial.is_finding:
                    self.findings.append(trial)
                    print(f"FOUND {trial.kind} {trial.name}: {trial.outcome}: {trial.detail[:300]}")
                if time.monotonic() - last >= every:
                    last = time.monotonic()
                    print(f"{n} trials, {len(self.findings)} findings", flush=True)

    def table(self) -> str:
        """Markdown: a row a kind, a column an outcome, findings last."""
        outcomes = sorted({o for counts in self._counts.values() for o in counts})
        outcomes.sort(key=lambda outcome: outcome in FINDINGS)
        rows = [
            [kind, sum(counts.values()), *(counts[outcome] for outcome in outcomes)]
            for kind, counts in self._counts.items()
        ]
        return tabulate(rows, ["", "trials", *outcomes], tablefmt="pipe")
