"""tools/torture.py hosts: its network, what it finds, and some of its trials."""

import argparse
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.commands import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from tortures import hosts, network
from tortures.hosts import Line, Step, steps


@pytest.fixture(scope="session")
def can_have_hosts():
    reason = network.unavailable()
    if reason:
        pytest.skip(reason)


# The network


LISTEN = """
import socket
server = socket.create_server(("", 5000))
connection, (address, _) = server.accept()
print(address, connection.recv(100).decode(), flush=True)
"""
SPEAK = """
import socket, time
while True:
    try:
        connection = socket.create_connection(("host1", 5000))
    except OSError:
        time.sleep(0.05)
    else:
        connection.send(socket.gethostname().encode())
        break
"""


def test_hosts_find_each_other_by_name(can_have_hosts, tmp_path):
    with network.Network(tmp_path) as net:
        first = net.start(1, [sys.executable, "-c", LISTEN])
        second = net.start(2, [sys.executable, "-c", SPEAK])
        while None in (first.status(), second.status()):
            time.sleep(0.02)
        assert first.text() == "10.77.0.2 host2\n", second.text()


HOLD = """
import sys
sys.path.insert(0, "tools")
from pathlib import Path
from tortures.network import Network
with Network(Path(sys.argv[1])) as net:
    host = net.start(1, ["sh", "-c", "echo up; exec sleep 98765"])
    while "up" not in host.text():
        pass
    print("up", flush=True)
    input()
"""


def sleepers():
    """The processes of HOLD's first host."""
    found = []
    for path in os.listdir("/proc"):
        try:
            with open(f"/proc/{path}/cmdline", "rb") as file:
                found += [path] * (b"98765" in file.read() and path.isdigit())
        except OSError:
            continue
    return found


def test_nothing_is_left_of_a_killed_network(can_have_hosts, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as process:
        assert process.stdout.readline() == b"up\n"
        assert sleepers()
        process.send_signal(signal.SIGKILL)
    while sleepers():
        time.sleep(0.02)


def test_without_the_commands_it_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(network.shutil, "which", lambda name: name == "ip" or None)
    missing = "commands that are not there: mount, nsenter, setpriv, unshare"
    assert network.unavailable() == missing
    (trial,) = hosts.run(argparse.Namespace())
    assert (trial.outcome, trial.detail, trial.is_finding) == ("skipped", missing, False)


# What is compared


def test_only_iterations_of_all_processes_count():
    lines = [
        Line("a", 2, 0, [3, 1], 1.0),
        Line("a", 2, 0, [2, 4], 2.0),
        Line("a", 2, 1, [5, 6], 1.0),
        Line("b", 1, 1, [8, 7, 6, 5], 4.0),
    ]
    assert steps(lines) == {("a", 0): Step([1, 2, 3, 4], 1.5), ("b", 1): Step([5, 6, 7, 8], 4.0)}


# Trials


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["2 hosts with 2 processes", "network of second host lost", "folder is not shared"]
)
def test_a_trial_ends_as_promised(can_have_hosts, tmp_path_factory, kind):
    folder = tmp_path_factory.getbasetemp() / "hosts"
    folder.mkdir(exist_ok=True)
    assert hosts.KINDS[kind](folder, random.Random(0)).problems == []


@pytest.mark.slow
def test_another_order_of_images_is_found(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "hosts"
    folder.mkdir(exist_ok=True)
    uncut = hosts.left_alone(folder)
    other = hosts.Training(folder, SEED=2)
    assert other.run_here() == 0
    problems = hosts.compare(uncut, other).problems
    assert problems[0].startswith("other images in iterations [0, ")
    assert any(problem.startswith("other losses") for problem in problems)
