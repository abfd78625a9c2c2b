"""How a command ends: its exit status and its line."""

import os
import signal

import pytest

from ia_gcn.commands.common import run
from ia_gcn.errors import ProcessDied, Stopped


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_a_line_and_128_more_than_its_number(signum, capsys):
    before = signal.getsignal(signum)
    assert run("it", lambda: os.kill(os.getpid(), signum)) == 128 + signum
    assert run("it", lambda: os.kill(os.getpid(), signum), "do it again") == 128 + signum
    assert capsys.readouterr().err == "it: interrupted\nit: interrupted; do it again\n"
    assert signal.getsignal(signum) == before


def test_a_command_may_name_other_signals(capsys):
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in signals]
    status = run("it", lambda: os.kill(os.getpid(), signal.SIGHUP), signals=signals)
    assert status == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "it: interrupted\n"
    assert [signal.getsignal(signum) for signum in signals] == before


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
