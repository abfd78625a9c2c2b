"""Exceptions that end a command with one line, and without a stack trace."""

from __future__ import annotations


class InputError(ValueError):
    """Invalid user input: a config key, a data set, an image or a checkpoint.

    The message is one clear line that names the key or file; the tools print it alone, without a
    stack trace.
    """


class TrainingDiverged(FloatingPointError):
    """A training whose losses are not finite. The message says since when, and what to try."""


class ProcessDied(RuntimeError):
    """A process of a job, or one that loads data, was ended from outside. The message names it."""


class Stopped(KeyboardInterrupt):
    """Work that Ctrl-C or SIGTERM has ended in an orderly way.

    The message says what was done and how to go on; it may be empty.

    Attributes:
        signum: the signal's number; the exit status is 128 more.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(signum, message)
        self.signum = signum
        self.message = message

    def __str__(self):
        return self.message
