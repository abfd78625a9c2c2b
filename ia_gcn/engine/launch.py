"""Start one or several processes, with or without GPUs."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Callable, Dict, List, NamedTuple, Sequence
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing import _prctl_pr_set_pdeathsig

from ..errors import InputError, ProcessDied, Stopped
from ..processes import EXPECTED_ERRORS, STOP_SIGNALS, on_stop_signals
from .machine_watch import watch_machines

# Seconds that the other processes have to end by themselves after one has failed.
GRACE = 10

# Of a collective operation, as detectron2 has it.
TIMEOUT = timedelta(minutes=30)


class Job(NamedTuple):
    """How the processes of this machine find each other, and those of other machines.

    init: a URL for init_process_group, or the port of the TCPStore in this machine's parent.
    """

    local_size: int
    machines: int
    machine_rank: int
    init: str | int

    @property
    def world_size(self) -> int:
        """The number of processes on all machines."""
        return self.local_size * self.machines

    @property
    def first_machine(self) -> str:
        """The name or address of the machine with the first process, where there are several."""
        return os.environ["MASTER_ADDR"] if self.init == "env://" else urlparse(self.init).hostname


class End(NamedTuple):
    """How a process of the job has ended.

    report: the error that its user can understand, or the stack trace of another one.
    was_killed: by its parent, because another one had failed.
    """

    local_rank: int
    exitcode: int
    report: BaseException | str | None
    was_killed: bool

    @property
    def failed(self) -> bool:
        return self.exitcode != 0 or self.report is not None


def launch(
    main: Callable[..., int],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Sequence = (),
) -> int:
    """Run `main(*args)` in every process of a job and return 0, or an exit status of what failed.

    Under torchrun, this process is one of the job's and joins it. Else num_processes of them are
    started on this machine: with NCCL and a GPU each, or with gloo on the CPU where there are none.
    SIGINT and SIGTERM are passed on to them, and a second signal ends them at once. They don't
    outlive this process.

    Args:
        main: returns an exit status.
        num_processes: on this machine.
        num_machines, machine_rank: as detectron2's `launch`.
        dist_url: as detectron2's; "auto" on one machine: a free port of it.
    Raises:
        InputError, TrainingDiverged, OSError: the first process that failed did with it; the
            others are ended.
        ProcessDied: a process was ended by a signal; under torchrun, another one was, whatever by.
        Stopped: the job was, by a signal.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return _run_under_torchrun(main, args)
    if num_processes * num_machines == 1:
        return main(*args)
    if torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(f"--num-gpus {num_processes}: this machine has {found}")
    # torch's C++ code warns of what its users can't change, such as parameters that DDP found used.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    store = None
    if dist_url == "auto":
        if num_machines > 1:
            raise InputError("--num-machines: --dist-url must be tcp://FIRST-MACHINE:PORT")
        # The port is bound before anybody is told of it.
        store = dist.TCPStore("127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False)
    job = Job(num_processes, num_machines, machine_rank, store.port if store else dist_url)
    return _outcome(_run_processes(main, args, job), job)


def _run_under_torchrun(main: Callable[..., int], args: Sequence) -> int:
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    machine_rank = int(os.environ["RANK"]) // local_size
    machines = int(os.environ["WORLD_SIZE"]) // local_size
    _join(int(os.environ["LOCAL_RANK"]), Job(local_size, machines, machine_rank, "env://"))
    try:
        return main(*args)
    except Stopped as stop:
        if comm.is_main_process():
            raise
        return 128 + stop.signum
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        # Without the place in gloo's code.
        reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0])
        raise ProcessDied(
            f"process {comm.get_rank()} of {comm.get_world_size()} has lost another one: {reason}"
        ) from error


