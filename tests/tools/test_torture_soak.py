"""tools/torture.py soak: what keeps growing is found, and what only fluctuates is not."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tortures.soak import SLACK, Sample, descendants, soak, take_sample, verdicts

SECONDS = np.arange(0, 7200, 5.0)


def samples_of(name, values):
    steady = dict.fromkeys(Sample._fields, 100)
    return [
        Sample(**{**steady, "seconds": seconds, name: value})
        for seconds, value in zip(SECONDS, values)
    ]


def growing(samples):
    return [trial.kind for trial in verdicts("it", samples) if trial.is_finding]


@pytest.mark.parametrize("name", SLACK)
def test_what_grows_is_found(name):
    a_percent_in_ten_minutes = 1000 * SLACK[name] * (1 + 0.01 * SECONDS / 600)
    assert growing(samples_of(name, a_percent_in_ten_minutes)) == [f"it: {name}"]


@pytest.mark.parametrize("name", SLACK)
def test_what_only_fluctuates_or_fills_up_is_not(name):
    rng = np.random.default_rng(0)
    noise = 1000 * SLACK[name] * (1 + 0.1 * rng.standard_normal(len(SECONDS)))
    peaks = np.where(rng.random(len(SECONDS)) < 0.05, 3 * noise, noise)
    warm_up = noise * (1 - np.exp(-SECONDS / 300))
    for values in (noise, peaks, warm_up):
        assert not growing(samples_of(name, values))


def test_no_sample_is_no_success():
    assert growing([])


def test_memory_is_that_of_the_whole_family(tmp_path):
    """A process with a child: what both hold counts, and what is shared counts once."""
    mebibytes = 64
    code = (
        "import os, sys, time\n"
        f"shared = bytearray(os.urandom({mebibytes} << 20))\n"
        "if os.fork() == 0:\n"
        f"    own = bytearray(os.urandom({mebibytes} << 20))\n"
        "    file = open(os.devnull)\n"
        "    print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "a file").write_bytes(b"12345")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout.readline() == b"ready\n"
            family = descendants(running.pid)
            assert len(family) == 2
            sample = take_sample(0.0, running.pid, tmp_path, tmp_path)
        finally:
            for pid in descendants(running.pid)[::-1]:
                subprocess.run(["kill", "-9", str(pid)], check=True)
    assert 2 * mebibytes <= sample.memory / 2**20 < 2.5 * mebibytes
    assert (sample.threads, sample.files, sample.output) == (2, 1, 5)
    assert sample.descriptors == 7


def test_a_leaking_process_is_found(tmp_path):
    code = "held = []\nwhile input(): held.append(bytearray(b'x' * 5000000)); print(flush=True)\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    samples = []
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as running:
        for second in range(20):
            running.stdin.write("more\n")
            running.stdin.flush()
            running.stdout.readline()
            samples.append(take_sample(second, running.pid, tmp_path, tmp_path))
        running.kill()
    assert growing(samples) == ["it: memory"]


@pytest.mark.slow
def test_a_short_run(tmp_path):
    """A training and the page run side by side, and nothing is wrong with either."""
    pytest.importorskip("gradio_client")
    folder = tmp_path / "soak"
    folder.mkdir()
    trials = list(soak(folder, minutes=0.3, seed=0))
    # So short a time shows no trend.
    assert not [trial for trial in trials if trial.is_finding and trial.name != "trend"]
    kinds = {trial.kind for trial in trials}
    assert {"page: images", "page: damaged images", "training: memory", "page: memory"} <= kinds
    assert (tmp_path / "soak_samples.jsonl").read_text().count("\n") >= 4
