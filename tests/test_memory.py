"""Memory that is freed stays with the process, where the C library is glibc."""

import platform
import subprocess
import sys

import pytest

from ia_gcn import memory

# Allocates and frees 100 MB and says how much of it the process still has.
PROGRAM = """
import ctypes, os
from runpy import run_path

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def kept():
    before = resident()
    buffer = libc.malloc(100_000_000)
    ctypes.memset(buffer, 1, 100_000_000)
    assert resident() - before > 99_000_000
    libc.free(buffer)
    return resident() - before

if {keep}:
    assert run_path("ia_gcn/memory.py")["keep_freed_memory"]()
# A process that is forked, such as a loader worker, does as its parent.
child = os.fork()
if child:
    os.waitpid(child, 0)
print(kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept(keep, repository):
    program = PROGRAM.replace("{keep}", str(keep))
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    kept = [int(line) for line in result.stdout.split()]
    assert len(kept) == 2
    assert all((size > 99_000_000) if keep else (size < 20_000_000) for size in kept)


@pytest.mark.parametrize("error", [TypeError, OSError])
def test_without_such_a_library_nothing_happens(monkeypatch, error):
    def no_library(name):
        raise error(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", no_library)
    assert not memory.keep_freed_memory()
    assert not memory.share_freed_memory()


def test_a_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
    assert not memory.share_freed_memory()


# ---------------------------------------------------------------------------- what is available


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write the files of a machine with 64 kB available, by their paths."""
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)

    def write(**files):
        files = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   64 kB\n", **files}
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    return write


def group(path, limit, used, files=0):
    """The files of a control group, of which the kernel can drop half of `files` each."""
    return {
        f"sys/fs/cgroup{path}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{path}/memory.current": f"{used}\n",
        f"sys/fs/cgroup{path}/memory.stat": (
            f"anon 1\nfile 7\ninactive_file {files // 2}\nactive_file {files // 2}\n"
        ),
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # Without limits, or with one that is beyond the machine.
        ({}, 65536),
        (group("/a/b", "max", 100), 65536),
        (group("/a/b", 10**9, 100), 65536),
        # The least of the process's own group and those above it.
        (group("/a/b", 5000, 2000), 3000),
        ({**group("/a/b", 5000, 2000), **group("/a", 9000, 8000)}, 1000),
        ({**group("/a/b", "max", 2000), **group("", 7000, 4000)}, 3000),
        # Another group's.
        (group("/a/c", 10, 5), 65536),
        # Files that were read count as used until the memory is needed.
        (group("/a/b", 5000, 4800, 4000), 4200),
        # The limit was lowered.
        (group("/a/b", 100, 500), 0),
    ],
)
def test_the_least_of_the_machine_and_its_control_groups_is_available(system, groups, expected):
    system(**{"proc/self/cgroup": "4:memory:/old\n0::/a/b\n"}, **groups)
    assert memory.available_memory() == expected


def test_without_control_groups_it_is_the_machine_s(system):
    system()
    assert memory.available_memory() == 65536


def test_a_system_that_does_not_say_is_no_error(system):
    assert memory.available_memory() is None


@pytest.mark.skipif(platform.system() != "Linux", reason="of Linux")
def test_this_machine_has_some_memory():
    assert 0 < memory.available_memory() < 2**50
