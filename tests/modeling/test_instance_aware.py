import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from ia_gcn.engine import build_optimizer
from ia_gcn.engine.trainer import wrap_in_ddp
from ia_gcn.modeling import InstanceAwareRecognizer
from tests.helpers.heads import HeadOnVectors, dense_logits
from tests.helpers.instance_aware import (
    DRAWS,
    FROZEN,
    GLOBAL_ALONE,
    INDIVIDUAL,
    NUM_LABELS,
    NUM_REGIONS,
    OVER_REGIONS,
    REGIONS_ALONE,
    REGIONS_ON_FUSED_GRAPH,
    SIZE,
    STATISTICAL,
    make_cfg,
    make_inputs,
    make_model,
)
from tests.helpers.label_graphs import assert_close
from tests.helpers.region_gcn import dense_region_logits

PRECOMPUTED = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}
LINEAR = {"MODEL.LABEL_HEAD.NAME": "LinearHead", **INDIVIDUAL}
LINEAR_AND_REGIONS_ON_FUSED_GRAPH = {"MODEL.LABEL_HEAD.NAME": "LinearHead"}
NOT_VARIATIONAL = {"MODEL.REGION_BRANCH.VARIATIONAL": False}
RES5 = {"MODEL.REGION_BRANCH.RES5": True, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4}
ROWS = [
    {},
    STATISTICAL,
    INDIVIDUAL,
    {**STATISTICAL, **INDIVIDUAL},
    GLOBAL_ALONE,
    REGIONS_ALONE,
    REGIONS_ON_FUSED_GRAPH,
    LINEAR,
    LINEAR_AND_REGIONS_ON_FUSED_GRAPH,
    NOT_VARIATIONAL,
    OVER_REGIONS,
    {**OVER_REGIONS, **INDIVIDUAL},
    RES5,
]


@torch.no_grad()
def evaluate(model, inputs):
    """Its outputs, and x (B, D), which its label head pools; None without a label head."""
    outputs = model.eval()(inputs)
    if model.label_head is None:
        return outputs, None
    features, _ = model.extract_features(inputs)
    return outputs, model.label_head.image_features(features.maps, features.masks)


def global_logits(model, x, presence=None):
    """Those of the label head for vectors x (B, D)."""
    return HeadOnVectors(model.label_head, model.label_graph)(x, presence)


def tensors(output):
    """All that an output holds, without its Instances."""
    fields = output["regions"].get_fields()
    boxes = fields["proposal_boxes"].tensor
    return {**output, **fields, "regions": boxes, "proposal_boxes": boxes}


def train_step(model, inputs):
    """The losses, with their gradient in the model."""
    with EventStorage() as storage:
        losses = model.train()(inputs)
    sum(losses.values()).backward()
    return losses, storage.latest()


def proposals_of(output):
    regions = output["regions"]
    return regions.proposal_boxes, regions.objectness_logits


# What comes out


@pytest.mark.parametrize("options", [*ROWS, DRAWS, {**DRAWS, **NOT_VARIATIONAL}, PRECOMPUTED])
def test_evaluation_returns_what_is_documented(options):
    model = make_model(options)
    assert isinstance(model, InstanceAwareRecognizer)
    outputs, _ = evaluate(model, make_inputs(counts=[9, 2, 0], boxes=False))
    assert len(outputs) == 3
    branches = {"logits_global"} if model.region_gcn is None else {"logits_region"}
    if 0 < model.global_weight < 1:
        branches = {"logits_global", "logits_region"}
    for i, output in enumerate(outputs):
        assert output.keys() == {"scores", "logits", "presence", "regions", *branches}
        for name in {"scores", "logits", "presence", *branches}:
            assert output[name].shape == (NUM_LABELS,)
        torch.testing.assert_close(output["scores"], 1 / (1 + (-output["logits"]).exp()))
        regions = output["regions"]
        assert regions.image_size == SIZE
        count = len(regions)
        assert count == [6, 2, 0][i] if options is PRECOMPUTED else 0 < count <= NUM_REGIONS
        assert set(regions.get_fields()) == {
            "proposal_boxes",
            "objectness_logits",
            "weights",
            "scores",
        }
        assert regions.proposal_boxes.tensor.shape == (count, 4)
        assert regions.objectness_logits.diff().le(0).all()
        assert regions.weights.shape == (count,)
        assert regions.scores.shape == (count, NUM_LABELS)
        assert ((regions.scores >= 0) & (regions.scores <= 1)).all()
        if count and "EVAL_SAMPLES" not in str(options):
            assert_close(output["presence"], regions.scores.amax(dim=0))
        if not count:
            assert output["presence"].tolist() == [1] * NUM_LABELS


