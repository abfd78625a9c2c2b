"""The exceptions for invalid user input and for a training that diverged."""


class InputError(ValueError):
    """Invalid user input: a config key, a data set, an image or a checkpoint.

    The message is one clear line that names the key or file; the tools print it alone, without a
    stack trace.
    """


class TrainingDiverged(FloatingPointError):
    """A training whose losses are not finite. The message says since when, and what to try."""
