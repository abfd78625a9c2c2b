"""Exceptions that end a command with one line, and without a stack trace."""

from __future__ import annotations

# Of a message; what it quotes of a file can be of any length.
MAX_CHARACTERS = 4000


class InputError(ValueError):
    """Invalid user input: a config key, a data set, an image or a checkpoint.

    The message is one clear line that names the key or file; the tools print it alone, without a
    stack trace. Of one longer than MAX_CHARACTERS, the middle is left out.
    """

    def __init__(self, message: str = ""):
        half = MAX_CHARACTERS // 2
        if len(message) > MAX_CHARACTERS:
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)


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