@pytest.mark.parametrize("options", ROWS)
def test_fusion_and_branches_are_the_dense_formula(options):
    model = make_model(options)
    outputs, x = evaluate(model, make_inputs())
    presence = torch.stack([output["presence"] for output in outputs])
    weights = {"logits_global": model.global_weight, "logits_region": 1 - model.global_weight}
    expected = {}
    if options.get("MODEL.LABEL_HEAD.NAME") == "LinearHead":
        expected["logits_global"] = model.label_head.classifier(x)
    elif model.label_head is not None:
        a = None if "MODEL.LABEL_GRAPH.IMAGE_DEPENDENT" in options else presence
        head = HeadOnVectors(model.label_head, model.label_graph)
        expected["logits_global"] = dense_logits(head, x, a)
    if model.region_gcn is not None:
        if "MODEL.REGION_GCN.LCM" in options:
            lcm = torch.ones(NUM_LABELS, NUM_LABELS, dtype=torch.float64)
        else:
            lcm = model.label_graph.lcm
        expected["logits_region"] = [
            dense_region_logits(model.region_gcn, output["regions"].scores, a, lcm)
            for output, a in zip(outputs, presence)
        ]
    for i, output in enumerate(outputs):
        assert {name for name in output if name.startswith("logits_")} == expected.keys()
        for name, value in expected.items():
            assert_close(output[name], value[i])
        assert_close(output["logits"], sum(weights[name] * expected[name][i] for name in expected))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("lcm", ["individual", "image_dependent"])
def test_a_branch_without_weight_is_not_there(weight, lcm):
    options = {"MODEL.FUSION.GLOBAL_WEIGHT": weight, "MODEL.REGION_GCN.LCM": lcm}
    model = make_model(options)
    assert (model.region_gcn is None) == (weight == 1)
    assert (model.label_head is None) == (weight == 0)
    (output,), _ = evaluate(model, make_inputs(1))
    values = {"logits_global": weight, "logits_region": 1 - weight}
    expected = {name: share for name, share in values.items() if share}
    assert {name for name in output if name.startswith("logits_")} == expected.keys()
    assert_close(output["logits"], sum(v * output[name] for name, v in expected.items()))


def test_the_row_of_two_graphs_has_ml_gcn_as_its_global_branch():
    model = make_model({**STATISTICAL, **INDIVIDUAL})
    outputs, x = evaluate(model, make_inputs())
    for output, logits in zip(outputs, global_logits(model, x)):
        assert_close(output["logits_global"], logits)


def test_the_mean_of_draws_is_that_of_their_logits():
    model, inputs = make_model(DRAWS), make_inputs()
    outputs, _ = evaluate(model, inputs)
    draws = []
    noise = model.roi_heads.eval_noise
    for epsilon in noise:
        model.roi_heads.eval_noise = epsilon[None]
        draws.append(evaluate(model, inputs)[0])
    assert (draws[0][0]["logits"] - draws[1][0]["logits"]).abs().max() > 1e-3
    for i, output in enumerate(outputs):
        for name in ("logits", "logits_global", "logits_region", "presence"):
            assert_close(output[name], torch.stack([draw[i][name] for draw in draws]).mean(0))
        assert_close(
            output["regions"].scores,
            torch.stack([draw[i]["regions"].scores for draw in draws]).mean(0),
        )


# No image changes another's result, and no run another's.


@pytest.mark.parametrize(
    "options", [{}, DRAWS, OVER_REGIONS, {**STATISTICAL, **INDIVIDUAL}, NOT_VARIATIONAL, RES5]
)
def test_images_keep_to_themselves(options):
    model, inputs = make_model(options), make_inputs(4)
    outputs, _ = evaluate(model, inputs)
    assert (outputs[0]["logits"] - outputs[1]["logits"]).abs().max() > 1e-4
    for order in ([0], [3], [3, 2, 1, 0], [1, 1, 2]):
        found, _ = evaluate(model, [inputs[i] for i in order])
        for i, output in zip(order, found):
            torch.testing.assert_close(tensors(output), tensors(outputs[i]), rtol=1e-6, atol=1e-8)


