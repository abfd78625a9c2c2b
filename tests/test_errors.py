"""The message of an error that a user reads."""

import pickle

from ia_gcn.errors import MAX_CHARACTERS, InputError


def test_a_message_is_kept():
    assert str(InputError("data.csv: line 3: no label")) == "data.csv: line 3: no label"
    assert str(InputError("x" * MAX_CHARACTERS)) == "x" * MAX_CHARACTERS
    assert str(InputError()) == ""


def test_of_a_long_one_both_ends_are():
    message = str(InputError(f"data.csv: {'x' * 10**6} is no file"))
    assert message.startswith("data.csv: xxx")
    assert message.endswith("xxx is no file")
    assert len(message) < MAX_CHARACTERS + 10


def test_it_passes_between_processes():
    error = InputError("y" * 10**5)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
