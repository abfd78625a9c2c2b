"""Files of tensors by others: what is read, and what is refused in one line."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from ia_gcn.io.pth import plain_state_dict, read_pth


class Runs:
    """Its pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (Runs(os.mkdir, "witness"), f"{os.mkdir.__module__}.mkdir"),
        (Runs(eval, "1"), "eval"),
        (np.zeros(3), "_reconstruct"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_a_refused_file_names_what_it_asks_for(
    tmp_path, monkeypatch, error_line, value, asked, new
):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": value}, "a.pth", _use_new_zipfile_serialization=new)
    line = error_line(read_pth, "a.pth", "a.pth")
    assert asked in line
    assert "weights_only" not in line
    assert not os.path.exists("witness")


def test_torchscript_is_refused_without_advice(tmp_path, error_line):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    assert "weights_only=False" not in error_line(read_pth, str(tmp_path / "a.pth"), "a.pth")


def test_a_dict_with_other_methods_is_read_by_its_own(tmp_path):
    class Odd(collections.OrderedDict):
        def __reduce__(self):
            return collections.OrderedDict, (), {"items": 1, "get": 2}, None, iter([("x", 5)])

    torch.save(Odd(), tmp_path / "a.pth")
    assert read_pth(str(tmp_path / "a.pth"), "a.pth").items() == {"x": 5}.items()


UNUSUAL = {
    "meta": lambda: torch.zeros(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "bytes": lambda: torch.zeros(1).expand(10**5, 10**5),
}


# That making them is deprecated or experimental.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_are_named(tmp_path, error_line, kind):
    torch.save({"fine": torch.zeros(1), "odd.one": UNUSUAL[kind]()}, tmp_path / "a.pth")
    content = read_pth(str(tmp_path / "a.pth"), "a.pth")
    line = error_line(plain_state_dict, content, "a.pth")
    assert "a.pth: odd.one is" in line
    assert kind in line


@pytest.mark.parametrize("state", [5, [torch.zeros(1)], {3: torch.zeros(1)}, {"x": 1}, {"\n": 1}])
def test_what_is_no_state_dict_is_refused(error_line, state):
    assert "a.pth: it holds no state dict" in error_line(plain_state_dict, state, "a.pth")


def test_usual_tensors_are_taken_as_they_are():
    state = {
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "whole": torch.tensor(3),
        "truth": torch.zeros(2, dtype=torch.bool),
        "parameter": torch.nn.Parameter(torch.zeros(1)),
        "view": torch.zeros(4, 6)[1:, ::2].T,
        "empty": torch.zeros(0, 7),
    }
    taken = plain_state_dict(collections.OrderedDict(state), "a.pth")
    assert list(taken) == list(state)
    assert all(taken[name] is tensor for name, tensor in state.items())


def change_pickle(path, change):
    """Write a .pth again with another pickle in it."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, change(data) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("places", [1, 2])
def test_sizes_beyond_the_file_are_refused(tmp_path, error_line, places):
    path = str(tmp_path / "a.pth")
    torch.save({"x": torch.arange(1000.0)}, path)
    number = pickle.BININT2 + (1000).to_bytes(2, "little")
    larger = pickle.BININT + (2**30).to_bytes(4, "little")
    change_pickle(path, lambda data: data.replace(number, larger, places))
    assert "a.pth" in error_line(read_pth, path, "a.pth")


def test_a_list_that_contains_itself_ends(tmp_path):
    endless = []
    endless.append(endless)
    torch.save({"x": endless}, tmp_path / "a.pth")
    (inside,) = read_pth(str(tmp_path / "a.pth"), "a.pth")["x"]
    assert inside[0] is inside


def test_a_zip_bomb_is_not_unpacked(tmp_path, error_line):
    path = str(tmp_path / "a.pth")
    torch.save({"x": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    assert "more than the file" in error_line(read_pth, path, "a.pth")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_many_keys_of_the_same_hash_are_refused_before_they_are_looked_up(
    tmp_path, monkeypatch, error_line, new
):
    keys = {i * (2**61 - 1): None for i in range(1500)}
    torch.save({"x": keys}, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    # Of a hundred times as many, torch would be at it for minutes.
    monkeypatch.setattr(torch, "load", None)
    line = error_line(read_pth, str(tmp_path / "a.pth"), "a.pth")
    assert "1000 integers of over 32 bits" in line


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_some_large_integers_are_read(tmp_path, new):
    content = {"seeds": [2**63 + i for i in range(900)], "x": torch.ones(3)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    found = read_pth(str(tmp_path / "a.pth"), "a.pth")
    assert found["seeds"] == content["seeds"]
    assert torch.equal(found["x"], content["x"])