def test_images_with_other_numbers_of_proposals_keep_to_themselves():
    model, inputs = make_model(PRECOMPUTED), make_inputs(4, counts=[0, 1, 6, 9])
    outputs, _ = evaluate(model, inputs)
    for order in ([0], [1], [0, 3], [2, 1, 0]):
        found, _ = evaluate(model, [inputs[i] for i in order])
        for i, output in zip(order, found):
            torch.testing.assert_close(tensors(output), tensors(outputs[i]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, DRAWS])
def test_evaluation_is_the_same_every_time(options):
    model, inputs = make_model(options, torch.float32), make_inputs()
    outputs, _ = evaluate(model, inputs)
    torch.manual_seed(3)
    for before, after in zip(outputs, evaluate(model, inputs)[0]):
        torch.testing.assert_close(tensors(after), tensors(before), rtol=0, atol=0)


# Training


@pytest.mark.parametrize("options", ROWS)
def test_the_loss_is_bce_of_the_fused_logits(options):
    model, kept, inputs = make_model(options), {}, make_inputs()
    for name in ("label_head", "region_gcn"):
        if getattr(model, name) is not None:
            getattr(model, name).register_forward_hook(
                lambda module, args, out, name=name: kept.update(
                    {name: out["logits"] if name == "label_head" else out}
                )
            )
    losses, stored = train_step(model, inputs)
    names = {"loss_multi_label", "loss_rpn_cls", "loss_rpn_loc"}
    variational = "MODEL.REGION_BRANCH.VARIATIONAL" not in options
    assert losses.keys() == names | ({"loss_kl"} if variational else set())
    assert ("regions/kl" in stored) == variational
    weights = {"label_head": model.global_weight, "region_gcn": 1 - model.global_weight}
    fused = sum(weights[name] * logits for name, logits in kept.items())
    targets = torch.stack([x["labels"] for x in inputs]).double()
    log_likelihood = torch.where(targets == 1, F.logsigmoid(fused), F.logsigmoid(-fused))
    expected = -log_likelihood[targets >= 0].sum() / targets.numel()
    assert_close(losses["loss_multi_label"], expected)


