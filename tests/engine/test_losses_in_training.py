"""What a training tells its loss, and what it keeps of it."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from ia_gcn.data import get_multilabel_dicts
from ia_gcn.engine import Trainer, fill_loss
from ia_gcn.engine.frozen_features import extract_features, train_heads
from ia_gcn.engine.hooks import FollowLoss
from ia_gcn.errors import InputError
from ia_gcn.modeling import LabelCorrections
from tests.helpers.instance_aware import make_cfg as make_small_cfg
from tests.helpers.instance_aware import make_inputs, make_model
from tests.helpers.losses import loss_from_config
from tests.helpers.training import Cut, assert_same_state, run

FOR_GOOD = ("MODEL.LOSS.NAME", "LargeLoss", "MODEL.LOSS.LARGE_LOSS.SCHEME", "LL-Cp")
FOR_GOOD += ("MODEL.LOSS.LARGE_LOSS.RATE", 0.1)
ELEVEN = ("SOLVER.MAX_ITER", 11, "TEST.EVAL_PERIOD", 0)


@pytest.fixture
def make_partial_cfg(make_cfg):
    """As make_cfg, of a training set in which every label that is absent is unknown."""

    def make(*args):
        cfg = make_cfg(*args)
        dicts = get_multilabel_dicts(["custom_train"])
        for record in dicts:
            record["ignored_labels"] = [c for c in range(3) if c not in record["labels"]]
        DatasetCatalog.remove("custom_train")
        DatasetCatalog.register("custom_train", lambda: dicts)
        return cfg

    return make


class RecordEpochs(HookBase):
    def __init__(self, loss):
        self.loss, self.epochs = loss, []

    def after_step(self):
        self.epochs.append(self.loss.epoch)


def test_the_epochs_of_a_loss_are_those_of_the_schedule(make_cfg):
    trainer = Trainer(make_cfg("run", *ELEVEN))
    record = RecordEpochs(trainer.model.criterion.loss)
    trainer.register_hooks([record])
    trainer.train()
    # 14 images, 4 in an iteration.
    assert trainer.iterations_per_epoch == 4
    assert record.epochs == [0] * 4 + [1] * 4 + [2] * 3


@pytest.mark.parametrize(
    "loss",
    [
        FOR_GOOD,
        (*FOR_GOOD, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.EMA_DECAY", 0.9),
        ("MODEL.LOSS.NAME", "LargeLoss", "MODEL.LOSS.LARGE_LOSS.RATE", 0.1),
        ("MODEL.LOSS.NAME", "SPLCLoss", "MODEL.LOSS.SPLC.THRESHOLD", 0.5),
    ],
)
@pytest.mark.slow
def test_a_run_that_is_cut_and_resumed_corrects_the_same_labels(make_partial_cfg, loss):
    uncut = run(make_partial_cfg("uncut", *loss, *ELEVEN))
    cfg = make_partial_cfg("cut", *loss, *ELEVEN)
    with pytest.raises(Cut):
        run(cfg, cut_at=7)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 6
    assert_same_state(resumed, uncut)
    if loss[:4] == FOR_GOOD[:4]:
        found, expected = (x.model.criterion.loss.corrections.bits for x in (resumed, uncut))
        assert found.any()
        assert np.array_equal(found, expected)


def test_corrections_are_of_unknown_labels_and_in_checkpoints(make_partial_cfg, tmp_path):
    trainer = run(make_partial_cfg("run", *FOR_GOOD, *ELEVEN))
    corrected = trainer.model.criterion.loss.corrections.of(torch.arange(14))
    assert corrected.any()
    for record, row in zip(trainer.data_loader.dataset, corrected):
        assert not set(record["labels"]) & set(row.nonzero().flatten().tolist())
    path = tmp_path / "run/model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    bits = checkpoint["trainer"]["hooks"]["FollowLoss"]["label_corrections"]
    assert np.array_equal(bits, np.packbits(corrected.numpy(), axis=1))
    # They are the training's, not the model's.
    assert not any("correct" in name for name in checkpoint["model"])


def test_corrections_of_another_training_set_are_refused(error_line):
    loss = loss_from_config("LargeLoss", LARGE_LOSS__SCHEME="LL-Cp")
    loss.fill(5, torch.zeros(3), torch.zeros(3))
    loss.corrections.add(np.array([[4, 2]]))
    state = FollowLoss(loss, 3, "abcde").state_dict()
    loss.fill(5, torch.zeros(3), torch.zeros(3))
    for image_ids in ("abcdef", "abcdf", "abced"):
        hook = FollowLoss(loss, 3, image_ids)
        assert "of another training set" in error_line(hook.load_state_dict, state)
    FollowLoss(loss, 3, "abcde").load_state_dict(state)
    assert loss.corrections.of(torch.arange(5)).nonzero().tolist() == [[4, 2]]


def test_the_ema_of_the_weights_has_no_corrections_of_its_own(make_cfg):
    trainer = Trainer(make_cfg("run", *FOR_GOOD, "SOLVER.EMA_DECAY", 0.9))
    assert trainer.model.criterion.loss.corrections is not None
    assert trainer.ema.module.criterion.loss.corrections is None


def test_all_processes_get_the_corrections_of_all(monkeypatch):
    loss = loss_from_config("LargeLoss", LARGE_LOSS__SCHEME="LL-Cp")
    loss.fill(3, torch.zeros(9), torch.zeros(9))
    loss.corrections.propose(torch.tensor([2]), torch.eye(9, dtype=torch.bool)[8:])
    others = np.array([[0, 1], [2, 0]])
    monkeypatch.setattr(comm, "all_gather", lambda pairs: [others, pairs])
    FollowLoss(loss, 2).after_step()
    found = loss.corrections.of(torch.arange(3)).nonzero().tolist()
    assert found == [[0, 1], [2, 0], [2, 8]]
    assert not loss.corrections.new


def test_labels_are_corrected_on_frozen_features():
    options = {"MODEL.META_ARCHITECTURE": "MultiLabelRecognizer", **pairs(FOR_GOOD)}
    cfg = make_small_cfg(options)
    cfg.merge_from_list(["SEED", 5, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 9])
    ends = []
    for _ in range(2):
        model = make_model(options, dtype=torch.float32)
        features = extract_features(model, [make_inputs(batch=6)])
        targets = torch.where(features.targets == 0, -1.0, features.targets)
        features = features._replace(targets=targets)
        names = [str(c) for c in range(targets.shape[1])]
        fill_loss(cfg, model, 6, torch.zeros(len(names)), torch.zeros(len(names)), names)
        train_heads(cfg, model, features)
        assert model.criterion.loss.epoch == 8 // 2
        ends.append(model.criterion.loss.corrections.of(torch.arange(6)))
    assert ends[0].any()
    assert not (ends[0] & (targets != -1)).any()
    assert torch.equal(*ends)


def pairs(flat):
    return dict(zip(flat[::2], flat[1::2]))


# Label counts

PRESENT, ABSENT = np.array([3, 1, 0]), np.array([1, 2, 1])


@pytest.fixture
def balanced(make_cfg):
    """A function that fills a model's loss from PRESENT and ABSENT, and returns it."""

    def fill(*opts):
        cfg = make_cfg("run", "MODEL.LOSS.NAME", "DistributionBalancedLoss", *opts)
        model = Trainer.build_model(cfg)
        fill_loss(cfg, model, 4, PRESENT, ABSENT, ["red", "green", "blue"])
        return model.criterion.loss

    return fill


