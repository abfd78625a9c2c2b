"""Optimizer, learning-rate schedules, and epochs turned into iterations."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from ia_gcn import add_ia_gcn_config
from ia_gcn.engine import build_lr_scheduler, build_optimizer, epochs_to_iterations
from ia_gcn.errors import InputError


def make_cfg(**solver):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    for key, value in solver.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


def learning_rates(cfg, optimizer):
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_epochs_become_iterations():
    cfg = make_cfg(MAX_EPOCHS=6, STEP_EPOCHS=(2, 4, 9), CHECKPOINT_EPOCHS=3, IMS_PER_BATCH=4)
    cfg.TEST.EVAL_EPOCHS = 2
    epochs_to_iterations(cfg, num_images=10)  # 3 iterations an epoch, the last one spills over
    assert cfg.SOLVER.MAX_ITER == 18
    assert cfg.SOLVER.STEPS == (6, 12)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 9
    assert cfg.TEST.EVAL_PERIOD == 6


def test_iterations_stay_where_no_epochs_are_given():
    cfg = make_cfg(MAX_ITER=7, STEPS=(3,), CHECKPOINT_PERIOD=2)
    before = cfg.dump()
    epochs_to_iterations(cfg, num_images=1000)
    assert cfg.dump() == before


def small_model():
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.roi_heads = nn.Module()
    model.roi_heads.res5 = nn.Conv2d(4, 4, 1, bias=False)
    model.roi_heads.rough_classifier = nn.Linear(4, 2, bias=False)
    model.label_head = nn.Linear(4, 2)
    return model


@pytest.mark.parametrize(
    ("name", "cls"), [("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam), ("AdamW", None)]
)
def test_every_parameter_has_its_rate_and_decay(name, cls):
    model = small_model()
    cfg = make_cfg(
        OPTIMIZER=name,
        BASE_LR=0.1,
        BACKBONE_MULTIPLIER=0.01,
        WEIGHT_DECAY=0.5,
        WEIGHT_DECAY_NORM=0.25,
        WEIGHT_DECAY_BIAS=0.0,
    )
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, cls or torch.optim.AdamW)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    conv, norm = model.backbone
    # detectron2 gives a bias, a norm's too, WEIGHT_DECAY_BIAS.
    expected = [
        (conv.weight, 0.001, 0.5),
        (conv.bias, 0.001, 0.0),
        (norm.weight, 0.001, 0.25),
        (model.roi_heads.res5.weight, 0.001, 0.5),
        (model.roi_heads.rough_classifier.weight, 0.1, 0.5),
        (model.label_head.weight, 0.1, 0.5),
        (model.label_head.bias, 0.1, 0.0),
    ]
    for parameter, rate, decay in expected:
        assert groups[id(parameter)]["lr"] == pytest.approx(rate)
        assert groups[id(parameter)]["weight_decay"] == decay


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("clip", ["", "value", "full_model"])
def test_steps_are_those_of_torch_s_plain_loop(name, clip):
    cfg = make_cfg(OPTIMIZER=name, BASE_LR=0.1, WEIGHT_DECAY=0.5, WEIGHT_DECAY_BIAS=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = bool(clip)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip or "value"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2))
    expected = copy.deepcopy(model)
    optimizer = build_optimizer(cfg, model)
    places = {id(p): i for i, p in enumerate(model.parameters())}
    copies = list(expected.parameters())
    options = {"momentum": 0.9} if name == "SGD" else {}
    plain = getattr(torch.optim, name)(
        [
            {
                "params": [copies[places[id(p)]] for p in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in optimizer.param_groups
        ],
        lr=0.1,
        foreach=False,
        **options,
    )
    for i in range(4):
        # Gradients of another memory format than the weights' must not be mistaken for theirs.
        x = torch.randn(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        for network, its_optimizer in ((model, optimizer), (expected, plain)):
            its_optimizer.zero_grad()
            # The last layer gets its first gradient late, as what follows the regions may; torch's
            # clipping by value takes no weight without one.
            network[: 4 if i or clip else 3](x).square().sum().backward()
            if clip == "value" and its_optimizer is plain:
                nn.utils.clip_grad_value_(network.parameters(), 0.01)
            if clip == "full_model" and its_optimizer is plain:
                gradients = [parameter.grad for parameter in network.parameters()]
                norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
                assert norm > 0.01
                for gradient in gradients:
                    gradient *= 0.01 / norm
            its_optimizer.step()
    for found, parameter in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(found, parameter, rtol=1e-4, atol=1e-5)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match=r"SOLVER\.OPTIMIZER"):
        build_optimizer(make_cfg(OPTIMIZER="Sgd"), small_model())


def test_one_cycle_is_that_of_torch():
    solver = {"MAX_ITER": 1000, "BASE_LR": 0.2, "LR_SCHEDULER_NAME": "OneCycleLR"}
    cfg = make_cfg(**solver, ONE_CYCLE_RISE=0.3)
    parameter = nn.Parameter(torch.zeros(1))
    rates = learning_rates(cfg, torch.optim.SGD([parameter], 0.2))
    optimizer = torch.optim.SGD([parameter], 0.2)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=1000, pct_start=0.3, cycle_momentum=False
    )
    expected = []
    for _ in range(1000):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    # torch reaches the peak and the end one step earlier.
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=0, atol=2e-3)
    assert max(rates) == pytest.approx(0.2)
    assert rates[0] == pytest.approx(0.2 / 25)


def test_step_schedule_divides_at_the_steps_and_starts_without_warm_up():
    cfg = make_cfg(MAX_ITER=9, STEPS=(3, 6), GAMMA=0.1, BASE_LR=1.0, WARMUP_ITERS=0)
    rates = learning_rates(cfg, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0))
    assert rates == pytest.approx([1.0] * 3 + [0.1] * 3 + [0.01] * 3)


@pytest.mark.parametrize("rise", [0.0, 1.0, 1.5])
def test_a_one_cycle_that_never_rises_or_falls_is_refused(rise):
    cfg = make_cfg(LR_SCHEDULER_NAME="OneCycleLR", ONE_CYCLE_RISE=rise)
    with pytest.raises(InputError, match=r"SOLVER\.ONE_CYCLE_RISE"):
        build_lr_scheduler(cfg, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0))
