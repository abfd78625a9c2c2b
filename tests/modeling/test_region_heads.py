import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_roi_heads
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn
from torchvision.ops import roi_align

from ia_gcn import add_ia_gcn_config
from ia_gcn.errors import InputError
from ia_gcn.modeling import (
    RegionGCN,
    Regions,
    VariationalROIHeads,
    gaussian_kl,
    graph_scale,
    region_affinity,
)
from tests.helpers.label_graphs import assert_close, dense_fused
from tests.helpers.region_gcn import dense_region_logits

quick = settings(max_examples=60)

NUM_LABELS, NUM_REGIONS, DIM, STRIDE = 4, 3, 6, 16
# No proposal at all, one, fewer than N, N and more.
COUNTS = [0, 1, 2, 3, 5]
BATCH = len(COUNTS)
KL_KEYS = {"regions/mean_abs_mu", "regions/mean_sigma", "regions/kl"}


def make_heads(pooler_resolution=2, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    heads = VariationalROIHeads(
        **{
            "in_features": ["res4"],
            "pooler": ROIPooler(pooler_resolution, [1 / STRIDE], 2, "ROIAlignV2"),
            "res5": None,
            "feature_dim": DIM,
            "num_regions": NUM_REGIONS,
            "num_labels": NUM_LABELS,
            "variational": True,
            **options,
        }
    )
    return heads.to(dtype)


def make_features(batch=BATCH, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {"res4": torch.randn(batch, DIM, 5, 6, generator=generator, dtype=dtype)}


def make_proposals(counts=COUNTS, seed=2):
    """Boxes in an image of 80×96 pixels."""
    generator = torch.Generator().manual_seed(seed)
    proposals = []
    for count in counts:
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([60.0, 50.0])
        sizes = 8 + torch.rand(count, 2, generator=generator) * 28
        instances = Instances((80, 96))
        instances.proposal_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.objectness_logits = torch.arange(count, 0, -1.0)
        proposals.append(instances)
    return proposals


def make_targets(batch=BATCH):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-1, 2, (batch, NUM_LABELS), generator=generator).float()


def run_training(heads, features, proposals, targets=None, seed=7):
    """Regions, losses, and what the storage got, with the noise of a seed."""
    torch.manual_seed(seed)
    with EventStorage() as storage:
        (regions,), losses = heads.train()(None, features, proposals, targets)
    return regions, losses, {name: value for name, (value, _) in storage.latest().items()}


@torch.no_grad()
def run_evaluation(heads, features, proposals):
    draws, losses = heads.eval()(None, features, proposals)
    assert losses == {}
    return draws


def dot(a, b):
    return sum(u * v for u, v in zip(a, b))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pooled_regions(features, proposals, resolution=2, stage=None):
    """X of each image, one region after the other, the first N."""
    images = []
    for image, instances in zip(features["res4"], proposals):
        images.append([])
        for box in instances.proposal_boxes.tensor[:NUM_REGIONS]:
            rois = [box[None].to(image.dtype)]
            cells = roi_align(image[None], rois, resolution, 1 / STRIDE, 2, aligned=True)
            cells = cells if stage is None else stage(cells)
            images[-1].append(cells.mean(dim=(2, 3))[0].tolist())
    return images


def loop_regions(heads, regions_of_images, noise=None):
    """A dict per image, by Eq. 2-3, 7-9 and 14; noise (B, N), None for z = zµ."""
    weight, bias = heads.rough_classifier.weight.tolist(), heads.rough_classifier.bias.tolist()
    images = []
    for i, regions in enumerate(regions_of_images):
        image = {name: [] for name in ("mean", "deviation", "kl", "weights", "scores")}
        for k, x in enumerate(regions):
            z = 1.0
            if heads.variational:
                z = mean = heads.prior_mean + dot(x, heads.weight_mean.weight[0].tolist())
                log_variance = dot(x, heads.weight_log_variance.weight[0].tolist())
                variance = math.exp(log_variance)
                off = mean - heads.prior_mean
                image["mean"].append(abs(mean))
                image["deviation"].append(math.sqrt(variance))
                image["kl"].append((off**2 + variance - 1 - log_variance) / 2)
                if noise is not None:
                    z += math.sqrt(variance) * noise[i][k].item()
            weighted = [z * v for v in x]
            image["weights"].append(z)
            image["scores"].append(
                [sigmoid(dot(weighted, row) + b) for row, b in zip(weight, bias)]
            )
        columns = list(zip(*image["scores"]))
        image["presence"] = [max(column) for column in columns] or [1.0] * NUM_LABELS
        images.append(image)
    return images


def assert_regions(regions, images):
    assert regions.valid.tolist() == [
        [k < len(image["weights"]) for k in range(NUM_REGIONS)] for image in images
    ]
    for i, image in enumerate(images):
        count = len(image["weights"])
        for name, values in (("weights", regions.weights), ("scores", regions.scores)):
            np.testing.assert_allclose(values[i, :count].tolist(), image[name], rtol=1e-9)
            assert not values[i, count:].any()
        np.testing.assert_allclose(regions.presence[i].tolist(), image["presence"], rtol=1e-9)


def mean_of_images(images, name):
    return np.mean([np.mean(image[name]) if image[name] else 0.0 for image in images])


def loop_rough_loss(images, targets):
    """BCE of a, mean over labels and images; nothing of images without regions."""
    total = 0.0
    for image, labels in zip(images, targets.tolist()):
        for a, y in zip(image["presence"], labels) if image["weights"] else ():
            total -= {1: math.log(a), 0: math.log(1 - a), -1: 0}[y]
    return total / targets.numel()


# gaussian_kl


@pytest.mark.parametrize("prior_mean", [0.0, 1.0, -0.3])
def test_kl_of_the_prior_is_zero(prior_mean):
    mean = torch.full((3,), prior_mean)
    assert gaussian_kl(mean, torch.zeros(3), prior_mean).tolist() == [0, 0, 0]
    assert gaussian_kl(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


@quick
@given(st.floats(-5, 5), st.floats(-6, 6), st.floats(-3, 3))
def test_kl_is_that_of_torch_distributions(mean, log_variance, prior_mean):
    values = torch.tensor([mean, log_variance, prior_mean], dtype=torch.float64)
    normal = torch.distributions.Normal(values[0], (values[1] / 2).exp())
    prior = torch.distributions.Normal(values[2], torch.ones((), dtype=torch.float64))
    expected = torch.distributions.kl_divergence(normal, prior).item()
    found = gaussian_kl(values[0], values[1], prior_mean).item()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("mean", "variance", "prior_mean"), [(0, 1, 1), (0.5, 0.2, 0), (-1, 3, 1)])
def test_kl_is_the_integral(mean, variance, prior_mean):
    def integrand(z):
        log_ratio = ((z - prior_mean) ** 2 - (z - mean) ** 2 / variance - math.log(variance)) / 2
        density = math.exp(-((z - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        return density * log_ratio

    expected, _ = quad(integrand, -30, 30, points=[mean])
    kl = gaussian_kl(torch.tensor(float(mean)), torch.tensor(math.log(variance)), prior_mean)
    assert kl.item() == pytest.approx(expected, rel=1e-5)


# VariationalROIHeads: X


def make_stage(norm=nn.BatchNorm2d, out_dim=DIM + 2):
    """A strided convolution with a norm in the place of res5."""
    torch.manual_seed(4)
    stage = nn.Sequential(nn.Conv2d(DIM, out_dim, 3, stride=2, padding=1), norm(out_dim), nn.ReLU())
    return stage.double()


@pytest.mark.parametrize("resolution", [1, 2, 7])
@pytest.mark.parametrize("with_stage", [False, True])
def test_region_features_are_means_of_roi_align(resolution, with_stage):
    stage = make_stage().eval() if with_stage else None
    heads = make_heads(resolution, res5=stage, feature_dim=DIM + 2 if with_stage else DIM).eval()
    features, proposals = make_features(), make_proposals()
    x, valid = heads.region_features(features, proposals)
    expected = pooled_regions(features, proposals, resolution, stage)
    assert valid.tolist() == [[k < min(n, NUM_REGIONS) for k in range(NUM_REGIONS)] for n in COUNTS]
    np.testing.assert_allclose(x[valid].tolist(), list(itertools.chain(*expected)), rtol=1e-10)
    assert not x[~valid].any()


def test_no_image_changes_the_features_of_anothers_regions():
    heads, features, proposals = make_heads().eval(), make_features(), make_proposals()
    x, _ = heads.region_features(features, proposals)
    for i, instances in enumerate(proposals):
        alone = {"res4": features["res4"][i : i + 1]}
        assert_close(heads.region_features(alone, [instances])[0][0], x[i])


# VariationalROIHeads: z, scores, a and the losses

VARIANTS = [
    {},
    {"prior_mean": 1.0},
    {"kl_weight": 0.3, "rough_score_weight": 0.7},
    {"variational": False},
    {"variational": False, "rough_score_weight": 2.0},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("counts", [COUNTS, [3, 3], [0, 0], [1]])
def test_training_is_the_loop(counts, options):
    heads, batch = make_heads(**options), len(counts)
    features, proposals, targets = make_features(batch), make_proposals(counts), make_targets(batch)
    regions, losses, stored = run_training(heads, features, proposals, targets, seed=7)
    torch.manual_seed(7)
    noise = torch.randn(batch, NUM_REGIONS, dtype=torch.float64)
    images = loop_regions(heads, pooled_regions(features, proposals), noise)
    assert_regions(regions, images)

    expected = {}
    if heads.variational:
        expected["loss_kl"] = heads.kl_weight * mean_of_images(images, "kl")
    if heads.rough_score_weight:
        expected["loss_rough_scores"] = heads.rough_score_weight * loop_rough_loss(images, targets)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].shape == ()
        assert losses[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12)

    expected = {"regions/mean_presence": mean_of_images(images, "presence")}
    if heads.variational:
        expected["regions/mean_abs_mu"] = mean_of_images(images, "mean")
        expected["regions/mean_sigma"] = mean_of_images(images, "deviation")
        expected["regions/kl"] = mean_of_images(images, "kl")
    assert stored == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("counts", [COUNTS, [0, 0]])
def test_evaluation_takes_the_mean_of_z(counts, options):
    heads, features = make_heads(**options), make_features(len(counts))
    proposals = make_proposals(counts)
    images = loop_regions(heads, pooled_regions(features, proposals))
    state = torch.get_rng_state()
    for _ in range(2):
        (regions,) = run_evaluation(heads, features, proposals)
        assert_regions(regions, images)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("prior_mean", [0.0, 1.0])
def test_evaluation_draws_are_the_same_for_every_image(samples, prior_mean):
    heads = make_heads(eval_samples=samples, prior_mean=prior_mean)
    features, proposals = make_features(), make_proposals()
    draws = run_evaluation(heads, features, proposals)
    assert len(draws) == samples
    found = [[regions.weights[i, 0].item() for regions in draws] for i in (1, 2, 3, 4)]
    assert len({*itertools.chain(*found)}) == 4 * samples
    loops = loop_regions(heads, pooled_regions(features, proposals))
    # Solved for ε, which is that of the k-th region of any image.
    noise = torch.zeros(samples, NUM_REGIONS, dtype=torch.float64)
    for k, (draw, regions) in itertools.product(range(NUM_REGIONS), enumerate(draws)):
        mean, deviation = loops[3]["weights"][k], loops[3]["deviation"][k]
        noise[draw, k] = (regions.weights[3, k].item() - mean) / deviation
    for epsilon, regions in zip(noise, draws):
        rows = [epsilon] * len(proposals)
        assert_regions(regions, loop_regions(heads, pooled_regions(features, proposals), rows))
    for regions, before in zip(run_evaluation(heads, features, proposals), draws):
        assert regions.weights.equal(before.weights)


@pytest.mark.parametrize("samples", [0, 3])
def test_evaluation_of_a_image_is_the_same_in_any_batch(samples):
    heads = make_heads(eval_samples=samples)
    features, proposals = make_features()["res4"], make_proposals()

    def evaluate(order):
        rows = list(order)
        draws = run_evaluation(heads, {"res4": features[rows]}, [proposals[i] for i in rows])
        return [[tuple(v[j] for v in regions) for regions in draws] for j in range(len(rows))]

    together = evaluate(range(5))
    for order in ([0], [4], [4, 3, 2, 1, 0], [3, 3, 1], [2, 0, 4]):
        for i, image in zip(order, evaluate(order)):
            torch.testing.assert_close(image, together[i])


def test_noise_of_evaluation_is_of_no_seed_and_in_no_checkpoint():
    heads, twin = (make_heads(eval_samples=2, seed=seed) for seed in (0, 1))
    assert heads.state_dict().keys() == make_heads().state_dict().keys()
    assert heads.rough_classifier.weight.equal(make_heads().rough_classifier.weight)
    twin.load_state_dict(heads.state_dict())
    features, proposals = make_features(), make_proposals()
    draws = [run_evaluation(model, features, proposals) for model in (heads, twin)]
    torch.testing.assert_close(*([[*regions] for regions in draw] for draw in draws))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"variational": False}, {"eval_samples": 2}])
def test_regions_after_the_best_change_nothing(options, training):
    heads, features = make_heads(**options, rough_score_weight=1.0), make_features(3)
    many = make_proposals([3, 9, 40])
    results = []
    for proposals in (many, [instances[:NUM_REGIONS] for instances in many]):
        if training:
            regions, losses, stored = run_training(heads, features, proposals, make_targets(3))
            results.append(([*regions], losses, stored))
        else:
            results.append([[*regions] for regions in run_evaluation(heads, features, proposals)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert [len(instances) for instances in many] == [3, 9, 40]


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0], [0]])
@pytest.mark.parametrize("with_stage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_finite_with_any_number_of_regions(counts, with_stage, dtype):
    stage = make_stage(out_dim=DIM) if with_stage else None
    heads = make_heads(res5=stage, rough_score_weight=1.0, dtype=dtype)
    features = make_features(len(counts), dtype)["res4"].requires_grad_()
    regions, losses, _ = run_training(
        heads, {"res4": features}, make_proposals(counts), make_targets(len(counts))
    )
    assert regions.presence[0].tolist() == [1] * NUM_LABELS
    (sum(losses.values()) + regions.presence.sum() + regions.scores.sum()).backward()
    for name, parameter in heads.named_parameters():
        # A res5 that sees no region has no gradient.
        if any(counts) or not name.startswith("res5"):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() == any(counts), name
    # The mean and variance of a batch norm, too.
    assert all(buffer.isfinite().all() for buffer in heads.buffers())
    if any(counts):
        assert features.grad.isfinite().all()
        assert [image.any().item() for image in features.grad] == [n > 0 for n in counts]


@pytest.mark.parametrize("options", [{}, {"prior_mean": 1.0}, {"variational": False}])
def test_gradients_of_regions_and_losses(monkeypatch, options):
    heads = make_heads(**options, rough_score_weight=0.5).train()
    x, valid = heads.region_features(make_features(), make_proposals())
    targets = make_targets()
    names, weights = zip(*heads.named_parameters())

    def outputs(x, *weights):
        torch.manual_seed(3)
        monkeypatch.setattr(heads, "region_features", lambda *args: (x, valid))
        with EventStorage():
            (regions,), losses = torch.func.functional_call(
                heads, dict(zip(names, weights)), (None, None, None, targets)
            )
        return regions.weights, regions.scores, regions.presence, *losses.values()

    if heads.variational:
        assert {"weight_mean.weight", "weight_log_variance.weight"} < {*names}
    assert torch.autograd.gradcheck(outputs, (x.detach().requires_grad_(), *weights))


def test_the_storage_gets_every_step():
    heads, features, proposals = make_heads(), make_features(), make_proposals()
    with EventStorage() as storage:
        for _ in range(3):
            heads.train()(None, features, proposals)
            storage.step()
        run_evaluation(heads, features, proposals)
    for name in {*KL_KEYS, "regions/mean_presence"}:
        assert [step for _, step in storage.history(name).values()] == [0, 1, 2]


@pytest.mark.parametrize("training", [False, True])
def test_without_variational_inference_no_weight_is_learned(training):
    heads, features, proposals = make_heads(variational=False), make_features(), make_proposals()
    assert [name for name, _ in heads.named_children()] == ["pooler", "rough_classifier"]
    if training:
        regions, losses, stored = run_training(heads, features, proposals)
        assert losses == {}
        assert not KL_KEYS & stored.keys()
    else:
        (regions,) = run_evaluation(heads, features, proposals)
    assert regions.weights.equal(regions.valid.double())


@pytest.mark.parametrize("bias", [0.0, 300.0, -300.0])
def test_a_step_in_low_precision_is_finite(bias):
    heads = make_heads(dtype=torch.float32, rough_score_weight=1.0)
    nn.init.constant_(heads.rough_classifier.bias, bias)
    features = make_features(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        regions, losses, _ = run_training(heads, features, make_proposals(), make_targets())
    assert regions.presence.dtype == regions.weights.dtype == torch.float32
    assert regions.scores.isfinite().all()
    loss = sum(losses.values())
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())


# VariationalROIHeads from a config


def make_cfg():
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet10_backbone"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = NUM_LABELS
    cfg.MODEL.ROI_HEADS.NAME = "VariationalROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    cfg.MODEL.REGION_BRANCH.NUM_REGIONS = NUM_REGIONS
    return cfg


def build_heads(cfg):
    torch.manual_seed(0)
    return build_roi_heads(cfg, build_backbone(cfg).output_shape()).double()


def test_heads_from_a_config():
    cfg = make_cfg()
    cfg.MODEL.REGION_BRANCH.PRIOR_MEAN = 0.5
    cfg.MODEL.LOSS.KL_WEIGHT = 0.2
    cfg.MODEL.LOSS.ROUGH_SCORE_WEIGHT = 0.3
    heads = build_heads(cfg)
    assert (heads.prior_mean, heads.kl_weight, heads.rough_score_weight) == (0.5, 0.2, 0.3)
    features = {"res4": torch.randn(5, 16, 5, 6).double()}
    images = loop_regions(heads, pooled_regions(features, make_proposals()))
    assert_regions(run_evaluation(heads, features, make_proposals())[0], images)
    cfg.MODEL.REGION_BRANCH.EVAL_SAMPLES = 2
    assert len(run_evaluation(build_heads(cfg), features, make_proposals())) == 2
    cfg.MODEL.REGION_BRANCH.VARIATIONAL = False
    assert not build_heads(cfg).variational


@pytest.mark.parametrize("feature", ["res3", "res5"])
def test_regions_can_be_pooled_from_another_feature_map(feature):
    cfg = make_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [feature]
    heads = build_heads(cfg).eval()
    (pooler,) = heads.pooler.level_poolers
    assert pooler.spatial_scale == {"res3": 1 / 8, "res5": 1 / 32}[feature]
    assert heads.rough_classifier.in_features == {"res3": 8, "res5": 32}[feature]


def test_res5_of_a_config_goes_over_every_region():
    cfg = make_cfg()
    cfg.MODEL.REGION_BRANCH.RES5 = True
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 14
    heads = build_heads(cfg).eval()
    heads.res5 = build_backbone(cfg).res5.eval().double()
    features = {"res4": torch.randn(5, 16, 5, 6).double()}
    regions = pooled_regions(features, make_proposals(), 14, heads.res5)
    assert {len(x) for image in regions for x in image} == {32}
    assert_regions(
        run_evaluation(heads, features, make_proposals())[0], loop_regions(heads, regions)
    )


# RegionGCN


def make_gcn(reading, num_regions=NUM_REGIONS, hidden_dims=(5, 2, 7)):
    torch.manual_seed(0)
    gcn = RegionGCN(
        reading=reading,
        num_labels=NUM_LABELS,
        num_regions=num_regions,
        hidden_dims=hidden_dims,
    )
    return gcn.double()


def make_regions(counts=(3, 0, 2, 1), num_regions=NUM_REGIONS):
    """Regions and a graph, with a label that is absent for sure."""
    rng = torch.Generator().manual_seed(1)
    shape = (len(counts), num_regions, NUM_LABELS)
    valid = torch.arange(num_regions) < torch.tensor(counts)[:, None]
    # One draw for each region, whatever there is beside it.
    scores = torch.zeros(shape, dtype=torch.float64)
    for image, count in zip(scores, counts):
        for k in range(count):
            image[k] = torch.rand(NUM_LABELS, generator=rng, dtype=torch.float64)
    scores[0, :, 2] = 0
    has_regions = valid.any(dim=1, keepdim=True)
    presence = scores.amax(dim=1).where(has_regions, 1)
    lcm = torch.rand(NUM_LABELS, NUM_LABELS, generator=rng, dtype=torch.float64)
    return Regions(valid, valid.double(), scores, presence), lcm.fill_diagonal_(1)


def dense_logits_of_images(gcn, regions, lcm):
    images = zip(regions.scores, regions.valid, regions.presence)
    return torch.stack([dense_region_logits(gcn, s[v], a, lcm) for s, v, a in images])


both_readings = pytest.mark.parametrize("reading", ["labels", "regions"])


@both_readings
@pytest.mark.parametrize("graph", ["fused", "individual"])
@pytest.mark.parametrize("hidden_dims", [(5,), (2,), (5, 2, 7)])
def test_region_logits_are_the_dense_formula(reading, hidden_dims, graph):
    gcn, (regions, lcm) = make_gcn(reading, hidden_dims=hidden_dims), make_regions()
    lcm = lcm if graph == "fused" else torch.ones_like(lcm)
    logits = gcn(regions, lcm)
    assert_close(logits, dense_logits_of_images(gcn, regions, lcm))
    assert logits[1].equal(gcn.classifier.bias)
    # Else a graph without edges would do as well.
    assert not torch.allclose(logits, gcn(regions, torch.eye(NUM_LABELS).double()))


def test_affinity_is_the_product_of_matrices():
    regions, lcm = make_regions()
    affinity = region_affinity(regions.scores, lcm, graph_scale(lcm, regions.presence))
    for found, scores, presence in zip(affinity, regions.scores, regions.presence):
        assert_close(found, scores @ dense_fused(lcm, presence) @ scores.T)


@both_readings
def test_gradients_of_region_logits(reading):
    gcn, (regions, lcm) = make_gcn(reading), make_regions()
    names, weights = zip(*gcn.named_parameters())
    inputs = (regions.scores, 0.9 * regions.presence + 0.05, *weights)
    inputs = [value.detach().requires_grad_() for value in inputs]

    def logits(scores, presence, *weights):
        scores = scores.masked_fill(~regions.valid[..., None], 0)
        filled = Regions(regions.valid, regions.weights, scores, presence)
        return torch.func.functional_call(gcn, dict(zip(names, weights)), (filled, lcm))

    assert torch.autograd.gradcheck(logits, inputs)


@both_readings
def test_gradients_of_region_logits_are_those_of_the_dense_formula(reading):
    gcn, (regions, lcm) = make_gcn(reading), make_regions()
    inputs = (regions.scores.requires_grad_(), regions.presence.requires_grad_(), *gcn.parameters())
    weights = torch.randn(4, NUM_LABELS, dtype=torch.float64)

    def gradients(logits):
        found = torch.autograd.grad((weights * logits).sum(), inputs)
        return found[0] * regions.valid[..., None], *found[1:]

    expected = gradients(dense_logits_of_images(gcn, regions, lcm))
    for gradient, reference in zip(gradients(gcn(regions, lcm)), expected):
        assert reference.isfinite().all()
        assert reference.any()
        assert_close(gradient, reference)


@both_readings
def test_places_without_a_region_change_nothing(reading):
    wide, narrow = make_gcn(reading, num_regions=9), make_gcn(reading)
    state = wide.state_dict()
    if reading == "labels":
        state["layers.0.weight"] = state["layers.0.weight"][:NUM_REGIONS]
    narrow.load_state_dict(state)
    logits = narrow(*make_regions())
    assert_close(wide(*make_regions(num_regions=9)), logits)
    regions, lcm = make_regions()
    for i in range(4):
        alone = Regions(*(value[i : i + 1] for value in regions))
        assert_close(narrow(alone, lcm)[0], logits[i])


@both_readings
def test_order_of_regions_matters_where_they_are_columns(reading):
    gcn, (regions, lcm) = make_gcn(reading), make_regions(counts=(3, 3))
    turned = regions._replace(scores=regions.scores[:, [2, 0, 1]])
    assert torch.allclose(gcn(turned, lcm), gcn(regions, lcm)) == (reading == "regions")


def test_column_k_is_the_k_th_best_region():
    gcn, (regions, lcm) = make_gcn("labels"), make_regions(counts=(3, 3))
    expected = gcn(regions, lcm)
    with torch.no_grad():
        gcn.layers[0].weight.copy_(gcn.layers[0].weight[[2, 0, 1]])
    assert_close(gcn(regions._replace(scores=regions.scores[:, [2, 0, 1]]), lcm), expected)


@both_readings
def test_scores_of_zero_have_finite_gradients(reading):
    gcn, (regions, lcm) = make_gcn(reading), make_regions()
    scores = torch.zeros_like(regions.scores).requires_grad_()
    presence = torch.zeros_like(regions.presence).requires_grad_()
    logits = gcn(regions._replace(scores=scores, presence=presence), lcm)
    assert_close(logits, gcn.classifier.bias.expand_as(logits))
    logits.sum().backward()
    for tensor in (scores, presence, *gcn.parameters()):
        assert tensor.grad.isfinite().all()


@both_readings
def test_region_gcn_from_a_config(reading):
    cfg = make_cfg()
    cfg.MODEL.REGION_GCN.READING = reading
    cfg.MODEL.REGION_GCN.HIDDEN_DIMS = (5, 6)
    gcn = RegionGCN(cfg)
    first = NUM_REGIONS if reading == "labels" else NUM_LABELS
    assert [layer.weight.shape for layer in gcn.layers] == [(first, 5), (5, 6)]
    regions, lcm = make_regions()
    assert_close(gcn.double()(regions, lcm), dense_logits_of_images(gcn, regions, lcm))


def test_an_unknown_reading_is_named():
    cfg = make_cfg()
    cfg.MODEL.REGION_GCN.READING = "pixels"
    with pytest.raises(InputError, match=r"MODEL\.REGION_GCN\.READING.*pixels"):
        RegionGCN(cfg)
