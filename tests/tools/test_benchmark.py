"""tools/benchmark.py on networks and label graphs that take next to no time."""

import argparse
import itertools
import json
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from benchmarks import (
    cpu,
    evaluator,
    heads,
    label_errors,
    label_evidence,
    label_graph,
    label_models,
    loading,
    partial_labels,
    prior_fit,
    profiling,
    scaling,
    serving,
)
from benchmarks.measuring import (
    Table,
    markdown,
    measure,
    measure_command,
    measure_memory,
    timed_rows,
)
from benchmarks.networks import (
    CONFIGS,
    RESNETS,
    TRESNETS,
    Network,
    build_network,
    infer,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from PIL import Image

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.checkpoint.torchvision_resnet import convert_torchvision_resnet
from ia_gcn.data import get_multilabel_dicts
from ia_gcn.data.datasets.custom import load_multilabel_csv
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.inference.precision import has_fast_bf16
from ia_gcn.modeling import LABEL_HEAD_REGISTRY
from ia_gcn.modeling.backbone import load_weights
from tests.helpers.commands import run_process, run_script

TINY_NETWORK = [
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.LABEL_HEAD.NUM_LABELS", "5"),
    *("MODEL.LABEL_GCN.HIDDEN_DIMS", "(8, 8)", "MODEL.REGION_GCN.HIDDEN_DIMS", "(8, 8)"),
]
TINY = ["--rounds", "2", "--threads", "1", "--batch", "1", "--size", "64"]


def benchmark(*args):
    return run_process("-W", "ignore", "tools/benchmark.py", *args)


@pytest.mark.slow
def test_all_comparisons(tmp_path):
    path = tmp_path / "new" / "model.json"
    options = ["--labels", "8", "--output", str(path)]
    result = benchmark("model", *TINY, *options, *TINY_NETWORK)
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == 1
    tables = {table["title"].partition(",")[0]: table["rows"] for table in content["tables"]}
    names = ["torchvision", "timm", "LinearHead", "ML-GCN", "IA-GCN"]
    names += ["IA-GCN, the zoo's RPN head", "IA-GCN, res5 on every region"]
    for title in ("Inference", "Training step"):
        rows = tables[f"{title}: ResNet-50"]
        assert [row["name"] for row in rows] == names
        assert all(row["regions"] == [40, 40] for row in rows[4:])
        others = tables[f"{title}: tresnet_m"]
        assert [row["name"] for row in others] == ["timm", "LinearHead", "ML-AGCN"]
        assert all(row["peak_bytes"] > row["step_bytes"] >= 0 for row in rows + others)
    for network in ("LinearHead", "IA-GCN"):
        plain, optimised = tables[f"Optimised inference of {network}: ResNet-50"]
        assert optimised["max_difference"] < 1e-4
        assert plain["logit_deviation"] > 0.01
    graph = next(rows for title, rows in tables.items() if title.startswith("Label graph alone"))
    assert all(row["peak_bytes"] > row["step_bytes"] >= 0 for row in graph)
    for rows in tables.values():
        assert rows[0]["ratio"] == 1
        for row in rows:
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
            assert row["ratio"] == pytest.approx(row["median_s"] / rows[0]["median_s"])
            assert f"| {row['name']} " in result.stdout
    assert "1.00" in result.stdout


@pytest.mark.slow
def test_heads_on_the_same_maps(tmp_path):
    path = tmp_path / "heads.json"
    names = ["ML-Decoder", "timm's MLDecoder", "C-Tran", "SALGL", "SSGRL"]
    options = ["--labels", "3,7", "--only", ",".join(names), "--output", str(path)]
    narrow = ["MODEL.ML_DECODER.DIM", "64", "MODEL.LABEL_EMBEDDINGS.SOURCE", "names"]
    result = benchmark("heads", *TINY, *options, *narrow)
    assert result.returncode == 0, result.stderr[-3000:]
    tables = json.loads(path.read_text())["tables"]
    titles = [table["title"].partition(" labels")[0] for table in tables]
    assert titles == ["Inference: 3", "Training step: 3", "Inference: 7", "Training step: 7"]
    for table in tables:
        assert [row["name"] for row in table["rows"]] == names
        assert all(row["median_s"] > 0 and row["step_bytes"] >= 0 for row in table["rows"])


def test_all_heads_of_the_registry_are_compared():
    compared = {
        setup_cfg(str(CONFIGS / file), ["MODEL.DEVICE", "cpu"]).MODEL.LABEL_HEAD.NAME
        for file in heads.HEADS.values()
    }
    ours = {name for name, head in LABEL_HEAD_REGISTRY if head.__module__.startswith("ia_gcn.")}
    assert compared == ours


def test_the_maps_are_those_of_both_networks():
    expected = {name: (shape.channels, shape.stride) for name, shape in heads.SHAPES.items()}
    for file in ("resnet101.yaml", "ml_decoder_tresnet_m.yaml"):
        opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", "False"]
        opts += ["MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']"]
        shapes = build_backbone(setup_cfg(str(CONFIGS / file), opts)).output_shape()
        found = {name: (shape.channels, shape.stride) for name, shape in shapes.items()}
        assert expected.items() <= found.items()


def test_what_is_compared_is_run_in_turn():
    calls = []
    seconds = measure({name: lambda n=name: calls.append(n) for name in "ab"}, 3, "test")
    assert "".join(calls) == "abababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_medians():
    rows = timed_rows({"a": [1.0, 2.0, 9.0], "b": [3.0, 3.0, 0.5]})
    assert [row["median_s"] for row in rows] == [2.0, 3.0]
    assert [row["ratio"] for row in rows] == [1.0, 1.5]
    assert (rows[1]["min_s"], rows[1]["max_s"]) == (0.5, 3.0)


@pytest.mark.parametrize("num_labels", [5, 40])
def test_both_forms_of_the_label_graph_agree(num_labels):
    problem = label_graph.make_graph_problem(num_labels)
    problem.x.requires_grad_(False)
    problem.presence.requires_grad_(False)
    problem = label_graph.GraphProblem(*(part.double() for part in problem))
    rank_one, dense = (logits(problem) for logits in label_graph.FORMS.values())
    torch.testing.assert_close(rank_one, dense, rtol=1e-10, atol=1e-10)


def test_the_lcm_is_what_fill_would_make_of_the_counts():
    graph = label_graph.make_graph_problem(30).graph
    before = graph.lcm.clone()
    graph.fill(graph.label_counts, graph.pair_counts, graph.embeddings)
    torch.testing.assert_close(graph.lcm, before)


def our_weights(peer, ours, folder):
    """Give our network the weights of another library's."""
    network, head = peer.model.network, ours.model.label_head.classifier
    if ours.cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        torch.save(network.state_dict(), folder / "weights.pth")
        path = str(folder / "weights.pth")
        load_weights(ours.model.backbone.net, ours.cfg.MODEL.TIMM.NAME, path, {"in_chans": 3})
    else:
        state = convert_torchvision_resnet(network.state_dict())
        classifier = {f"label_head.classifier.{k}": v for k, v in head.state_dict().items()}
        ours.model.load_state_dict({**state, **classifier})
    classifier = network.fc if hasattr(network, "fc") else network.get_classifier()
    head.load_state_dict(classifier.state_dict())


@pytest.mark.parametrize(
    ("family", "name"),
    [(RESNETS, "torchvision"), (RESNETS, "timm"), (TRESNETS, "timm")],
    ids=["torchvision's ResNet", "timm's ResNet", "timm's TResNet"],
)
@pytest.mark.slow
def test_networks_of_other_libraries_do_the_same(family, name, tmp_path):
    settings = (2, 64, ["MODEL.RESNETS.DEPTH", "50"])
    peer, ours = (build_network(family[key], *settings) for key in (name, "LinearHead"))
    our_weights(peer, ours, tmp_path)
    for network in (peer, ours):
        network.model.double()
    assert infer(ours).std() > 0.1
    torch.testing.assert_close(infer(peer), infer(ours), rtol=1e-6, atol=1e-8)
    peer_loss, our_loss = (n.loss(n.model.train(), n.batch).double() for n in (peer, ours))
    # timm's loss is of float32.
    torch.testing.assert_close(peer_loss, our_loss, rtol=1e-5, atol=0)
    for network in (peer, ours):
        assert type(network.optimizer).__name__ == network.cfg.SOLVER.OPTIMIZER


@pytest.mark.slow
def test_memory_is_that_of_the_step():
    found = measure_memory(1, partial, torch.ones, 50_000_000)
    assert 200e6 <= found["step_bytes"] < 230e6
    assert found["peak_bytes"] > 200e6 + found["step_bytes"]


def prepare_with_leftovers():
    """A step of 16 MB, after much that was allocated and freed in pieces as large."""
    for _ in range(3):
        pieces = [np.ones(2_000_000) for _ in range(10)]
    # What lies above the freed ones keeps the C library from handing them back by itself.
    return partial(np.add, pieces[-1], 1)


@pytest.mark.slow
def test_memory_that_was_freed_before_does_not_hide_that_of_the_step():
    found = measure_memory(1, prepare_with_leftovers)
    assert 15e6 < found["step_bytes"] < 30e6


@pytest.mark.slow
def test_memory_of_a_step_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="negative"):
        measure_memory(1, partial, torch.ones, -1)


