"""Trainings that are run, or cut, in the tests' own process."""

import torch
from detectron2.engine import HookBase

from ia_gcn.engine import Trainer


class Cut(Exception):
    """Stands for what ends a run: a full disk, a lost machine."""


class CutAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise Cut


def run(cfg, resume=False, cut_at=None):
    trainer = Trainer(cfg)
    if cut_at is not None:
        trainer.register_hooks([CutAt(cut_at)])
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def assert_same_state(a, b):
    for (name, x), (_, y) in zip(a.model.state_dict().items(), b.model.state_dict().items()):
        assert torch.equal(x, y), name
    assert str(a.optimizer.state_dict()) == str(b.optimizer.state_dict())
    assert a.scheduler.state_dict() == b.scheduler.state_dict()
