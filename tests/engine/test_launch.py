"""Jobs of several processes on the CPU: what comes of it when one of them fails, or is stopped."""

import os
import signal
import sys
import time

import pytest
from detectron2.utils import comm

from ia_gcn.engine import launch
from ia_gcn.errors import InputError, ProcessDied, Stopped

pytestmark = pytest.mark.slow

# `ia_gcn.engine.launch` is the function.
launch_module = sys.modules[launch.__module__]


def note(folder):
    """Write down the rank; wait until all have."""
    rank = str(comm.get_rank())
    (folder / rank).write_text(str(os.getpid()))
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.05)
    return int(rank)


def die(folder, signum):
    if note(folder) == 1:
        os.kill(os.getpid(), signum)
    time.sleep(600)


def refuse(folder):
    if note(folder) == 1:
        raise InputError("no such thing")
    time.sleep(600)


def break_down(folder):
    if note(folder) == 1:
        raise KeyError("of a bug")
    time.sleep(600)


def tell_parent(folder, signum):
    if note(folder) == 1:
        os.kill(os.getppid(), signum)
    time.sleep(600)


def ignore(folder, signum):
    """Two signals to the parent; the processes are deaf to the first one."""
    for known in (signal.SIGINT, signal.SIGTERM):
        signal.signal(known, signal.SIG_IGN)
    if note(folder) == 1:
        os.kill(os.getppid(), signum)
        time.sleep(1.5)
        os.kill(os.getppid(), signum)
    time.sleep(600)


def give_status(folder):
    return 7 * note(folder)


def lose_connection():
    raise RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:31926: "
        "Connection reset by peer"
    )


def break_down_alone():
    raise RuntimeError("of a bug")


@pytest.fixture
def folder(tmp_path):
    """Where the processes write down their ids; afterwards none of them runs."""
    yield tmp_path
    assert len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_died_is_named(folder, signum):
    with pytest.raises(ProcessDied, match=f"process 1 of 2 was ended by {signum.name}"):
        launch(die, 2, args=(folder, signum))


def test_an_error_ends_all(folder):
    with pytest.raises(InputError, match="no such thing"):
        launch(refuse, 2, args=(folder,))


def test_a_bug_shows_where_it_is(folder, capfd):
    assert launch(break_down, 2, args=(folder,)) == 1
    error = capfd.readouterr().err
    assert error.startswith("process 1 of 2:\nTraceback")
    assert error.strip().endswith("KeyError: 'of a bug'")
    assert "in break_down" in error


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_parent_passes_signals_on(folder, signum):
    with pytest.raises(Stopped) as caught:
        launch(tell_parent, 2, args=(folder, signum))
    assert caught.value.signum == signum


def test_a_second_signal_ends_at_once(folder):
    with pytest.raises(Stopped):
        launch(ignore, 2, args=(folder, signal.SIGTERM))


def test_an_exit_status_is_handed_on(folder):
    assert launch(give_status, 2, args=(folder,)) == 7


def test_several_machines_need_an_address():
    with pytest.raises(InputError, match="--dist-url"):
        launch(give_status, 1, num_machines=2)


@pytest.fixture
def under_torchrun(monkeypatch):
    monkeypatch.setattr(launch_module, "_join", lambda local_rank, job: None)
    for name, value in {"LOCAL_WORLD_SIZE": 1, "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))


def test_under_torchrun_a_lost_process_is_one_line(under_torchrun):
    with pytest.raises(ProcessDied) as caught:
        launch(lose_connection, 1)
    assert str(caught.value) == (
        "process 0 of 1 has lost another one: Read error [10.0.0.2]:31926: Connection reset by peer"
    )
    with pytest.raises(RuntimeError, match="of a bug"):
        launch(break_down_alone, 1)
