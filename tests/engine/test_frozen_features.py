"""Heads on frozen features against the same recogniser on images."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from ia_gcn.data.known_labels import draw_known
from ia_gcn.data.samplers import PositionSampler, mix_seeds
from ia_gcn.engine.frozen_features import (
    FrozenFeatures,
    HeadsOnFeatures,
    extract_features,
    train_heads,
)
from tests.helpers.instance_aware import (
    DRAWS,
    FROZEN,
    GLOBAL_ALONE,
    INDIVIDUAL,
    NUM_LABELS,
    OVER_REGIONS,
    REGIONS_ALONE,
    STATISTICAL,
    make_cfg,
    make_inputs,
    make_model,
)

PLAIN = {"MODEL.META_ARCHITECTURE": "MultiLabelRecognizer"}
ROWS = [{}, PLAIN, DRAWS, GLOBAL_ALONE, REGIONS_ALONE, OVER_REGIONS, {**STATISTICAL, **INDIVIDUAL}]


@pytest.mark.parametrize("options", ROWS)
def test_they_score_as_on_images(options):
    network, inputs = make_model(), make_inputs(batch=5)
    model = make_model(options, seed=1)
    share_network(network, model)
    features = extract_features(network, [inputs[:2], inputs[2:]])
    found = HeadsOnFeatures(model).predict(features, batch_size=3)
    with torch.no_grad():
        expected = torch.stack([output["logits"] for output in model.eval()(inputs)])
    torch.testing.assert_close(found, expected)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("options", [{}, OVER_REGIONS, REGIONS_ALONE])
def test_their_losses_and_gradients_are_those_on_images(options):
    options = {**options, **FROZEN, "MODEL.LOSS.ROUGH_SCORE_WEIGHT": 0.5}
    # An image without batch norm's view of the others: in training it has none of its own.
    model, inputs = make_model({**options, "MODEL.RESNETS.NORM": "FrozenBN"}), make_inputs()
    features = extract_features(model, [inputs])
    heads = HeadsOnFeatures(model)
    runs = []
    for argument, module in ((inputs, model), (features, heads)):
        model.zero_grad()
        torch.manual_seed(3)
        with EventStorage():
            losses = module.train()(argument)
        sum(losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        runs.append((losses, gradients))
    torch.testing.assert_close(*runs)
    assert not any(name.startswith(("backbone", "proposal")) for name in runs[1][1])


def test_fewer_regions_are_the_best_ones():
    network, inputs = make_model(), make_inputs()
    model = make_model({"MODEL.REGION_BRANCH.NUM_REGIONS": 2}, seed=1)
    share_network(network, model)
    found = HeadsOnFeatures(model).predict(extract_features(network, [inputs]))
    with torch.no_grad():
        expected = torch.stack([output["logits"] for output in model.eval()(inputs)])
    torch.testing.assert_close(found, expected)


def test_a_training_repeats_and_leaves_the_network_alone():
    inputs = make_inputs(batch=6)
    options = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 25, "SOLVER.BASE_LR", 0.01, "SEED", 5]
    cfg = make_cfg()
    cfg.merge_from_list(options)
    ends = []
    for _ in range(2):
        model = make_model(dtype=torch.float32)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        features = extract_features(model, [inputs])
        torch.manual_seed(0)
        _, storage = train_heads(cfg, model, features)
        after = model.state_dict()
        changed = {name.split(".")[0] for name in after if not before[name].equal(after[name])}
        assert changed == {"label_head", "roi_heads", "region_gcn"}
        losses = [value for value, _ in storage.history("loss_multi_label").values()]
        assert len(losses) == 25
        assert losses[-1] < losses[0]
        ends.append(after)
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_label_mask_training_is_that_on_images():
    """A head is told of the labels that the mapper would draw at the same place in the stream."""
    options = {**PLAIN, "MODEL.LABEL_HEAD.NAME": "CTranHead", "INPUT.KNOWN_LABELS": 0.75}
    cfg = make_cfg(options)
    cfg.merge_from_list(["SEED", 5, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3])
    model = make_model(options, dtype=torch.float32)
    features = extract_features(model, [make_inputs(batch=6)])
    assert features.features.label_states is None
    told = []
    model.label_head.register_forward_pre_hook(
        lambda head, args, kwargs: told.append(kwargs["label_states"].clone()), with_kwargs=True
    )
    train_heads(cfg, model, features)
    stream = itertools.islice(PositionSampler(6, 5), 12)
    for states, (place, image) in zip(torch.cat(told), stream):
        np.random.seed(mix_seeds(5, place))
        assert states.equal(draw_known(features.targets[image], 0.75))
    assert (torch.cat(told) >= 0).any()


def test_images_with_rare_labels_are_repeated_as_in_a_training_on_images():
    cfg = make_cfg(PLAIN)
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"])
    cfg.merge_from_list(["DATALOADER.REPEAT_THRESHOLD", 1.0, "SEED", 5])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 6])
    model = make_model(PLAIN, dtype=torch.float32)
    targets = torch.zeros(6, NUM_LABELS)
    targets[:, 0], targets[2, 1], targets[3, 1] = 1, 1, -1
    features = extract_features(model, [make_inputs(batch=6)])._replace(targets=targets)
    seen = []
    model.label_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]["res5"]))
    train_heads(cfg, model, features)
    # A label of one image in six: √6.
    factors = torch.tensor([1, 1, 6**0.5, 1, 1, 1])
    order = [image for _, image in itertools.islice(PositionSampler(6, 5, factors), 24)]
    assert torch.cat(seen).equal(features.features.maps["res5"][order])
    assert order.count(2) > 4


def test_features_come_back_from_a_file(tmp_path):
    features = extract_features(make_model(dtype=torch.float32), [make_inputs(batch=2)])
    features.save(str(tmp_path / "features.safetensors"))
    again = FrozenFeatures.load(str(tmp_path / "features.safetensors"))
    assert again.targets.equal(features.targets)
    assert again.targets.shape == (2, NUM_LABELS)
    found, expected = again.features, features.features
    assert found.maps.keys() == found.masks.keys() == {"res5"}
    assert found.maps["res5"].equal(expected.maps["res5"])
    assert found.regions.equal(expected.regions)
    assert found.valid.equal(expected.valid)
    assert again.pick([1]).features.maps["res5"].equal(expected.maps["res5"][1:])


def share_network(network, model):
    """Give a model the backbone and, where it has one, the RPN of another."""
    for name in ("backbone", "proposal_generator"):
        if hasattr(model, name):
            getattr(model, name).load_state_dict(getattr(network, name).state_dict())
