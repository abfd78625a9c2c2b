"""Trainings that SIGINT or SIGTERM stops, in the tests' own process."""

import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from ia_gcn.engine import Trainer
from ia_gcn.errors import Stopped
from tests.helpers.training import assert_same_state, run

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class SignalAt(HookBase):
    """Sends this process a signal in the middle of an iteration."""

    def __init__(self, iteration, signum):
        self.iteration, self.signum = iteration, signum

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.signum)


def stopped(cfg, hook, resume=False):
    """Run a training that a signal stops: what it raised."""
    trainer = Trainer(cfg)
    trainer.register_hooks([hook])
    trainer.resume_or_load(resume)
    with pytest.raises(Stopped) as caught:
        trainer.train()
    return caught.value


def periodic(cfg):
    return sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("model_0*.pth"))


@pytest.fixture(autouse=True)
def _same_handlers():
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "iteration", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 4, 5))]
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(make_cfg, signum, iteration):
    uncut = run(make_cfg("uncut"))
    cfg = make_cfg("stopped")
    stop = stopped(cfg, SignalAt(iteration, signum))
    assert stop.signum == signum
    assert f"{signum.name} after iteration {iteration + 1} of 7" in str(stop)
    assert f"model_{iteration:07d}.pth" in periodic(cfg)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == iteration + 1
    assert_same_state(uncut, resumed)


def test_no_more_than_three_periodic_checkpoints(make_cfg):
    cfg = make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    stopped(cfg, SignalAt(4, signal.SIGTERM))
    assert periodic(cfg) == [f"model_{i:07d}.pth" for i in (2, 3, 4)]
    cfg = make_cfg("other", "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    cfg.defrost()
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SOLVER.MAX_ITER = 12
    stopped(cfg, SignalAt(8, signal.SIGTERM))
    assert periodic(cfg) == [f"model_{i:07d}.pth" for i in (5, 7, 8)]


def test_a_checkpoint_of_an_earlier_run_is_no_substitute(make_cfg):
    """A new training in the same folder, stopped where the last one's checkpoint was."""
    cfg = make_cfg("run", "SOLVER.MAX_ITER", 3, "SEED", 5)
    run(cfg)
    weights = Path(cfg.OUTPUT_DIR) / "model_0000002.pth"
    old = torch.load(weights, weights_only=True)["trainer"]["seed"]
    cfg = make_cfg("run", "SEED", 6)
    stopped(cfg, SignalAt(2, signal.SIGTERM))
    assert (old, torch.load(weights, weights_only=True)["trainer"]["seed"]) == (5, 6)


class Evaluated(Trainer):
    """Gets a signal in the evaluation of an iteration, after which the evaluation goes on."""

    in_iteration = None
    went_on = False

    def evaluate(self):
        if self.iter == self.in_iteration:
            os.kill(os.getpid(), signal.SIGTERM)
            Evaluated.went_on = True
        return super().evaluate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "iteration", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 7))]
)
def test_an_evaluation_ends_at_once(make_cfg, iteration, monkeypatch):
    monkeypatch.setattr(Evaluated, "in_iteration", iteration)
    uncut = run(make_cfg("uncut"))
    cfg = make_cfg("stopped")
    trainer = Evaluated(cfg)
    with pytest.raises(Stopped) as caught:
        trainer.train()
    assert not Evaluated.went_on
    where = {
        1: "after iteration 2 of 7",
        3: "after iteration 4 of 7",
        7: "after the last iteration",
    }
    assert where[iteration] in str(caught.value)
    if iteration < 7:
        assert f"model_{iteration:07d}.pth" in periodic(cfg)
    resumed = run(cfg, resume=True)
    assert_same_state(uncut, resumed)


def test_a_signal_in_the_last_iteration_ends_before_the_evaluation(make_cfg):
    cfg = make_cfg("run", "TEST.EVAL_PERIOD", 0)
    stop = stopped(cfg, SignalAt(6, signal.SIGINT))
    assert "after the last iteration" in str(stop)
    assert not (Path(cfg.OUTPUT_DIR) / "inference").exists()