def _join(local_rank: int, job: Job) -> None:
    """Make this process one of the job's."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    rank, size = job.machine_rank * job.local_size + local_rank, job.world_size
    if isinstance(job.init, int):
        store = dist.TCPStore("127.0.0.1", job.init, size, is_master=False, timeout=TIMEOUT)
        how = {"store": store}
    else:
        how = {"init_method": job.init}
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT, **how)
    # detectron2 wants to know which processes share a machine.
    for first in range(0, size, job.local_size):
        group = dist.new_group(list(range(first, first + job.local_size)))
        if first <= rank < first + job.local_size:
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()
    if job.machines > 1:
        watch_machines(job.first_machine, local_rank)


def _run_processes(main: Callable[..., int], args: Sequence, job: Job) -> List[End]:
    """Run the job's processes on this machine: how they ended, in that order.

    Raises:
        Stopped: a second signal has ended them all.
    """
    context = multiprocessing.get_context("spawn")
    processes, reports = [], []
    # Its start unblocks signals.
    resource_tracker.ensure_running()
    # Nothing interrupts a process before it can handle signals: it starts with them blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        work = main, args, job, multiprocessing.get_start_method(), os.getpid()
        for local_rank in range(job.local_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(local_rank, writer, *work))
            process.start()
            writer.close()
            processes.append(process)
            reports.append(reader)
        with on_stop_signals(lambda signum: _signal(processes, signum), _kill_all(processes)):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return _wait(processes, reports)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.join()


def _signal(processes: Sequence[multiprocessing.Process], signum: int) -> None:
    """Send a signal to those that run."""
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signum)


def _kill_all(processes: Sequence[multiprocessing.Process]) -> Callable[[int], None]:
    def handle(signum: int) -> None:
        _signal(processes, signal.SIGKILL)
        raise Stopped(signum)

    return handle


def _wait(
    processes: Sequence[multiprocessing.Process], reports: Sequence[connection.Connection]
) -> List[End]:
    """Wait until all have ended; GRACE seconds after one failed, end the others.

    After a signal, the main process may take its time for the checkpoint.
    """
    running = dict(enumerate(processes))
    reported: Dict[int, BaseException | str] = {}
    ends, kill_at = [], math.inf
    while running:
        if time.monotonic() >= kill_at:
            _signal(list(running.values()), signal.SIGKILL)
        # Not by their sentinels: a killed process's data-loading workers hold that for some time.
        time.sleep(0.05)
        for local_rank, process in list(running.items()):
            ended = process.exitcode is not None
            if local_rank not in reported and reports[local_rank].poll():
                with suppress(EOFError):
                    reported[local_rank] = reports[local_rank].recv()
            report = reported.get(local_rank)
            was_killed = time.monotonic() >= kill_at and process.exitcode == -signal.SIGKILL
            end = End(local_rank, process.exitcode or 0, report, was_killed)
            if ended:
                del running[local_rank]
                ends.append(end)
            if end.failed and not (isinstance(report, Stopped) and local_rank):
                kill_at = min(kill_at, time.monotonic() + GRACE)
    return ends


def _outcome(ends: Sequence[End], job: Job) -> int:
    """The exit status of a job, or its error: of several, the one that explains the others."""

    def order(end: End) -> int:
        if end.exitcode < 0 and end.report is None:
            return 2 if -end.exitcode in STOP_SIGNALS else 0
        kinds = EXPECTED_ERRORS, Stopped, str
        return next((i for i, kind in enumerate(kinds, 1) if isinstance(end.report, kind)), 4)

    failed = [end for end in ends if end.failed and (end.report or not end.was_killed)]
    if not failed:
        return 0
    first = min(failed, key=order)
    rank = job.machine_rank * job.local_size + first.local_rank
    if isinstance(first.report, BaseException):
        raise first.report
    if -first.exitcode in STOP_SIGNALS:
        raise Stopped(-first.exitcode)
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        why = " (out of memory?)" if name == "SIGKILL" else ""
        raise ProcessDied(f"process {rank} of {job.world_size} was ended by {name}{why}")
    if first.report:
        print(f"process {rank} of {job.world_size}:\n{first.report}", file=sys.stderr)
    return first.exitcode


def _process(
    local_rank: int,
    report: connection.Connection,
    main: Callable[..., int],
    args: Sequence,
    job: Job,
    start_method: str,
    parent: int,
) -> None:
    """What a process of the job does; an error goes to its parent."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        return
    # This process was spawned. Its data loaders' workers are to start as they do without it: if
    # they were spawned as well, each would import everything again.
    multiprocessing.set_start_method(start_method, force=True)
    status, problem = 1, None
    try:
        with on_stop_signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            if not torch.cuda.is_available():
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.local_size))
            _join(local_rank, job)
            status = main(*args)
            dist.destroy_process_group()
    except EXPECTED_ERRORS as error:
        problem = error
    except Stopped as stop:
        status, problem = 128 + stop.signum, stop
    except Exception:
        problem = traceback.format_exc()
    if problem is not None:
        report.send(problem)
    sys.exit(status)
