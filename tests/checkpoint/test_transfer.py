"""MODEL.TRANSFER: a checkpoint goes on with other labels or as another model."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.engine import Trainer, setup_cfg

LABELS = ["cat", "dog", "sea"]


@pytest.fixture
def build(repository):
    """A function that builds a slim ML-GCN, its label graph filled, and all weights from a seed."""

    def build_filled(seed, labels, *opts, config="ml_gcn"):
        torch.manual_seed(seed)
        keys = ["MODEL.DEVICE", "cpu", "MODEL.LABEL_HEAD.NUM_LABELS", len(labels)]
        model = build_model(
            setup_cfg(f"{repository}/configs/DigitScenes/{config}.yaml", [*keys, *opts])
        )
        if model.label_graph is not None:
            counts = torch.eye(len(labels), dtype=torch.int64) * (seed + 2)
            model.label_graph.fill(counts.diagonal(), counts, torch.randn(len(labels), 300))
        return model

    return build_filled


@pytest.fixture
def transfer(build, tmp_path):
    """A function that loads a checkpoint for LABELS into a model for `labels`: before, after."""

    def load(labels, *opts, **kwargs):
        old = build(0, LABELS)
        MultiLabelCheckpointer(old, str(tmp_path), label_names=LABELS).save("old")
        new = build(1, labels, *opts, **kwargs)
        before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
        checkpointer = MultiLabelCheckpointer(new, label_names=labels, transfer=True)
        checkpointer.load(str(tmp_path / "old.pth"))
        return old.state_dict(), before, new.state_dict()

    return load


def same(first, second, name):
    return torch.equal(first[name], second[name])


@pytest.mark.parametrize("labels", [["cat", "dog"], ["cat", "dog", "sky"], ["dog", "cat", "sea"]])
def test_other_labels_start_anew_and_the_rest_is_taken(transfer, labels):
    old, before, after = transfer(labels)
    for name in after:
        # In this model only the label graph has a row for each label.
        expected = before if ".label_graph." in f".{name}" else old
        assert same(after, expected, name), name
    assert any(same(after, old, name) and not same(after, before, name) for name in after)
    assert any(".label_graph." in f".{name}" for name in after)


def test_another_head_gets_the_backbone(transfer):
    old, before, after = transfer(LABELS, "MODEL.LABEL_HEAD.NAME", "LinearHead")
    for name in after:
        expected = old if name.startswith("backbone.") else before
        assert same(after, expected, name), name


def test_the_same_labels_in_the_same_model_are_taken_whole(transfer):
    old, _, after = transfer(LABELS)
    assert all(same(after, old, name) for name in after)


def test_the_log_lists_what_starts_anew(transfer, caplog):
    with caplog.at_level(logging.INFO):
        transfer(["cat", "dog"])
    text = "\n".join(caplog.messages)
    assert "MODEL.TRANSFER: taken from" in text
    assert "backbone.res5" in text
    anew = text[text.index("MODEL.TRANSFER: starting anew") :]
    assert "label_graph" in anew
    assert "backbone" not in anew


def test_a_checkpoint_of_which_nothing_fits_is_refused(build, tmp_path, error_line):
    torch.save({"model": {"other.weight": torch.ones(2)}}, tmp_path / "x.pth")
    checkpointer = MultiLabelCheckpointer(build(0, LABELS), label_names=LABELS, transfer=True)
    message = error_line(checkpointer.load, str(tmp_path / "x.pth"))
    assert "MODEL.TRANSFER: nothing in MODEL.WEIGHTS" in message


# A training


def weights_of(trainer):
    return {name: t.clone() for name, t in trainer.checkpointer.model.state_dict().items()}


def run(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return weights_of(trainer)


def test_fine_tuning_to_other_labels_and_its_resumption(make_cfg, error_line, tmp_path):
    run(make_cfg("first", "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0))
    start = ("MODEL.WEIGHTS", str(tmp_path / "first/model_final.pth"), "TEST.EVAL_PERIOD", 0)
    # A fourth label, of which no image is known yet.
    opts = (*start, "DATASETS.CUSTOM.LABELS", "('red','green','blue','grey')")
    refused = Trainer(make_cfg("second", *opts))
    assert "MODEL.TRANSFER True" in error_line(refused.resume_or_load, False)

    opts = (*opts, "MODEL.TRANSFER", True, "SOLVER.CHECKPOINT_PERIOD", 1)
    uncut = run(make_cfg("second", *opts, "SOLVER.MAX_ITER", 3))
    (tmp_path / "second/last_checkpoint").write_text("model_0000000.pth")
    resumed = run(make_cfg("second", *opts, "SOLVER.MAX_ITER", 3), resume=True)
    assert all(same(resumed, uncut, name) for name in uncut)
    # That it was resumed and did not start from the first training again: other labels than the
    # last checkpoint's are refused.
    other = ("DATASETS.CUSTOM.LABELS", "('red','green','blue','white')")
    trainer = Trainer(make_cfg("second", *opts, *other))
    assert "lacks grey" in error_line(trainer.resume_or_load, True)
