"""Notices a machine of a job that is gone without a word."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
from contextlib import suppress

from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Seconds without a sign of life after which a machine is lost: until the first question whether it
# is there, between questions, and how many stay without an answer.
IDLE, INTERVAL, QUESTIONS = 10, 5, 4
SILENCE = IDLE + INTERVAL * QUESTIONS

# Seconds to connect to the first machine.
CONNECT = 60

# Bytes by which a process of the job is known, so that the end of a connection of anybody else's
# ends nothing.
TOKEN = 16


def watch_machines(first_machine: str, local_rank: int) -> None:
    """End this process once a machine of the job has been silent for SILENCE seconds.

    The processes of a machine that loses power or network close no connection, and the others
    would wait for them until a collective operation times out, after `launch.TIMEOUT`. So the first
    process of each machine has a connection to the job's first process, over which nothing is
    sent: the two systems ask each other whether they are there (TCP keep-alive). It makes no
    difference how busy the processes are. What started this process ends the others.

    A collective operation of all processes, after init_process_group. The first machine notices
    the loss of any other one, and each of them the loss of the first one.

    Args:
        first_machine: name or address of the first process's machine.
        local_rank: of this process.
    """
    server = _listen() if comm.is_main_process() else None
    token = secrets.token_bytes(TOKEN)
    port, token = comm.all_gather((server and server.getsockname()[1], token))[0]
    if server:
        _start(_accept, server, token)
    elif local_rank == 0:
        try:
            connection = socket.create_connection((first_machine, port), CONNECT)
            connection.sendall(token)
        except OSError as error:
            logger.warning(
                f"Machine {first_machine}, port {port}: {error}; lost machines are noticed late"
            )
        else:
            _watch(connection)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _start(function, *args) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _accept(server: socket.socket, token: bytes) -> None:
    while True:
        _start(_admit, server.accept()[0], token)


def _admit(connection: socket.socket, token: bytes) -> None:
    """Watch the connection if it is one of the job's, or else close it."""
    connection.settimeout(CONNECT)
    with suppress(OSError), connection.makefile("rb") as file:
        if secrets.compare_digest(file.read(TOKEN), token):
            _watch(connection)
            return
    connection.close()


def _watch(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", IDLE),
        ("TCP_KEEPINTVL", INTERVAL),
        ("TCP_KEEPCNT", QUESTIONS),
    ):
        # Their names on Linux.
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    _start(_wait, connection)


def _wait(connection: socket.socket) -> None:
    """Wait until the other process ends, which changes nothing, or until its machine is lost."""
    # Without what IPv6 puts before an address of IPv4.
    address = connection.getpeername()[0].removeprefix("::ffff:")
    try:
        connection.recv(1)
    except OSError as error:
        print(
            f"machine {address} of this job is lost ({error.strerror}): process "
            f"{comm.get_rank()} ends",
            file=sys.stderr,
            flush=True,
        )
        # The main thread may be waiting for that machine.
        os._exit(1)
