"""tools/torture.py kill: what is lost or left half-written is found."""

import json
from pathlib import Path

import pytest
import torch
from tortures.kill import difference, differences, half_written

from tests.helpers.commands import run_process

# Forks of a process that has trained can't train, so each torture has a process of its own.
PLANTED = """
import sys

sys.path.insert(0, "tools")
import torture
{hole}
sys.exit(torture.main(sys.argv[1:]))
"""


def torture(output: Path, *options, hole=""):
    """The exit status, and the trials."""
    done = run_process(
        *("-c", PLANTED.format(hole=hole), "kill", "--output", output, *options),
        OMP_NUM_THREADS=1,
    )
    assert (output / "kill.jsonl").exists(), done.stderr[-3000:]
    lines = (output / "kill.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_killed_training_ends_as_an_uncut_one(tmp_path):
    status, trials = torture(tmp_path, "--runs", 6)
    assert [trial["detail"] for trial in trials] == [""] * 6
    assert status == 0
    assert {trial["kind"] for trial in trials} == {
        "1 process, 0 workers",
        "1 process, 1 workers",
        "2 processes, 0 workers",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hole", "found"),
    [
        (
            "from ia_gcn.engine import BestCheckpointer\n"
            "BestCheckpointer.load_state_dict = lambda self, state: None",
            "model_final.pth differs",
        ),
        (
            "from ia_gcn.engine.metrics_log import MetricsWriter\n"
            "MetricsWriter.go_back = lambda self, place: None",
            "metrics.json differs",
        ),
        (
            "from ia_gcn.engine import SeedEveryStep\n"
            "SeedEveryStep.before_step = lambda self: None\n"
            "from ia_gcn.data import samplers\n"
            "samplers.PositionSampler.start = property(lambda self: 0, lambda self, x: None)",
            "differs/model/",
        ),
    ],
)
def test_a_planted_hole_is_found(tmp_path, hole, found):
    # These show wherever a run is resumed after its first evaluation.
    status, trials = torture(tmp_path, "--runs", 8, "--seed", 3, hole=hole)
    assert status == 1
    assert any(found in trial["detail"] for trial in trials)


def test_half_a_checkpoint_is_found(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert not half_written(tmp_path)
    content = (tmp_path / "model_0000001.pth").read_bytes()
    (tmp_path / "model_0000001.pth").write_bytes(content[:-100])
    assert "model_0000001.pth is damaged" in half_written(tmp_path)[0]
    (tmp_path / "model_0000001.pth").unlink()
    assert "model_0000001.pth is damaged" in half_written(tmp_path)[0]


def test_a_bit_is_a_difference():
    a = {"x": [torch.zeros(3), {"y": 1.0}], "z": None}
    assert difference(a, {"x": [torch.zeros(3), {"y": 1.0}], "z": None}) is None
    changed = torch.zeros(3)
    changed[1] = 1e-45
    assert difference(a, {"x": [changed, {"y": 1.0}], "z": None}) == "/x/0"
    assert difference(a, {"x": [torch.zeros(3), {"y": 1.5}], "z": None}) == "/x/1/y: 1.5"
    assert difference(a, {"x": [torch.zeros(3), {}], "z": None}) == "/x/1: []"
    assert difference(a, {"x": [torch.zeros(3).double(), {"y": 1.0}], "z": None}) == "/x/0"


def test_times_and_logs_are_no_difference_but_other_files_are(tmp_path):
    folders = [tmp_path / name / "output" for name in "ab"]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        record = {"iteration": 19, "total_loss": 0.5, "time": i, "data_time": i, "eta_seconds": i}
        (folder / "metrics.json").write_text(json.dumps(record) + "\n")
        (folder / "log.txt").write_text(f"{i}")
        (folder / f"events.out.tfevents.{i}").write_text("")
    assert differences(*folders) == []
    (folders[1] / ".model_final.pth.12.tmp").write_text("")
    assert differences(*folders) == ["other files: .model_final.pth.12.tmp"]
    (folders[0] / "metrics.json").write_text('{"iteration": 19, "total_loss": 0.25}\n')
    assert any("metrics.json differs" in problem for problem in differences(*folders))
