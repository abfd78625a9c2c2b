"""The EMA of the weights, batches in parts, mixed precision and clipped gradients."""

import json

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.engine import Trainer
from ia_gcn.engine.accumulation import choose_amp_dtype
from ia_gcn.errors import InputError
from ia_gcn.inference import precision
from tests.helpers.training import Cut, CutAt, assert_same_state, run

EMA = ("SOLVER.EMA_DECAY", 0.8)
BF16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bf16")


class Watch(CutAt):
    """Keeps the weights after every step."""

    def __init__(self):
        self.states = []

    def after_step(self):
        state = self.trainer.model.state_dict()
        self.states.append({name: value.clone() for name, value in state.items()})


def floats(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


# The EMA of the weights


def test_the_ema_is_the_sum_written_out(make_cfg):
    watch = Watch()
    trainer = Trainer(make_cfg("run", *EMA, "TEST.EVAL_PERIOD", 0))
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.register_hooks([watch])
    trainer.resume_or_load(False)
    trainer.train()
    found = trainer.ema.module.state_dict()
    for name, value in floats(start).items():
        # m ← 0.8 m + 0.2 w, over 7 steps.
        expected = 0.8**7 * value.double()
        for i, state in enumerate(watch.states):
            expected += 0.2 * 0.8 ** (6 - i) * state[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6)
    for name in found.keys() - floats(found).keys():
        assert found[name].equal(trainer.model.state_dict()[name])


def test_without_a_decay_there_is_none(make_cfg, tmp_path):
    assert run(make_cfg("run")).ema is None
    assert "ema" not in torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert not (tmp_path / "run" / "ema").exists()


@pytest.mark.slow
def test_the_ema_does_not_touch_the_training(make_cfg):
    assert_same_state(run(make_cfg("with", *EMA)), run(make_cfg("without")))


@pytest.mark.slow
def test_the_ema_survives_a_resume_to_the_bit(make_cfg):
    uncut = run(make_cfg("uncut", *EMA))
    cfg = make_cfg("cut", *EMA)
    with pytest.raises(Cut):
        run(cfg, cut_at=4)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 3
    assert_same_state(uncut, resumed)
    states = zip(uncut.ema.state_dict().items(), resumed.ema.state_dict().items())
    for (name, x), (_, y) in states:
        assert torch.equal(x, y), name


def test_both_are_evaluated_and_the_best_is_of_the_mean(make_cfg, tmp_path):
    trainer = run(make_cfg("run", *EMA))
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    last = lines[-1]
    for prefix, where in (("", folder), ("ema/", folder / "ema")):
        metrics = json.loads(
            (where / "inference" / "custom_test" / "metrics.json").read_text(encoding="utf-8")
        )
        assert last[f"{prefix}multi_label/mAP"] == pytest.approx(metrics["mAP"])
    best = torch.load(folder / "model_best.pth", weights_only=True)
    seen = [line["ema/multi_label/mAP"] for line in lines if "ema/multi_label/mAP" in line]
    if best["iteration"] == trainer.max_iter - 1:
        for name, value in trainer.ema.module.state_dict().items():
            assert value.equal(best["model"][name]), name
    else:
        assert max(seen) > seen[-1] or seen[0] == max(seen)


def test_a_training_that_starts_from_weights_starts_its_mean_there(make_cfg, tmp_path):
    trained = run(make_cfg("trained", "TEST.EVAL_PERIOD", 0))
    weights = str(tmp_path / "trained" / "model_final.pth")
    trainer = Trainer(make_cfg("run", *EMA, "MODEL.WEIGHTS", weights))
    trainer.resume_or_load(False)
    for name, value in trained.model.state_dict().items():
        assert value.equal(trainer.ema.module.state_dict()[name]), name
    lcm = trained.model.label_graph.lcm
    assert trainer.ema.module.label_graph.lcm.equal(lcm)


def test_a_checkpoint_s_mean_can_be_evaluated(make_cfg, tmp_path):
    cfg = make_cfg("run", *EMA, "TEST.EVAL_PERIOD", 0)
    trainer = run(cfg)
    path = str(tmp_path / "run" / "model_final.pth")
    model = Trainer.build_model(cfg)
    names = trainer.checkpointer.label_names
    checkpointer = MultiLabelCheckpointer(model, label_names=names, load_ema=True)
    checkpointer.load(path)
    checkpointer.check_complete()
    for name, value in trainer.ema.module.state_dict().items():
        assert value.equal(model.state_dict()[name]), name


def test_a_checkpoint_without_a_mean_is_refused_one(make_cfg, tmp_path):
    cfg = make_cfg("run", "TEST.EVAL_PERIOD", 0)
    names = run(cfg).checkpointer.label_names
    checkpointer = MultiLabelCheckpointer(
        Trainer.build_model(cfg), label_names=names, load_ema=True
    )
    with pytest.raises(InputError, match=r"TEST\.EMA"):
        checkpointer.load(str(tmp_path / "run" / "model_final.pth"))


# Batches in parts

# A mean over images, and no batch norm that sees several: frozen, it is the same for any part.
FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)


