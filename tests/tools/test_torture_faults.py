"""tools/torture.py faults on single trainings."""

import os
import random
import signal
import sys
import time

import pytest

from tests.helpers.commands import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from tortures import faults

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    faults.write_images(tmp_path / "data")
    return tmp_path


def leave_a_process():
    if os.fork() == 0:
        time.sleep(600)


def test_a_stopped_training_goes_on(folder):
    outcome, detail = faults.stop(folder, random.Random(0), signal.SIGTERM)
    assert outcome == "as promised", detail


def test_a_killed_worker_is_named(folder):
    outcome, detail = faults.killed_worker(folder, random.Random(0))
    assert outcome == "as promised", detail


def test_a_process_that_is_left_is_found(folder, monkeypatch):
    monkeypatch.setattr(faults, "GONE", 0.5)
    training = faults.Training(folder / "data", folder / "run", prepare=leave_a_process)
    assert training.end().judge([0], "")[0] == "left processes"
    assert not training.processes()


def test_other_weights_are_found(folder):
    for name, seed in (("a", 1), ("b", 2)):
        training = faults.Training(
            folder / "data", folder / name, SEED=seed, SOLVER__MAX_ITER=2, TEST__EVAL_PERIOD=0
        )
        assert training.end().judge([0], "")[0] == "as promised"
    a, b = (folder / name / "model_final.pth" for name in "ab")
    assert faults.same_weights(a, a)
    assert not faults.same_weights(a, b)


def test_a_stack_trace_and_another_status_are_found():
    assert faults.End("", 1, "Traceback\ntrain: no").judge([1], "no")[0] == "not as promised"
    assert faults.End("", 1, "train: no").judge([0], "no")[0] == "not as promised"
    assert faults.End("", 1, "train: no").judge([1], "no")[0] == "as promised"
