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