@pytest.mark.slow
def test_what_takes_too_long_is_not_run():
    found = measure_memory(1, partial, time.sleep, 600, seconds=1)
    assert found == {"not_run": "takes longer than 1 s"}


def test_what_has_no_room_is_not_run():
    found = measure_memory(1, partial, torch.ones, 10**12)
    assert "takes more memory than" in found["not_run"]
    rows = timed_rows({"small": [1.0]}, {"large": found, "small": {"step_bytes": 4}})
    assert [row["name"] for row in rows] == ["small", "large"]
    assert rows[0]["step_bytes"] == 4
    text = markdown(Table("Steps", rows))
    assert found["not_run"] in text.splitlines()[-1]


def test_what_a_command_takes():
    found = measure_command(1, [sys.executable, "-c", "import os; b'x' * 10**8; os.environ['Y']"])
    assert found == {"not_run": "KeyError: 'Y'"}
    write = "import os; assert os.environ['Y'] == 'z'; b = b'x' * 10**8; print(len(b))"
    found = measure_command(1, [sys.executable, "-c", write], Y="z")
    assert found["peak_bytes"] > 10**8
    assert found["cpu_s"] > 0
    assert found["wall_s"] > 0
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert measure_command(1, sleep, 0.2) == {"not_run": "takes longer than 0.2 s"}


