"""What a process does when another machine of its job ends, or is lost.

That a lost machine is noticed is tried by tests/tools/test_torture_hosts.py.
"""

import os
import socket
import threading

import pytest

from ia_gcn.engine import machine_watch


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def end(monkeypatch):
    def raise_ended(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", raise_ended)


@pytest.fixture
def connection():
    """Both sides of one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


def test_a_process_that_ends_does_not_end_another(connection, end):
    near, far = connection
    far.close()
    machine_watch._wait(near)


def test_a_lost_machine_ends_the_process(end, capsys):
    class Lost:
        def getpeername(self):
            return "10.0.0.2", 1234

        def recv(self, size):
            raise TimeoutError(110, "Connection timed out")

    with pytest.raises(Ended, match="1"):
        machine_watch._wait(Lost())
    line = "machine 10.0.0.2 of this job is lost (Connection timed out): process 0 ends\n"
    assert capsys.readouterr().err == line


def test_only_connections_of_the_job_are_watched(connection, monkeypatch):
    near, far = connection
    watched = []
    monkeypatch.setattr(machine_watch, "_watch", watched.append)
    near.sendall(b"a port scanner's")
    machine_watch._admit(far, b"0123456789abcdef")
    assert not watched
    assert near.recv(1) == b""


def test_a_connection_of_the_job_is_watched(connection, monkeypatch):
    near, far = connection
    watched = []
    monkeypatch.setattr(machine_watch, "_watch", watched.append)
    near.sendall(b"01234567")
    near.sendall(b"89abcdef")
    machine_watch._admit(far, b"0123456789abcdef")
    assert watched == [far]
    assert far.fileno() > 0


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="Linux")
def test_systems_ask_each_other_before_half_a_minute_is_over(connection):
    near, far = connection
    machine_watch._watch(near)
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
    idle, interval, questions = (near.getsockopt(socket.IPPROTO_TCP, x) for x in options)
    assert idle + interval * questions == machine_watch.SILENCE == 30
    far.close()
    for thread in threading.enumerate():
        if thread.name.endswith("(_wait)"):
            thread.join()
