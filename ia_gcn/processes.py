"""Processes and signals: Ctrl-C, SIGTERM, and what happens to the processes that load data."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Callable, Iterator, Sequence

from .errors import InputError, ProcessDied, Stopped
from .io.images import UnreadableImage

# Errors that end a command with one line instead of a stack trace.
EXPECTED_ERRORS = (InputError, OSError, UnreadableImage, FloatingPointError, ProcessDied)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Within so many seconds a second signal is the first one again: terminals and batch systems send it
# to all processes of a job, and some of these pass it on to others.
SAME_SIGNAL = 1.0


# Whether this process is about to fork, or just did, see `_is_ignored_in`.
_forking = False


def _set_forking(value: bool) -> None:
    global _forking
    _forking = value


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=partial(_set_forking, True),
        after_in_parent=partial(_set_forking, False),
        after_in_child=partial(_set_forking, False),
    )


def _is_ignored_in(frame: FrameType | None) -> bool:
    """Whether an exception that is raised now would only be printed by Python, or another because
    of it: in a destructor, in functions that are called around a fork, and where torch begins to
    load data, as it can't destroy a loader that is half made."""
    while frame is not None and not _is_fragile(frame):
        frame = frame.f_back
    return _forking or frame is not None


def _is_fragile(frame: FrameType) -> bool:
    name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
    return name == "__del__" or (name, module) == ("__init__", "torch.utils.data.dataloader")


def raise_stopped(signum: int) -> None:
    """A handler for `on_stop_signals`.

    Raises:
        Stopped: without a message.
    """
    raise Stopped(signum)


def end_at_once(signum: int) -> None:
    """A handler for `on_stop_signals`: the process ends as if the signal had no handler."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


@contextmanager
def on_stop_signals(
    first: Callable[[int], None] = raise_stopped,
    again: Callable[[int], None] = end_at_once,
    signals: Sequence[int] = STOP_SIGNALS,
) -> Iterator[None]:
    """Handle signals that ask for an end; one that the process ignores stays ignored.

    Afterwards the handlers are those of before; after a signal, from SAME_SIGNAL on.

    Python has signal handlers in the main thread only: in another one, nothing is changed.

    Args:
        first: called with the number of the first signal.
        again: called with that of each later one, unless it is the same (SAME_SIGNAL).
        signals: their numbers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received, over = None, False

    def send_again(signum):
        if not over:
            os.kill(os.getpid(), signum)

    def handle(signum, frame):
        nonlocal received
        if _is_ignored_in(frame):
            threading.Timer(0.05, send_again, (signum,)).start()
            return
        now = time.monotonic()
        if received is None:
            received = now
            first(signum)
        elif now - received >= SAME_SIGNAL:
            again(signum)

    before = {
        signum: signal.signal(signum, handle)
        for signum in signals
        if signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        over = True
        for signum, handler in before.items():
            handler = handler or signal.SIG_DFL
            signal.signal(signum, handler if received is None else _later(handler, received))


def _later(handler, received: float) -> Callable[[int, FrameType | None], None]:
    """What takes the place of a handler after a signal that came at `received`: the same signal
    again changes nothing, not even while the process ends, and another one goes to the handler."""

    def handle(signum, frame):
        if time.monotonic() - received >= SAME_SIGNAL:
            signal.signal(signum, handler)
            os.kill(os.getpid(), signum)

    return handle


@contextmanager
def blocked_stop_signals() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM wait.

    A process that is forked meanwhile has them blocked from its start, see
    `leave_signals_to_parent`.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker_id: int) -> None:
    """For DataLoader's worker_init_fn: only its parent ends a worker.

    Else one that Ctrl-C or a batch system has ended would be missing in the iteration that is to be
    finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        # Its folder of temporary files, which an orderly end removes.
        multiprocessing.util._run_finalizers()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def ignore_lost_parent() -> None:
    """In a process that loads data, let a parent that is gone while it fetches a tensor be nothing
    to print."""

    def print_others(kind, error, traceback):
        if not issubclass(kind, (EOFError, ConnectionError)):
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = print_others