@pytest.mark.slow
def test_the_way_of_a_user_by_the_number_of_labels(tmp_path):
    path = tmp_path / "label_space.json"
    options = ["--labels", "12", "--only", "linear, ASL", "--images", "16", "--steps", "6"]
    options += ["--batch", "4", "--size", "32", "--threads", "1", "--output", str(path)]
    result = benchmark("label-space", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    (table,) = json.loads(path.read_text())["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    steps = ["training", "evaluation", "export", "prediction", "prediction, ONNX"]
    assert list(rows) == [
        *("Python and the libraries alone", "prepare_open_images.py", "inspect_dataset.py"),
        *(f"linear, ASL: {step}" for step in steps),
    ]
    assert not [row for row in table["rows"] if "not_run" in row]
    assert all(row["peak_bytes"] > 10**6 for row in table["rows"])
    assert float(rows["linear, ASL: training"]["s of a step"]) > 0
    assert "model.onnx" in rows["linear, ASL: export"]
    assert "report.html" in rows["linear, ASL: evaluation"]


@pytest.mark.slow
def test_evaluator_against_others(tmp_path):
    path = tmp_path / "evaluator.json"
    options = ["--rounds", "1", "--sizes", "300x7", "--output", str(path)]
    result = benchmark("evaluator", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    tables = json.loads(path.read_text())["tables"]
    assert len(tables) == 2
    for table, ours in zip(tables, ["multi_label_metrics", "MultiLabelEvaluator"]):
        assert [row["name"] for row in table["rows"]] == ["scikit-learn", "torchmetrics", ours]
        for row in table["rows"]:
            assert row["metric_difference"] < 1e-4
            assert row["peak_bytes"] > row["step_bytes"] >= 0


@pytest.mark.slow
def test_an_evaluation_with_its_files(tmp_path):
    path = tmp_path / "files.json"
    result = benchmark("evaluator", "--files", "--sizes", "300x7", "--output", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    (table,) = json.loads(path.read_text())["tables"]
    names = ["in memory", "in files", "in files, with report.html"]
    assert [row["name"] for row in table["rows"]] == names
    for row in table["rows"]:
        assert float(row["s"]) >= 0
        assert row["peak_bytes"] > row["step_bytes"] >= 0
        assert "predictions.npz" in row
        assert ("report.html" in row) == (row["name"] == names[2])


@pytest.mark.parametrize("limit", [0, 100])
def test_each_image_of_an_evaluation_with_its_files_is_another(tmp_path, limit):
    step = evaluator.prepare_files((300, 5), 16, str(tmp_path), limit, False)
    step()
    assert step()["mAP"] > 20
    with np.load(tmp_path / "predictions.npz") as found:
        assert found["image_ids"].tolist() == list(range(300))
        expected = evaluator.random_predictions(256, 5).scores
        np.testing.assert_array_equal(found["scores"][:256], expected)
        np.testing.assert_array_equal(found["scores"][256:], np.roll(expected[:44], 7, axis=1))


def test_measures_of_others_are_ours():
    predictions = evaluator.random_predictions(1000, 20)
    ours = multi_label_metrics(*predictions)
    assert 20 < ours["mAP"] < 95
    for prepares, settings in ((evaluator.WHOLE, ()), (evaluator.BATCHES, (16,))):
        for name, prepare in prepares.items():
            measures = prepare(predictions, *settings)()
            for key in ("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"):
                assert measures[key] == pytest.approx(ours[key], abs=1e-4), (name, key)


def test_the_evaluator_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(InputError, match="pip install torchmetrics"):
        next(evaluator.run_evaluator(argparse.Namespace(files=False)))


@pytest.mark.slow
def test_growth(tmp_path):
    path = tmp_path / "scaling.json"
    growing = ["--labels", "5,20", "--regions", "3,6", "--batches", "1,2", "--output", str(path)]
    result = benchmark("scaling", *TINY, *growing, *TINY_NETWORK)
    assert result.returncode == 0, result.stderr[-3000:]
    tables = json.loads(path.read_text())["tables"]
    pairs = [["5 labels", "20 labels"], ["3 regions", "6 regions"], ["1 images", "2 images"]]
    names = [[row["name"] for row in table["rows"]] for table in tables]
    assert names == [pair for pair in pairs for _ in range(2)]
    for table in tables:
        first, second = table["rows"]
        assert "exponent" not in first
        assert "exponent" in second
        assert all(row["peak_bytes"] > row["step_bytes"] >= 0 for row in table["rows"])


def test_growth_exponent():
    rows = {10: {"median_s": 1.0}, 20: {"not_run": "no room"}, 100: {"median_s": 100.0}}
    scaling.add_exponents(rows)
    assert rows[100]["exponent"] == pytest.approx(2)
    assert "exponent" not in rows[10]


def test_heads_do_what_the_whole_network_does():
    heads = scaling.build_heads(6, 4, batch=2, size=64, opts=TINY_NETWORK)
    model = heads.model
    for proposals in heads.proposals:
        proposals.objectness_logits = torch.zeros(len(proposals))
    images = [
        {"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "proposals": proposals}
        for proposals in heads.proposals
    ]
    logits = scaling.infer_heads(heads)
    model.backbone = ReadyFeatures(heads.features.detach())
    with torch.no_grad():
        expected = torch.stack([output["logits"] for output in model(images)])
    assert expected.std() > 0
    torch.testing.assert_close(logits, expected)


class ReadyFeatures(torch.nn.Module):
    """A backbone that has seen the images already."""

    size_divisibility = 0

    def __init__(self, features):
        super().__init__()
        self.features = features

    def output_shape(self):
        return {"res5": ShapeSpec(channels=self.features.shape[1], stride=scaling.STRIDE)}

    def forward(self, images):
        return {"res5": self.features}


DIGIT_SCENES = "configs/DigitScenes/ia_gcn_plus.yaml"


@pytest.mark.slow
def test_where_a_training_step_goes(tmp_path):
    path = tmp_path / "profile.json"
    args = ("--config-file", DIGIT_SCENES, "--rounds", "2", "--threads", "1", "--batch", "2")
    result = benchmark("profile", *args, "--output", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    parts, steps = json.loads(path.read_text())["tables"]
    by_name = {row["name"]: row for row in parts["rows"]}
    assert list(by_name) == [*profiling.PARTS, profiling.OPTIMIZER, profiling.REST]
    assert sum(row["share"] for row in parts["rows"]) == pytest.approx(1)
    for name in profiling.PARTS:
        assert by_name[name]["forward_s"] > 0, name
        assert by_name[name]["backward_s"] > 0, name
    assert [row["name"] for row in steps["rows"]] == ["training step"]
    assert "profiler" not in result.stderr


class Slow(torch.autograd.Function):
    """Sleeps in both directions."""

    @staticmethod
    def forward(ctx, x, forward_s, backward_s):
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_s)
        return gradient, None, None


class SlowModule(torch.nn.Module):
    def __init__(self, forward_s, backward_s, **children):
        super().__init__()
        self.seconds = forward_s, backward_s
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return Slow.apply(x, *self.seconds)


def test_the_time_of_a_step_is_the_parts_that_took_it():
    rpn = SlowModule(0.02, 0.06, rpn_head=SlowModule(0.08, 0.04))
    model = SlowModule(0.03, 0.05, backbone=SlowModule(0.05, 0.09), proposal_generator=rpn)
    weight = torch.ones(3, requires_grad=True)
    network = Network(
        None,
        model,
        None,
        None,
        lambda model, batch: model(weight * 2).sum(),
        torch.optim.SGD([weight], lr=0.1),
    )
    found = profiling.profile_step(network)
    expected = {
        "backbone": (0.05, 0.09),
        "RPN head": (0.08, 0.04),
        "anchors, matching, NMS and losses of the RPN": (0.02, 0.06),
        profiling.REST: (0.03, 0.05),
    }
    assert set(found) == {*expected, profiling.OPTIMIZER}
    for name, (forward, backward) in expected.items():
        # At least what was slept; all of it was, so none has what is another's.
        assert found[name]["forward"] >= forward
        assert found[name]["backward"] >= backward
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_settings_for_cpus(tmp_path):
    path = tmp_path / "cpu.json"
    args = ("--rounds", "1", "--threads", "1", "--batch", "2", "--size", "64", "--num-images", "3")
    result = benchmark("cpu", *args, "--output", str(path), *TINY_NETWORK)
    assert result.returncode == 0, result.stderr[-3000:]
    resnet, efficientnet, prediction = json.loads(path.read_text())["tables"]
    names = [
        name for name in cpu.SETTINGS if name != cpu.BF16 or has_fast_bf16(torch.device("cpu"))
    ]
    for table in (resnet, efficientnet):
        assert [row["name"] for row in table["rows"]] == names
    assert len(prediction["rows"]) == 4
    assert all(row["per_second"] > 0 for row in prediction["rows"])


SERVED = ["PyTorch", "PyTorch, bf16", "ONNX Runtime", "ONNX Runtime, int8"]


def served_names():
    return [name for name in SERVED if "bf16" not in name or has_fast_bf16(torch.device("cpu"))]


@pytest.mark.slow
def test_serving(tmp_path):
    path = tmp_path / "serving.json"
    config = ("--config-file", CONFIGS / "resnet101.yaml")
    args = ("--rounds", "2", "--size", "64", "--output", path, *config)
    result = benchmark("serving", *map(str, args), *TINY_NETWORK)
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == 1
    one, batches, files = (table["rows"] for table in content["tables"])
    for rows in (one, batches, files):
        assert [row["name"] for row in rows] == served_names()
        assert rows[0]["speed"] == 1
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in one)
    assert one[-1]["file_bytes"] < one[-2]["file_bytes"]


@pytest.mark.slow
def test_serving_is_evaluated_on_the_checkpoints_data(make_cfg, tmp_path):
    trainer = Trainer(make_cfg("serving"))
    trainer.checkpointer.save("model")
    weights = str(tmp_path / "serving" / "model.pth")
    *_, quality = serving.run_serving(argparse.Namespace(weights=weights, rounds=1))
    assert [row["name"] for row in quality.rows] == served_names()
    expected = Trainer.test(trainer.cfg, trainer.model)["multi_label"]["mAP"]
    assert float(quality.rows[0]["mAP"]) == pytest.approx(expected, abs=0.01)
    assert quality.rows[0]["decisions that differ"] == "0.00%"
    assert quality.note == "14 images; int8 is calibrated with 14 training images."


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["profile", "--config-file", "configs/COCO/resnet101.yaml"], "not an InstanceAware"),
        (["profile", "INPUT.IMAGE_SIZE", "[96, 64]"], "must be a square"),
        (["model", "--only", "speed"], "--only speed: must be of inference"),
        (["model", "MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
        (["label-space", "--only", "SVM"], "--only SVM: must be of linear, ASL; ML-Decoder"),
        (["scaling", "--only", "depth"], "--only depth: must be of labels, regions, batch"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(args, message):
    result = run_script("tools/benchmark.py", *args)
    assert result.returncode == 1
    assert result.last_line.startswith("benchmark: ")
    assert message in result.last_line


# ------------------------------------------------------------------------------------ data loading


@pytest.mark.slow
def test_loading_is_compared_on_the_same_pixels(tmp_path):
    path = tmp_path / "loading.json"
    args = ("--num-images", "6", "--batch", "4", "--size", "96", "--rounds", "2")
    result = benchmark("loading", *args, "--output", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == 1
    assert [t["title"].partition(":")[0] for t in content["tables"]] == [
        "Training view",
        "Test view",
    ]
    for table in content["tables"]:
        peer, own, floats, tensors, decoding = table["rows"]
        assert own["name"] == "ia_gcn"
        assert peer["speed"] == 1
        for row in table["rows"]:
            assert 0 < row["min_per_second"] <= row["per_second"] <= row["max_per_second"]
            assert row["speed"] == pytest.approx(row["per_second"] / peer["per_second"])
            assert f"| {row['name']} " in result.stdout
            assert row["peak_bytes"] > row["step_bytes"] >= 0
        for row in (own, tensors):
            assert row["level_difference"] <= 1
            assert row["differing_share"] < 0.02
        assert "level_difference" not in {**peer, **floats, **decoding}


@pytest.mark.slow
def test_shards_are_compared_with_loose_files(tmp_path):
    path = tmp_path / "shards.json"
    args = ("--num", "16", "--photos", "3", "--batch", "4", "--size", "32", "--shard-size", "1")
    folder = ("--folder", str(tmp_path), "--output", str(path))
    result = benchmark("shards", *args, "--rounds", "2", "--window", "2", *folder)
    assert result.returncode == 0, result.stderr[-3000:]
    tables = json.loads(path.read_text())["tables"]
    assert [table["title"] for table in tables] == [
        *("Reading alone, files in memory", "Reading alone, files on the disk"),
        *("Training batches, files in memory", "Training batches, files on the disk"),
    ]
    names = ["loose files", "shards, all mixed (SHARD_WINDOW 0)", "shards, SHARD_WINDOW 2"]
    for table, own in zip(tables, [["webdataset's stream"], ["webdataset's stream"], [], []]):
        assert [row["name"] for row in table["rows"]] == [*names, *own]
        assert table["note"].startswith("16 JPEGs, 0.00 GB in ")
        for row in table["rows"]:
            assert 0 < row["min_per_second"] <= row["per_second"] <= row["max_per_second"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_processes_of_ray_are_compared_with_one(tmp_path):
    pytest.importorskip("ray")
    path = tmp_path / "distributed.json"
    args = ("--num", "12", "--photos", "2", "--part", "2", "--batch", "1", "--size", "64")
    folder = ("--folder", str(tmp_path), "--output", str(path))
    result = benchmark("distributed-prediction", *args, "--rounds", "1", "--threads", "2", *folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (table,) = json.loads(path.read_text())["tables"]
    assert [row["name"] for row in table["rows"]] == [
        "predict.py",
        "predict_distributed.py, workers: 1",
        "predict_distributed.py, workers: 2",
    ]
    assert all(row["per_second"] > 0 for row in table["rows"])
    assert list(tmp_path.iterdir()) == [path]


def test_rates_are_of_medians():
    rows = loading.rate_rows({"a": [1.0, 2.0, 9.0], "b": [4.0, 4.0, 5.0]}, 20)
    assert [row["per_second"] for row in rows] == [10, 5]
    assert [row["speed"] for row in rows] == [1, 0.5]
    assert (rows[0]["min_per_second"], rows[0]["max_per_second"]) == (20 / 9, 20)


def test_photos_are_images_that_differ(tmp_path):
    files = loading.write_photos(tmp_path, 8)
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert {p.shape[:2] for p in pixels} == set(loading.PHOTO_SIZES)
    assert len({p.tobytes() for p in pixels}) == 8
    assert all(p.std() > 30 for p in pixels)
    again = loading.write_photos(tmp_path, 8)
    assert [np.asarray(Image.open(f)).tobytes() for f in again] == [p.tobytes() for p in pixels]


def test_flips_are_a_share_of_the_known_entries():
    targets = np.random.default_rng(0).integers(-1, 2, (50, 4))
    flips = label_errors.choose_flips(targets, 0.1, seed=3)
    assert flips.sum() == round(0.1 * (targets >= 0).sum())
    assert not flips[targets < 0].any()
    assert np.array_equal(flips, label_errors.choose_flips(targets, 0.1, seed=3))
    assert not np.array_equal(flips, label_errors.choose_flips(targets, 0.1, seed=4))


def test_precision_and_recall_of_the_first_doubts():
    """Four entries of 100 were flipped; there are five doubts, not eight."""
    rows = label_errors.rows_of_first([True, False, True, False, True], 4, 100)
    assert [row["precision"] for row in rows] == [0.5, 0.5, 0.6]
    assert [row["recall"] for row in rows] == [0.25, 0.5, 0.75]
    assert [row["random_recall"] for row in rows] == [0.02, 0.04, 0.05]
    table = markdown(Table("flips", rows)).splitlines()
    assert "first 2n (5)" in table[-1]


def test_flipped_labels_are_looked_for(make_cfg, tmp_path):
    """The labels that are written are those of the data set but for the flips."""
    cfg = make_cfg("run", "DATASETS.CUSTOM.HOLD_OUT", 0.0)
    names = ["red", "green", "blue"]
    model = Trainer.build_model(cfg)
    MultiLabelCheckpointer(model, str(tmp_path), label_names=names).save("model")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    args = argparse.Namespace(
        config_file=str(tmp_path / "config.yaml"),
        weights=str(tmp_path / "model.pth"),
        opts=[],
        share=0.1,
        seed=0,
        folds=2,
        csv=str(tmp_path / "flipped.csv"),
    )
    (table,) = label_errors.run_label_errors(args)
    assert table.title.startswith("4 of 42 entries flipped, ")
    flipped = load_multilabel_csv(args.csv, "", names)
    true = {d["file_name"]: set(d["labels"]) for d in get_multilabel_dicts(cfg.DATASETS.TRAIN)}
    true = {name.rpartition("/")[2]: labels for name, labels in true.items()}
    assert sum(len(true[d["file_name"]] ^ set(d["labels"])) for d in flipped) == 4


def enumerate_posterior(sets, chances, evidence, states):
    """Log-odds of each label, by adding up the chances of all sets; states: (C,) or None."""
    result = []
    for label in range(len(evidence)):
        totals = [0.0, 0.0]
        for labels, chance in zip(sets, chances):
            if states is None:
                totals[int(labels[label])] += chance * np.exp(evidence[labels].sum())
            elif all(labels[j] == states[j] for j in range(len(evidence)) if j != label):
                totals[int(labels[label])] += chance * np.exp(evidence[label] * labels[label])
        result.append(np.log(totals[1]) - np.log(totals[0]))
    return result


@pytest.mark.parametrize("known", [False, True])
def test_the_exact_posterior_of_scenes_by_enumeration(known):
    random = np.random.RandomState(0)
    sets = np.array(list(itertools.product([False, True], repeat=4)))
    chances = random.dirichlet(np.ones(16))
    logits = random.randn(5, 4)
    states = random.randint(2, size=(5, 4)) if known else None
    frequency = chances @ sets
    log_odds = np.log(frequency / (1 - frequency))
    found = label_evidence.exact_posterior(sets, chances, logits, (np.log(2.0), 0.3), states)
    for i in range(5):
        evidence = logits[i] / 2 + 0.3 - log_odds
        state = None if states is None else states[i]
        expected = enumerate_posterior(sets, chances, evidence, state)
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)


@pytest.mark.slow
def test_what_labels_are_worth_over_evidence_and_correlation(tmp_path):
    options = ["--folder", tmp_path, "--evidence", "1", "--correlation", "0,1", "--images", "40"]
    options += ["--seeds", "1", "--steps", "5", "--epochs", "1", "--aside", "32", "--val", "24"]
    options += ["--rows", "ML-GCN", "ML-AGCN, whitened features"]
    outcome = benchmark("label-evidence", *options)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    # As they end, in processes of their own.
    assert sorted(line["correlation"] for line in lines) == [0, 1]
    names = ["Linear", "label prior", "exact prior", "true other labels", *options[-2:]]
    elsewhere = [f"Linear, independent labels{of}" for of in ("", ", label prior", ", exact prior")]
    for line in lines:
        assert sorted(line["mAP"]) == sorted(names + elsewhere * int(line["correlation"]))
    assert "evidence 1, correlation 1" in outcome.stdout
    with Image.open(tmp_path / "label_evidence.png") as image:
        assert min(image.size) > 200
    # What is there is not run again.
    assert benchmark("label-evidence", *options).returncode == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2

    options = ["--folder", tmp_path, "--evidence", "1", "--known", "0.5,0", "--images", "40"]
    options += ["--seeds", "1", "--steps", "5", "--aside", "32"]
    outcome = benchmark("partial-labels", *options)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    lines = (tmp_path / "partial_labels_c1.jsonl").read_text().splitlines()
    maps = [json.loads(line)["mAP"] for line in lines]
    assert len(maps) == 2
    assert all(set(partial_labels.LOSSES) <= set(found) for found in maps)
    assert "one positive" in outcome.stdout
    assert "50% known" in outcome.stdout
    with Image.open(tmp_path / "partial_labels_c1.png") as image:
        assert min(image.size) > 200

    options = ["--folder", tmp_path, "--scenes", "digit_scenes_e1.0_c1.0", "--seeds", "1"]
    options += ["--aside", "32", "--output", tmp_path / "known.json"]
    options += ["--rows", "Linear", "Linear, themes, labels known"]
    outcome = benchmark("known-labels", *options)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (table,) = json.loads((tmp_path / "known.json").read_text())["tables"]
    names = ["Linear", "Linear, label prior", "Linear, themes, labels known"]
    assert [row["name"] for row in table["rows"]] == names
    assert benchmark("known-labels", *options, "nobody's").stderr.count("must be of") == 1


@pytest.mark.slow
def test_losses_need_the_features_of_label_evidence(tmp_path):
    outcome = benchmark("partial-labels", "--folder", tmp_path)
    assert outcome.returncode == 1
    assert "run tools/benchmark.py label-evidence" in outcome.stderr


@pytest.mark.slow
def test_models_of_labels(tmp_path, monkeypatch):
    """Labels that come in pairs: all models but the frequencies know it."""
    random = np.random.RandomState(0)
    lines = ["file,labels"]
    for i in range(900):
        pairs = [label for label in range(4) if random.rand() < 0.3]
        lines.append(f"{i}.jpg," + ";".join(f"{kind}{label}" for label in pairs for kind in "ab"))
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    for name, value in (("HELD_OUT", 100), ("CALIBRATION", 100), ("DRAWS", 1)):
        monkeypatch.setattr(label_models, name, value)
    monkeypatch.setattr(label_models, "MASKED_STEPS", 400)
    args = argparse.Namespace(labels=str(tmp_path / "labels.csv"), images=[500])
    (table,) = label_models.run_label_models(args)
    nats = {row["name"]: float(row["nats"]) for row in table.rows}
    assert all(nats[name] < 0.1 for name in nats if name != label_models.ALONE)
    assert nats[label_models.ALONE] > 0.5
    ceiling = {row["name"]: float(row["all others known"]) for row in table.rows}
    assert ceiling[label_models.ALONE] < 95 < min(ceiling[n] for n in label_models.KINDS)


@pytest.mark.slow
def test_what_a_fit_takes():
    args = argparse.Namespace(labels=[30], images=200, threads=1)
    (table,) = prior_fit.run_prior_fit(args)
    assert len(table.rows) == 2
    assert all(float(row["s"]) >= 0 and row["step_bytes"] >= 0 for row in table.rows)