def test_a_training_counts_its_labels_where_they_are_known(make_partial_cfg):
    trainer = Trainer(make_partial_cfg("run", "MODEL.LOSS.NAME", "DistributionBalancedLoss"))
    loss = trainer.model.criterion.loss
    assert loss.present.tolist() == [8, 8, 8]
    assert loss.absent.tolist() == [0, 0, 0]


@pytest.fixture
def write_predictions(tmp_path):
    def write(names):
        path = tmp_path / "predictions.npz"
        scores = np.array([[0.5, 0.25, 1.0], [1.0, 0.25, 0.0]])
        arrays = {"image_ids": np.arange(2), "scores": scores, "targets": np.zeros((2, 3), int)}
        np.savez(path, label_names=np.array(names), **arrays)
        return "MODEL.LOSS.LABEL_COUNTS", str(path)

    return write


def test_labels_are_counted_as_a_model_sees_them(balanced, write_predictions):
    loss = balanced(*write_predictions(["red", "green", "blue"]))
    assert loss.present.tolist() == [1.5, 0.5, 1.0]
    assert loss.absent.tolist() == [0.5, 1.5, 1.0]
    loss = balanced()
    assert (loss.present.tolist(), loss.absent.tolist()) == ([3, 1, 0], [1, 2, 1])


def test_predictions_of_other_labels_are_refused(balanced, write_predictions):
    with pytest.raises(InputError, match=r"LABEL_COUNTS: .*\.npz has the same labels in another"):
        balanced(*write_predictions(["green", "red", "blue"]))


def test_the_counts_of_a_checkpoint_are_not_those_of_a_training_that_starts_from_it(make_cfg):
    opts = ("MODEL.LOSS.NAME", "DistributionBalancedLoss", "SOLVER.MAX_ITER", 1)
    first = run(make_cfg("first", *opts))
    assert first.model.criterion.loss.present.tolist() == [8, 8, 8]
    cfg = make_cfg("second", *opts, "MODEL.WEIGHTS", f"{first.cfg.OUTPUT_DIR}/model_final.pth")
    dicts = get_multilabel_dicts(["custom_train"])[:5]
    DatasetCatalog.remove("custom_train")
    DatasetCatalog.register("custom_train", lambda: dicts)
    expected = [sum(label in record["labels"] for record in dicts) for label in range(3)]
    assert run(cfg).model.criterion.loss.present.tolist() == expected != [8, 8, 8]


def test_corrections_take_a_bit_for_each_label():
    assert LabelCorrections(1000, 9605).bits.nbytes == 1000 * 1201
