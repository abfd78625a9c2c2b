"""Pickles of plain data: what is read, and what is refused without harm."""

import collections
import io
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ia_gcn.errors import InputError
from ia_gcn.io.plain_pickle import load_plain_pickle
from tools.tortures.harness import Limits, run_in_child
from tools.tortures.pickles import attacks


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_and_arrays_are_read(tmp_path, protocol):
    value = {
        "text": "ä",
        "bytes": b"\x00\xff",
        "nested": [(1, 2.5, None, True), {"b": []}],
        "ordered": collections.OrderedDict(a=1),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "column": np.arange(6.0).reshape(2, 3)[:, 1],
        "scalar": np.float32(0.5),
        "truths": np.array([[True], [False]]),
        "empty": np.zeros((0, 4), np.float32),
        "single": np.array(3.0),
        "in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "turned": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
        "other bytes first": np.arange(3, dtype=">u4"),
        "large": np.arange(20_000, dtype=np.float16),
        "whole": 2**63,
    }
    with open(write(tmp_path / "a.pkl", value, protocol), "rb") as file:
        found = load_plain_pickle(file, "a.pkl")
    assert str(found) == str(value)
    for name, array in value.items():
        if isinstance(array, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert np.array_equal(found[name], array)


@pytest.mark.parametrize("protocol", range(6))
def test_every_plain_dtype_is_read(protocol):
    arrays = [np.ones(3, dtype) for dtype in "?bBhHiIlLefd"]
    scalars = [array[0] for array in arrays]
    data = pickle.dumps([arrays, scalars], protocol)
    found_arrays, found_scalars = load_plain_pickle(io.BytesIO(data), "a.pkl")
    for array, found in zip(arrays + scalars, found_arrays + found_scalars):
        assert type(found) is type(array)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


@pytest.mark.parametrize("protocol", range(6))
def test_what_a_file_names_twice_is_the_same_object(protocol):
    array, numbers = np.arange(3), [1, 2]
    data = pickle.dumps([array, array, numbers, numbers, "a" * 9, np.float32], protocol)
    with pytest.raises(InputError, match="float32"):
        load_plain_pickle(io.BytesIO(data), "a.pkl")
    data = pickle.dumps({"a": [array, array], "b": [numbers, numbers]}, protocol)
    found = load_plain_pickle(io.BytesIO(data), "a.pkl")
    assert found["a"][0] is found["a"][1]
    assert found["b"][0] is found["b"][1]


# {"x": array([[1, 2], [3, 4]], float32), "ä": 5L, "n": numpy.float64(0.5)} as Python 2 wrote it.
PYTHON_2 = {
    0: b"(dp0\nS'x'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\n"
    b"tp4\nS'b'\np5\ntp6\nRp7\n(I1\n(I2\nI2\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11"
    b"\nRp12\n(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@"
    b"\\x00\\x00@@\\x00\\x00\\x80@'\np15\ntp16\nbsS'\\xe4'\np17\nL5L\nsS'n'\np18\n"
    b"cnumpy.core.multiarray\nscalar\np19\n(cnumpy\ndtype\np20\n(S'f8'\np21\nI0\nI1\ntp22\nRp23"
    b"\n(I3\nS'<'\np24\nNNNI-1\nI-1\nI0\ntp25\nbS'\\x00\\x00\\x00\\x00\\x00\\x00\\xe0?'\np26\n"
    b"tp27\nRp28\ns.",
    2: b"\x80\x02}q\x00(U\x01xq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\n"
    b"q\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02K\x02\x86q\x08cnumpy\ndtype\nq\x09"
    b"U\x02f4q\x0aK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01<q\x0dNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    b"K\x00tq\x0eb\x89U\x10\x00\x00\x80?\x00\x00\x00@\x00\x00@@\x00\x00\x80@q\x0ftq\x10b"
    b"U\x01\xe4q\x11\x8a\x01\x05U\x01nq\x12cnumpy.core.multiarray\nscalar\nq\x13h\x09U\x02f8q\x14"
    b"K\x00K\x01\x87q\x15Rq\x16(K\x03U\x01<q\x17NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x18b"
    b"U\x08\x00\x00\x00\x00\x00\x00\xe0?q\x19\x86q\x1aRq\x1bu.",
}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_pickles_of_python_2_are_read(protocol):
    reference = pickle.loads(PYTHON_2[protocol], encoding="latin1")
    found = load_plain_pickle(io.BytesIO(PYTHON_2[protocol]), "a.pkl")
    assert str(found) == str(reference)
    assert found["x"].tolist() == [[1, 2], [3, 4]]
    assert found["x"].dtype == np.float32
    assert (found["ä"], found["n"], type(found["n"])) == (5, 0.5, np.float64)


def test_numpy_is_read_by_both_of_its_names(tmp_path):
    data = pickle.dumps(np.arange(3), protocol=2)
    ours = b"numpy._core.multiarray" if b"numpy._core" in data else b"numpy.core.multiarray"
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        (tmp_path / "a.pkl").write_bytes(data.replace(ours, name))
        with open(tmp_path / "a.pkl", "rb") as file:
            assert load_plain_pickle(file, "a.pkl").tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", range(6))
def test_proposals_of_detectron2_are_read(protocol):
    """With the thousand boxes of an image that an RPN keeps."""
    rng = np.random.default_rng(0)
    boxes = [rng.random((1000, 4), np.float32) for _ in range(30)]
    logits = [rng.standard_normal(1000, np.float32) for _ in range(30)]
    value = {"ids": list(range(30)), "boxes": boxes, "objectness_logits": logits, "bbox_mode": 0}
    found = load_plain_pickle(io.BytesIO(pickle.dumps(value, protocol)), "a.pkl")
    assert (found["ids"], found["bbox_mode"]) == (value["ids"], 0)
    for name in ("boxes", "objectness_logits"):
        assert all(map(np.array_equal, found[name], value[name]))


class Runs:
    """Its pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, protocol, error_line):
    witness = str(tmp_path / "witness")
    attacks = {
        f"{os.mkdir.__module__}.mkdir": Runs(os.mkdir, witness),
        "builtins.eval" if protocol > 2 else ".eval": Runs(eval, f"open({witness!r}, 'w')"),
        ".getattr": Runs(getattr, "", "join"),
        "check_call": Runs(subprocess.check_call, ["touch", witness]),
        "an array of O8": [np.array([InputError("in an array of objects")], dtype=object)],
    }
    for name, attack in attacks.items():
        path = write(tmp_path / "evil.pkl", attack, protocol)
        with open(path, "rb") as file:
            message = error_line(load_plain_pickle, file, "evil.pkl")
        assert "evil.pkl" in message
        assert name in message
    assert not os.path.exists(witness)


@pytest.mark.parametrize("data", [b"", b"text", pickle.dumps([1, 2])[:-3], b"\x80\x04R."])
def test_what_is_no_pickle_is_refused(tmp_path, data, error_line):
    (tmp_path / "a.pkl").write_bytes(data)
    with open(tmp_path / "a.pkl", "rb") as file:
        assert "a.pkl" in error_line(load_plain_pickle, file, "a.pkl")


# The memo is a dict, in which no room is made up to a place; a size in the state of a dtype is not
# looked at.
HARMLESS = (
    "a place in the memo of 2^31",
    "a place in the memo of 10^30",
    "dtype of another size",
)


@pytest.mark.parametrize("attack", attacks())
def test_attacks_are_refused_within_limits(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(attacks()[attack])

    def read() -> str:
        with open("evil.pkl", "rb") as file:
            value = load_plain_pickle(file, "evil.pkl")
        # As whatever uses it would.
        repr(value)
        return "read"

    trial = run_in_child("pickle", attack, read, tmp_path, Limits(seconds=60, memory=2**28))
    assert trial.outcome == ("read" if attack in HARMLESS else "refused"), trial.detail
    assert len(trial.detail.splitlines()) <= 1
    assert len(trial.detail) < 500
