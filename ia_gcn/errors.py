"""The one exception for what the person at the keyboard can put right."""


class InputError(ValueError):
    """Bad input: a config key, a data set, an image or a checkpoint.

    The message is one clear line that names the key or file; the tools print it alone, without a
    stack trace.
    """


class TrainingDiverged(FloatingPointError):
    """A training whose losses are not finite. The message says since when, and what to try."""
