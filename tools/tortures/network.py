"""Hosts on this machine, each with a network, a name and processes of its own, joined by a switch.

A host is a set of Linux namespaces, joined by a pair of veth devices to a bridge, which is in a
network namespace as well: the machine's own network is not touched. The namespaces have no names:
they end with their processes, and those with this process, however it ends. So nothing is left to
be removed, not even after SIGKILL.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import List, Mapping, Sequence

COMMANDS = ("ip", "mount", "nsenter", "setpriv", "unshare")

# Addresses of host 1, host 2, ...
ADDRESS = "10.77.0.{}"

# What follows is killed with the thread that starts it.
BOUND = ["setpriv", "--pdeathsig", "KILL"]

SWITCH = """
ip link add bridge type bridge
ip link set bridge up
echo ready
exec sleep infinity
"""

# Arguments: process of the switch, port, address, name, hosts file, number of bind mounts, of each
# the source and the target, and a command. A port that was the host's before is replaced.
HOST = """
nsenter -t "$1" -n ip link del "$2" 2>/dev/null || true
ip link add eth0 type veth peer name "$2" netns "$1"
nsenter -t "$1" -n ip link set "$2" master bridge up
ip addr add "$3/24" dev eth0
ip link set eth0 up
ip link set lo up
echo "$4" > /proc/sys/kernel/hostname
mount --bind "$5" /etc/hosts
mounts="$6"
shift 6
while [ "$mounts" -gt 0 ]; do
    mount --bind "$1" "$2"
    mounts=$((mounts - 1))
    shift 2
done
exec unshare --pid --fork --kill-child --mount-proc "$@"
"""


class Host:
    """A host that runs one command, and ends with it.

    Attributes:
        name: of the host.
    """

    def __init__(self, name: str, process: subprocess.Popen, log: Path):
        self.name = name
        self._process, self._log = process, log

    def text(self) -> str:
        """What the command has printed, in all starts of a host of this name."""
        return self._log.read_text(errors="replace")

    def status(self) -> int | None:
        """The exit status of the command; None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Send SIGTERM to the command."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        for child in map(int, children.split()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    def kill(self) -> None:
        """End all of its processes by SIGKILL; its namespaces go with them."""
        self._process.kill()
        self._process.wait()


class Network:
    """A switch, and the hosts that are joined to it; a context manager that ends all of them."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: of this network alone, for what the hosts print, `NAME.txt`.
        """
        self._folder = folder
        self._hosts: List[Host] = []

    def __enter__(self) -> Network:
        command = [*BOUND, "unshare", "--net", "sh", "-ec", SWITCH]
        self._switch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._switch.stdout.readline()
        return self

    def __exit__(self, *_) -> None:
        for host in self._hosts:
            host.kill()
        self._switch.kill()
        self._switch.wait()
        self._switch.stdout.close()

    def start(
        self,
        number: int,
        command: Sequence,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        mounts: Mapping[Path, Path] | None = None,
    ) -> Host:
        """Start host NUMBER, from 1 on, whose name is hostNUMBER and by which the others find it.

        Args:
            command: ends with the host; its first process there.
            env: added to the environment.
            cwd: where it is called.
            mounts: folders of this machine, by where the host has them in place of those that all
                hosts share.
        """
        name = f"host{number}"
        names = self._folder / "hosts"
        lines = [f"{ADDRESS.format(i)} host{i}" for i in range(1, 10)]
        names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        binds = [str(path) for pair in (mounts or {}).items() for path in reversed(pair)]
        where = [self._switch.pid, f"port{number}", ADDRESS.format(number), name, names]
        shell = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", HOST, "host"]
        arguments = [*where, len(binds) // 2, *binds, *command]
        log = self._folder / f"{name}.txt"
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [*BOUND, *shell, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=cwd,
                env={**os.environ, **(env or {})},
            )
        self._hosts.append(Host(name, process, log))
        return self._hosts[-1]

    def unplug(self, number: int) -> None:
        """Pull the cable of a host: packets from and to it are lost, and nobody is told."""
        target = ["nsenter", "-t", str(self._switch.pid), "-n"]
        subprocess.run([*target, "ip", "link", "set", f"port{number}", "down"], check=True)


def unavailable() -> str:
    """Why there can be no hosts on this machine; "" where there can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        return f"commands that are not there: {', '.join(missing)}"
    with tempfile.TemporaryDirectory() as folder, Network(Path(folder)) as network:
        host = network.start(1, ["true"])
        if host._process.wait():
            return (host.text().strip().splitlines() or ["namespaces can't be made"])[-1]
    return ""