def gradients(trainer):
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_parts_of_a_batch_make_its_gradient_and_losses(make_cfg, steps):
    whole = run(make_cfg("whole", *FROZEN))
    parts = run(make_cfg("parts", *FROZEN, "SOLVER.ACCUMULATE_STEPS", steps))
    expected = gradients(whole)
    assert expected
    assert expected.keys() == gradients(parts).keys()
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    for name in ("total_loss", "lr"):
        values = [trainer.storage.history(name).latest() for trainer in (whole, parts)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_part_holds_no_more_images_than_its_share(make_cfg):
    trainer = Trainer(make_cfg("run", *FROZEN, "SOLVER.ACCUMULATE_STEPS", 3))
    sizes = []
    trainer.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with EventStorage():
        trainer.run_step()
    assert sizes == [2, 2]  # of 4 images


@pytest.mark.slow
def test_parts_of_ia_gcn(make_cfg):
    trainer = run(make_cfg("run", "SOLVER.ACCUMULATE_STEPS", 2, config="ia_gcn_plus"))
    assert trainer.iter == trainer.max_iter


# Mixed precision


def test_mixed_precision_trains_the_same_weights_nearly(make_cfg):
    opts = ("TEST.EVAL_PERIOD", 0)
    whole = run(make_cfg("whole", *opts))
    watched = Trainer(make_cfg("mixed", *opts, *BF16))
    dtypes = set()
    watched.model.backbone.res5[0].conv1.register_forward_hook(
        lambda module, args, out: dtypes.add((module.training, out.dtype))
    )
    watched.train()
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in watched.model.parameters()} == {torch.float32}
    # Later, differences grow with every step.
    losses = [
        [loss for loss, _ in t.storage.history("total_loss").values()[:3]] for t in (whole, watched)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("opts", [BF16, (*BF16, "MODEL.CHANNELS_LAST", False)])
def test_mixed_precision_resumes(make_cfg, opts):
    opts = (*opts, "TEST.EVAL_PERIOD", 0)
    uncut = run(make_cfg("uncut", *opts))
    with pytest.raises(Cut):
        run(make_cfg("cut", *opts), cut_at=4)
    assert_same_state(uncut, run(make_cfg("cut", *opts), resume=True))


def small_model(groups=1):
    model = nn.Conv2d(4, 4, 3, groups=groups)
    model.device = torch.device("cpu")
    return model


@pytest.mark.parametrize(
    ("name", "flags", "groups", "expected"),
    [
        ("auto", {"amx_bf16", "avx512f"}, 1, torch.bfloat16),
        ("auto", {"avx512_bf16"}, 2, torch.bfloat16),
        ("auto", {"avx512_bf16"}, 4, None),
        ("auto", {"avx512f", "avx2"}, 1, None),
        ("auto", set(), 1, None),
        ("bf16", set(), 4, torch.bfloat16),
    ],
)
def test_mixed_precision_of_a_cpu(monkeypatch, caplog, name, flags, groups, expected):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    assert choose_amp_dtype(name, small_model(groups)) == expected
    assert ("has no effect" in caplog.text) == (expected is None)


# Channels last


def test_a_model_is_trained_with_channels_last(make_cfg):
    weights = {}
    for channels_last in (True, False):
        trainer = Trainer(make_cfg("run", "MODEL.CHANNELS_LAST", channels_last))
        weights[channels_last] = trainer.model.backbone.res3[0].conv1.weight
    assert weights[True].is_contiguous(memory_format=torch.channels_last)
    assert weights[False].is_contiguous()


# A fused Adam goes through weights and its state as they lie in memory.
@pytest.mark.slow
@pytest.mark.parametrize("written", [True, False])
def test_a_checkpoint_of_the_other_layout_is_resumed(make_cfg, written):
    opts = (
        *(*FROZEN, "SOLVER.MAX_ITER", 6, "SOLVER.OPTIMIZER", "Adam", "SOLVER.BASE_LR", 1e-3),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 0),
    )
    uncut = run(make_cfg("uncut", *opts, "MODEL.CHANNELS_LAST", written))
    with pytest.raises(Cut):
        run(make_cfg("cut", *opts, "MODEL.CHANNELS_LAST", written), cut_at=4)
    resumed = run(make_cfg("cut", *opts, "MODEL.CHANNELS_LAST", not written), resume=True)
    expected = uncut.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


# Clipped gradients


@pytest.mark.parametrize("opts", [(), ("SOLVER.ACCUMULATE_STEPS", 2), BF16])
def test_gradients_are_clipped_as_they_are_used(make_cfg, opts):
    clip = (
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3),
        *("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.BASE_LR", 1.0),
        *("SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.WEIGHT_DECAY_NORM", 0.0),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 0),
        *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 0),
    )
    trainer = Trainer(make_cfg("run", *clip, *opts))
    trainer.resume_or_load(False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [(p.detach() - before[n]).norm().item() for n, p in trainer.model.named_parameters()]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)


# What can't be used


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.EMA_DECAY", 1.0), r"SOLVER\.EMA_DECAY"),
        (("SOLVER.EMA_DECAY", -0.1), r"SOLVER\.EMA_DECAY"),
        (("SOLVER.ACCUMULATE_STEPS", 0), r"SOLVER\.ACCUMULATE_STEPS"),
        (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "fp16"), r"DTYPE fp16 needs a GPU"),
        (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "half"), r"DTYPE must be auto, fp16 or"),
    ],
)
def test_what_cannot_be_used_is_refused(make_cfg, opts, message):
    with pytest.raises(InputError, match=message):
        Trainer(make_cfg("run", *opts))
