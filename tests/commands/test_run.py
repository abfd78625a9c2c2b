"""How a command ends: its exit status and its line."""

import os
import signal
import time

import pytest

from ia_gcn.commands.common import run
from ia_gcn.errors import ProcessDied, Stopped
from tests.helpers.commands import run_process


@pytest.fixture(autouse=True)
def _same_handlers():
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signals}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_a_line_and_128_more_than_its_number(signum, capsys):
    assert run("it", lambda: os.kill(os.getpid(), signum)) == 128 + signum
    assert run("it", lambda: os.kill(os.getpid(), signum), "do it again") == 128 + signum
    assert capsys.readouterr().err == "it: interrupted\nit: interrupted; do it again\n"


def test_a_command_may_name_other_signals(capsys):
    signals = (signal.SIGTERM, signal.SIGHUP)
    status = run("it", lambda: os.kill(os.getpid(), signal.SIGHUP), signals=signals)
    assert status == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "it: interrupted\n"


@pytest.mark.parametrize("signals", [[], [signal.SIGTERM]])
def test_the_handlers_of_before_come_back(monkeypatch, signals):
    monkeypatch.setattr("ia_gcn.processes.SAME_SIGNAL", 0.3)
    got = []
    signal.signal(signal.SIGTERM, lambda *_: got.append("the one of before"))
    run("it", lambda: [os.kill(os.getpid(), signum) for signum in signals])
    if signals:
        os.kill(os.getpid(), signal.SIGTERM)
        # The same again, while the process ends.
        assert not got
        time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGTERM)
    assert got == ["the one of before"]


SIGNAL_AT_EXIT = """
import atexit, os, signal, sys
from ia_gcn.commands.common import run

def hit():
    os.kill(os.getpid(), signal.SIGTERM)

atexit.register(hit)
sys.exit(run("it", hit))
"""


def test_a_signal_that_comes_twice_does_not_cut_the_end():
    outcome = run_process("-c", SIGNAL_AT_EXIT)
    assert (outcome.returncode, outcome.stderr) == (143, "it: interrupted\n")


# Python leaves out what functions raise that it calls around a fork; logging has one, for example.
SIGNAL_AT_FORK = """
import os, signal, sys, time

def hit():
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(1000))

os.register_at_fork(**{sys.argv[1]: hit})
from ia_gcn.commands.common import run

def work():
    if os.fork() == 0:
        os._exit(0)
    time.sleep(10)

sys.exit(run("it", work))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_a_signal_during_a_fork_is_not_lost(moment):
    outcome = run_process("-c", SIGNAL_AT_FORK, moment)
    assert (outcome.returncode, outcome.stderr) == (143, "it: interrupted\n")


SIGNAL_AT_ITER = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from ia_gcn.commands.common import run

class Batches:
    def __iter__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return iter([[0], [1]] * 1000)

def work():
    for _ in DataLoader([0.0, 1.0], batch_sampler=Batches(), num_workers=1):
        time.sleep(0.1)

sys.exit(run("it", work))
"""


@pytest.mark.slow
def test_a_signal_while_a_loader_is_made_comes_after_it():
    outcome = run_process("-c", SIGNAL_AT_ITER)
    assert (outcome.returncode, outcome.stderr) == (143, "it: interrupted\n")


LOST_PARENT = """
import os, sys, time
from multiprocessing import process, resource_sharer
from multiprocessing.connection import Client
from ia_gcn.processes import ignore_lost_parent

ignore_lost_parent()
address, _ = resource_sharer.DupFd(os.dup(1))._id
Client(address, authkey=process.current_process().authkey).close()
time.sleep(0.5)
sys.excepthook(ValueError, ValueError("another"), None)
"""


def test_a_parent_that_is_gone_is_nothing_to_print():
    outcome = run_process("-c", LOST_PARENT)
    assert (outcome.returncode, outcome.stderr) == (0, "ValueError: another\n")


class Hit:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))


def test_a_signal_in_a_destructor_is_not_lost(capsys):
    def work():
        Hit()
        time.sleep(10)

    assert run("it", work) == 143
    assert capsys.readouterr().err == "it: interrupted\n"


def test_a_signal_in_a_destructor_at_the_end_comes_too_late(capsys):
    assert run("it", lambda: Hit() and None) == 0
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_the_work_says_where_it_stopped(capsys):
    def work():
        raise Stopped(signal.SIGTERM, "stopped half-way")

    assert run("it", work, "go on") == 143
    assert capsys.readouterr().err == "it: stopped half-way; go on\n"


@pytest.mark.parametrize("error", [ProcessDied("one died"), OSError(28, "full")])
def test_what_may_go_wrong_is_a_line(error, capsys):
    def work():
        raise error

    assert run("it", work) == 1
    assert capsys.readouterr().err == f"it: {error}\n"


def test_a_status_is_handed_on():
    assert (run("it", lambda: 3), run("it", lambda: None)) == (3, 0)