@pytest.mark.parametrize("options", ROWS)
@pytest.mark.parametrize("counts", [None, (3, 0, 9), (0, 0, 0)])
def test_losses_and_gradients_are_finite(options, counts):
    model = make_model({**options, **({} if counts is None else PRECOMPUTED)}, torch.float32)
    losses, _ = train_step(model, make_inputs(counts=counts))
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.fixture
def one_process():
    """A process group of this process alone, in which DistributedDataParallel is as strict."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", ROWS)
@pytest.mark.parametrize("counts", [None, (0, 0, 0)])
def test_it_trains_in_several_processes(monkeypatch, one_process, options, counts):
    model = make_model({**options, **({} if counts is None else PRECOMPUTED)}, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        model = wrap_in_ddp(model)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    # A parameter without a gradient is an error of the second step.
    for _ in range(2):
        losses, _ = train_step(model, make_inputs(counts=counts))
        assert losses["loss_multi_label"].isfinite()


@pytest.mark.parametrize("options", [{}, OVER_REGIONS, {"MODEL.LOSS.ROUGH_SCORE_WEIGHT": 1.0}])
def test_a_step_in_low_precision_is_finite(options):
    model = make_model(options, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = train_step(model, make_inputs())
    assert ("loss_rough_scores" in losses) == ("MODEL.LOSS.ROUGH_SCORE_WEIGHT" in options)
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = evaluate(model, make_inputs())
    assert all(output["scores"].isfinite().all() for output in outputs)


# Where the regions come from


def rpn_of(model):
    return {name: p.detach().clone() for name, p in model.proposal_generator.named_parameters()}


def optimizer_step(model, options, inputs):
    optimizer = build_optimizer(make_cfg(options), model)
    losses, _ = train_step(model, inputs)
    optimizer.step()
    return losses


def test_a_frozen_rpn_stays_as_it_is_and_asks_for_no_boxes():
    model = make_model(FROZEN)
    before = rpn_of(model)
    backbone = model.backbone.stem.conv1.weight.detach().clone()
    losses = optimizer_step(model, FROZEN, make_inputs(boxes=False))
    assert losses.keys() == {"loss_multi_label", "loss_kl"}
    torch.testing.assert_close(rpn_of(model), before, rtol=0, atol=0)
    assert not model.backbone.stem.conv1.weight.equal(backbone)
    assert not any(p.requires_grad for p in model.proposal_generator.parameters())
    assert all(p.requires_grad for p in model.roi_heads.parameters())


def test_a_frozen_rpn_is_never_in_training_mode():
    model = make_model(FROZEN)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.roi_heads.training == mode
        assert not any(module.training for module in model.proposal_generator.modules())
    model = make_model()
    assert model.train().proposal_generator.training
    assert not model.eval().proposal_generator.training


def test_a_frozen_model_that_was_just_built_asks_for_no_boxes():
    model = make_model(FROZEN)
    with EventStorage():
        assert "loss_multi_label" in model(make_inputs(boxes=False))


def test_an_rpn_is_trained_with_the_rest():
    model = make_model()
    before = rpn_of(model)
    losses = optimizer_step(model, {}, make_inputs())
    assert {"loss_rpn_cls", "loss_rpn_loc"} < losses.keys()
    assert losses["loss_rpn_cls"] > 0
    after = rpn_of(model)
    assert all(not after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize("missing", [slice(None), slice(1, 2)])
def test_an_rpn_can_not_be_trained_without_boxes(error_line, missing):
    model, inputs = make_model(), make_inputs()
    for x in inputs[missing]:
        del x["instances"]
    assert "INPUT.WITH_BOXES" in error_line(train_step, model, inputs)
    evaluate(model, inputs)


def test_proposals_of_a_file_do_as_well_as_an_rpns():
    model, reader = make_model(), make_model(PRECOMPUTED, seed=1)
    assert reader.proposal_generator is None
    reader.load_state_dict(model.state_dict(), strict=False)
    inputs = make_inputs()
    outputs, _ = evaluate(model, inputs)
    for x, output in zip(inputs, outputs):
        x["proposals"] = Instances(SIZE)
        x["proposals"].proposal_boxes, x["proposals"].objectness_logits = proposals_of(output)
    for output, expected in zip(evaluate(reader, inputs)[0], outputs):
        torch.testing.assert_close(tensors(output), tensors(expected))
    # The field names of the results are not left in the inputs.
    assert not inputs[0]["proposals"].has("weights")


@pytest.mark.parametrize("options", [PRECOMPUTED, {**PRECOMPUTED, **OVER_REGIONS}])
def test_any_number_of_proposals(options):
    model, inputs = make_model(options), make_inputs(4, counts=[0, 1, NUM_REGIONS, 9])
    outputs, x = evaluate(model, inputs)
    assert [len(output["regions"]) for output in outputs] == [0, 1, NUM_REGIONS, NUM_REGIONS]
    # Without a region, the statistical graph and a bias are all there is.
    assert_close(outputs[0]["logits_global"], global_logits(model, x)[0])
    assert_close(outputs[0]["logits_region"], model.region_gcn.classifier.bias)
    assert_close(outputs[1]["presence"], outputs[1]["regions"].scores[0])
    for i, output in enumerate(outputs[1:], start=1):
        expected = inputs[i]["proposals"].proposal_boxes.tensor[:NUM_REGIONS]
        assert output["regions"].proposal_boxes.tensor.equal(expected)
    inputs[3]["proposals"] = inputs[3]["proposals"][:NUM_REGIONS]
    assert_close(evaluate(model, inputs)[0][3]["logits"], outputs[3]["logits"])


@pytest.mark.parametrize("training", [False, True])
def test_missing_proposals_are_named(error_line, training):
    model, inputs = make_model(PRECOMPUTED), make_inputs(counts=[3, 3, 3])
    del inputs[1]["proposals"]
    line = error_line(train_step if training else evaluate, model, inputs)
    assert "PrecomputedProposals" in line
    assert "MODEL.LOAD_PROPOSALS" in line


def test_inputs_are_left_alone():
    (x,) = inputs = make_inputs(1, counts=[9])
    before = {"image": x["image"].clone(), "labels": x["labels"].clone()}
    fields = {name: [*x[name].get_fields()] for name in ("instances", "proposals")}
    for options in ({}, PRECOMPUTED):
        model = make_model(options)
        train_step(model, inputs)
        evaluate(model, inputs)
        assert all(x[name].equal(value) for name, value in before.items())
        assert {name: [*x[name].get_fields()] for name in fields} == fields
        assert len(x["proposals"]) == 9


# How it is built


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"MODEL.FUSION.GLOBAL_WEIGHT": 1.1}, ["MODEL.FUSION.GLOBAL_WEIGHT", "1.1"]),
        ({"MODEL.FUSION.GLOBAL_WEIGHT": -0.1}, ["MODEL.FUSION.GLOBAL_WEIGHT", "-0.1"]),
        ({"MODEL.FUSION.GLOBAL_WEIGHT": float("nan")}, ["MODEL.FUSION.GLOBAL_WEIGHT", "nan"]),
        (
            {"MODEL.REGION_BRANCH.RES5": True, "MODEL.ROI_HEADS.IN_FEATURES": ["res5"]},
            ["MODEL.REGION_BRANCH.RES5", "MODEL.ROI_HEADS.IN_FEATURES", "res4"],
        ),
        ({"MODEL.REGION_GCN.LCM": "both"}, ["MODEL.REGION_GCN.LCM", "'both'"]),
        ({"MODEL.REGION_GCN.READING": "pixels"}, ["MODEL.REGION_GCN.READING", "'pixels'"]),
        ({"MODEL.ROI_HEADS.NAME": "StandardROIHeads"}, ["StandardROIHeads has no region_features"]),
        ({"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}, ["Res5ROIHeads has no region_features"]),
        (
            {**STATISTICAL, **GLOBAL_ALONE, **FROZEN},
            ["MODEL.LABEL_GRAPH.IMAGE_DEPENDENT", "MODEL.FUSION.GLOBAL_WEIGHT"],
        ),
        # A head without a graph makes no use of the regions.
        ({**LINEAR, **GLOBAL_ALONE, **PRECOMPUTED}, ["MODEL.FUSION.GLOBAL_WEIGHT"]),
        ({"MODEL.LABEL_HEAD.NUM_LABELS": 0, "DATASETS.TRAIN": (), "DATASETS.TEST": ()}, ["NUM_L"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(error_line, options, names):
    line = error_line(build_model, make_cfg(options))
    assert all(name in line for name in names)


@pytest.mark.parametrize("options", [STATISTICAL, LINEAR])
def test_an_rpn_may_be_trained_beside_a_head_that_makes_no_use_of_regions(options):
    model, inputs = make_model({**options, **GLOBAL_ALONE, **NOT_VARIATIONAL}), make_inputs()
    outputs, x = evaluate(model, inputs)
    graph = None if options is LINEAR else model.label_graph
    expected = HeadOnVectors(model.label_head, graph)(x)
    assert_close(torch.stack([output["logits"] for output in outputs]), expected)
    losses, _ = train_step(model, inputs)
    assert set(losses) == {"loss_multi_label", "loss_rpn_cls", "loss_rpn_loc"}
    assert model.backbone.stem.conv1.weight.grad.any()


def test_a_linear_head_does_not_look_at_the_regions():
    model, inputs = make_model({**LINEAR, **PRECOMPUTED}), make_inputs(counts=[6, 2, 0])
    outputs, _ = evaluate(model, inputs)
    others, _ = evaluate(model, make_inputs(counts=[1, 0, 5]))
    for output, other in zip(outputs, others):
        assert other["logits_global"].equal(output["logits_global"])
        assert not torch.allclose(other["logits_region"], output["logits_region"])


@pytest.mark.parametrize("options", [{}, STATISTICAL, REGIONS_ON_FUSED_GRAPH])
def test_a_bare_graph_is_not_trained(options):
    model = build_model(make_cfg(options))
    with pytest.raises(RuntimeError, match="bare"):
        train_step(model, make_inputs())


@pytest.mark.parametrize("options", [{}, REGIONS_ALONE, REGIONS_ON_FUSED_GRAPH, DRAWS, RES5])
def test_a_checkpoint_is_complete_in_itself(options):
    model, restored = make_model(options), make_model(options, seed=1)
    restored.load_state_dict(model.state_dict())
    outputs = [evaluate(each, make_inputs())[0] for each in (model, restored)]
    torch.testing.assert_close(*([tensors(output) for output in run] for run in outputs))
