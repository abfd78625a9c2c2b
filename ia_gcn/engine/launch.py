"""Start one or several processes, with or without GPUs."""

from __future__ import annotations

import os
import socket
import sys
from typing import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_d2
from detectron2.utils import comm

from ..errors import InputError, TrainingDiverged


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
    started on this machine: detectron2's way where there are GPUs, one each, and with gloo on the
    CPU where there are none.

    Args:
        main: returns an exit status.
        num_processes: on this machine.
        num_machines, machine_rank, dist_url: as detectron2's `launch`.
    Raises:
        InputError, TrainingDiverged: the error of the first process that failed; the others
            are ended.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:
        _join_torchrun()
        return main(*args)
    if num_processes * num_machines == 1:
        return main(*args)
    # torch's C++ code warns of what its users can't change, such as parameters that DDP found used.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    work = main, args, mp.get_start_method()
    try:
        if torch.cuda.is_available():
            if num_processes > torch.cuda.device_count():
                found = torch.cuda.device_count()
                raise InputError(f"--num-gpus {num_processes}: this machine has {found}")
            job = num_processes, num_machines, machine_rank, dist_url
            launch_d2(_exit_with, *job, args=work)
        else:
            if dist_url == "auto":
                dist_url = f"tcp://127.0.0.1:{_free_port()}"
            ranks = machine_rank * num_processes, num_processes, num_processes * num_machines
            mp.start_processes(
                _cpu_process, (work, dist_url, *ranks), num_processes, start_method="spawn"
            )
    except mp.ProcessExitedException as error:
        # The process has printed its error.
        return error.exit_code
    except mp.ProcessRaisedException as error:
        raise _original(error) from None
    return 0


def _original(error: mp.ProcessRaisedException) -> Exception:
    """What a process has raised, from its stack trace; anything else than bad input as it is."""
    kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
    for known in (InputError, TrainingDiverged):
        if kind.rpartition(".")[2] == known.__name__:
            return known(message)
    return error


def _join_torchrun() -> None:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    _set_local_group(local_size)


def _cpu_process(
    local_rank: int, work, dist_url, first_rank: int, num_processes: int, world_size: int
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    dist.init_process_group(
        "gloo", init_method=dist_url, rank=first_rank + local_rank, world_size=world_size
    )
    _set_local_group(num_processes)
    _exit_with(*work)


def _set_local_group(local_size: int) -> None:
    """Tell detectron2 which processes share a machine, as its own launcher does."""
    rank = dist.get_rank()
    for first in range(0, dist.get_world_size(), local_size):
        group = dist.new_group(list(range(first, first + local_size)))
        if first <= rank < first + local_size:
            comm._LOCAL_PROCESS_GROUP = group


def _exit_with(main, args, start_method: str) -> None:
    # This process was spawned. Its data loaders' workers are to start as they do without it: if
    # they were spawned as well, each would import everything again.
    mp.set_start_method(start_method, force=True)
    try:
        status = main(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if status:
        sys.exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
