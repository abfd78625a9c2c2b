"""tools/analyze_model.py: sizes as published, multiply-adds as others count them."""

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn

from ia_gcn.engine import Trainer
from tests.helpers.commands import ROOT, run_script

COMMAND = "analyze_model"
IA_GCN = "DigitScenes/ia_gcn"


def config(name):
    return str(ROOT / "configs" / f"{name}.yaml")


@pytest.fixture
def build(tool):
    """A function that makes the model of a config, without memory for its tensors, and the cfg."""

    def make(name, *opts):
        cfg = tool.load_config(config(name), opts)
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            return Trainer.build_model(cfg), cfg

    return make


@pytest.fixture
def prepared(tool):
    """A function that makes the model of a config, ready to run, and an image for it."""

    def make(name, size, *opts):
        cfg = tool.load_config(config(name), opts)
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        image = tool.random_image(size, cfg)
        tool.prepare(model, image)
        return model, image

    return make


# ------------------------------------------------------------------------------------ parameters

# In millions: #params of ML-AGCN's Tables 1 (COCO) and 2 (VG-500), arXiv:2301.04494.
PUBLISHED = {
    "COCO/ml_gcn_1l_R_101": 43.1,
    "COCO/ml_gcn_R_101": 44.9,
    "COCO/asl_tresnet_m": 29.5,
    "COCO/asl_tresnet_l": 53.8,
    "COCO/iml_gcn_1l": 29.5,
    "COCO/iml_gcn_2l": 31.5,
    "COCO/ml_agcn_1l": 29.9,
    "COCO/ml_agcn_2l": 35.9,
    "VG500/iml_gcn_1l": 30.6,
    "VG500/ml_agcn_1l": 32.7,
    "VG500/ml_agcn_2l": 37.4,
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_published_sizes(tool, build, name, millions):
    model, _ = build(name)
    assert tool.count_parameters(model)["total"] / 1e6 == pytest.approx(millions, abs=0.1)


# C = 80, D = 2048 or 10, 256. A graph's A is C×C; embeddings, of 300 numbers, are not counted.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("COCO/resnet101", 2048 * 80 + 80),
        ("COCO/ml_gcn_1l_R_101", 300 * 2048 + 80 * 80),
        ("COCO/ml_gcn_R_101", 300 * 1024 + 1024 * 2048 + 80 * 80),
        ("COCO/ml_agcn_1l", 3 * 80 * 2048 + 2 * 2048 + 80 * 80),
        ("COCO/ia_gcn_R_101", 300 * 512 + 512 * 1024 + 1024 * 2048 + 80 * 80),
        ("DigitScenes/ia_gcn_plus", 300 * 512 + 512 * 1024 + 1024 * 256 + 10 * 10 + 10),
        ("DigitScenes/com_sco_only", 0),
    ],
)
def test_parameters_of_label_heads(tool, build, name, expected):
    model, _ = build(name)
    assert tool.count_parameters(model)["label_head"] == expected


def test_a_model_without_a_label_head_has_its_graph_all_the_same(tool, build):
    model, _ = build("DigitScenes/com_sco_only", "MODEL.REGION_GCN.LCM", "image_dependent")
    assert model.label_head is None
    assert tool.count_parameters(model)["label_head"] == 10 * 10


@pytest.mark.parametrize(
    ("name", "opts", "rest"),
    [
        ("COCO/ia_gcn_R_101", (), 0),
        ("COCO/id_lcm_R_101", (), 0),
        ("DigitScenes/base_com_sco", (), 0),
        ("COCO/iml_gcn_2l", (), 0),
        # Its power is of no part.
        ("COCO/resnet101", ("MODEL.GLOBAL_POOLING.NAME", "gem"), 1),
    ],
)
def test_parts_sum_to_the_total(tool, build, name, opts, rest):
    model, _ = build(name, *opts)
    counts = tool.count_parameters(model)
    total = counts.pop("total")
    assert sum(counts.values()) + rest == total
    starts = ("proposal_generator.", "roi_heads.", "region_gcn.")
    regions = sum(p.numel() for key, p in model.named_parameters() if key.startswith(starts))
    assert counts.get("regions", 0) == regions
    assert ("regions" in counts) == (regions > 0)


def test_what_is_frozen_counts(tool, build):
    sizes = [
        tool.count_parameters(build("COCO/resnet101", "MODEL.BACKBONE.FREEZE_AT", stages)[0])
        for stages in ("0", "5")
    ]
    assert sizes[0] == sizes[1]


# --------------------------------------------------------------------------------- multiply-adds


def torchvision_multiply_adds(size):
    """Those of the convolutions of torchvision's ResNet-101, by their definition."""
    counts = []

    def count(conv, inputs, output):
        height, width = conv.kernel_size
        counts.append(output.numel() * conv.in_channels // conv.groups * height * width)

    with torch.device("meta"):
        network = torchvision.models.resnet101().eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        network(torch.zeros(1, 3, size, size))
    return sum(counts)


def test_resnet_101_with_a_linear_head(tool, build):
    model, cfg = build("COCO/resnet101")
    per_image, once = tool.count_multiply_adds(model.eval(), tool.random_image(448, cfg))
    assert per_image == torchvision_multiply_adds(448) + 80 * 2048
    assert per_image / 1e9 == pytest.approx(31.2, abs=0.01)
    assert once == 0


def test_resnet_101_as_torchvision_publishes_it(tool, build):
    published = torchvision.models.ResNet101_Weights.IMAGENET1K_V1.meta["_ops"]
    model, cfg = build("COCO/resnet101", "MODEL.LABEL_HEAD.NUM_LABELS", "1000")
    per_image, _ = tool.count_multiply_adds(model.eval(), tool.random_image(224, cfg))
    assert per_image / 1e9 == pytest.approx(published, abs=0.001)


def graph_convolution(num_labels, in_dim, out_dim):
    """Multiply-adds of Â H W, Â upon the narrower side."""
    return num_labels * in_dim * out_dim + num_labels**2 * min(in_dim, out_dim)


def adaptive_convolution(num_labels, in_dim, out_dim):
    """Multiply-adds of A H W_A + B H W_B + C H W_C, of B's scores and of C."""
    mixed = 3 * (num_labels * in_dim * out_dim + num_labels**2 * out_dim)
    scores = num_labels * in_dim * out_dim + 2 * num_labels * out_dim
    return mixed + scores + num_labels**2 * in_dim


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize(
    ("head", "convolution"),
    [("GCNHead", graph_convolution), ("AdaptiveGCNHead", adaptive_convolution)],
)
def test_the_label_graph_is_computed_once_whatever_the_image(
    tool, prepared, head, convolution, size
):
    per_image, once = tool.count_multiply_adds(
        *prepared("DigitScenes/ml_gcn", size, "MODEL.LABEL_HEAD.NAME", head)
    )
    linear = prepared("DigitScenes/ml_gcn", size, "MODEL.LABEL_HEAD.NAME", "LinearHead")
    assert (per_image, 0) == tool.count_multiply_adds(*linear)
    # The degree of each label comes first.
    assert once == 10 * 10 + convolution(10, 300, 1024) + convolution(10, 1024, 256)


class Logits(nn.Module):
    """A model as fvcore can trace it: from an image (3, H, W) to logits (1, C)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return torch.stack([output["logits"] for output in self.model([{"image": image}])])


@pytest.mark.parametrize("name", [IA_GCN, "DigitScenes/base_com_sco", "DigitScenes/ml_gcn"])
def test_fvcore_counts_the_same(tool, prepared, name):
    model, image = prepared(name, 64)
    analysis = FlopCountAnalysis(Logits(model), image[0]["image"])
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    operators = analysis.by_operator()
    # Those can be merged into the convolutions.
    del operators["batch_norm"]
    # It asks for gradients: what comes once is computed anew. And it rounds.
    expected = pytest.approx(sum(operators.values()), rel=1e-3)
    assert sum(tool.count_multiply_adds(model, image)) == expected


@pytest.mark.parametrize("size", [64, 100])
def test_all_regions_are_found_in_noise(prepared, size):
    model, image = prepared(IA_GCN, size)
    with torch.no_grad():
        (output,) = model(image)
    assert len(output["regions"]) == 20
    assert output["logits"].isfinite().all()


def test_a_model_without_an_rpn_is_given_regions(prepared):
    keys = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    model, image = prepared(IA_GCN, 64, *keys)
    with torch.no_grad():
        (output,) = model(image)
    boxes = output["regions"].proposal_boxes
    assert len(boxes) == 20
    assert boxes.nonempty().all()
    assert boxes.inside_box((64, 64)).all()


def test_the_first_pass_is_not_timed(tool, monkeypatch):
    seconds = iter([9.0, 1.0, 5.0, 2.0])

    def repeat(call, number, repeat):
        return [next(seconds) for _ in range(repeat)]

    monkeypatch.setattr(tool.timeit, "repeat", repeat)
    assert tool.time_forward(nn.Identity(), [], rounds=3) == 2.0


# ---------------------------------------------------------------------------------- command line


def read_lines(out):
    """The lines of a config, by the name of each."""
    return dict(line.rsplit(maxsplit=1) for line in out.partition("\n\n")[0].splitlines())


def read_table(out):
    """The cells of each row of a Markdown table, the names first."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(rows.pop(1))) == {"-", ":"}
    return rows


def test_the_command(tmp_path):
    """In another folder, where the embeddings that the config names are not."""
    options = ("--config-file", config("COCO/ml_gcn_1l_R_101"), "--size", 64)
    timing = ("--rounds", 1, "--threads", 1)
    result = run_script("tools/analyze_model.py", *options, *timing, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    lines = read_lines(result.stdout)
    assert lines["backbone, M"] == "42.50"
    assert lines["label head, M"] == "0.6208"
    assert lines["total, M"] == "43.12"
    assert lines["GMac per image"] == "0.6368"
    assert float(lines["s per image"]) > 0
    assert "on 1 threads of a CPU" in result.stdout
    assert not list(tmp_path.iterdir())


def test_keys_and_options_in_any_order(main):
    keys = ["MODEL.REGION_GCN.HIDDEN_DIMS", "[8]"]
    status, out, _ = main(*keys, "--config-file", config(IA_GCN), "--no-time", "--size", 64)
    assert status == 0
    assert main("--size", 64, "--config-file", config(IA_GCN), "--no-time", *keys)[1] == out
    default = main("--size", 64, "--config-file", config(IA_GCN), "--no-time")[1]
    assert list(read_lines(out)) == list(read_lines(default))
    assert "s per image" not in out
    assert "threads" not in out
    regions = [float(read_lines(text)["regions, M"]) for text in (out, default)]
    assert 0 < regions[0] < regions[1]


def test_a_large_region_branch(main):
    name = config("COCO/ia_gcn_R_101")
    status, out, _ = main("--config-file", name, "--size", 64, "--rounds", 1, "--threads", 1)
    assert status == 0
    lines = {key: float(value) for key, value in read_lines(out).items()}
    parts = [lines[f"{part}, M"] for part in ("backbone", "label head", "regions")]
    assert sum(parts) == pytest.approx(lines["total, M"], abs=0.02)
    assert lines["GMac once"] == 0
    assert lines["s per image"] > 0


def test_a_table_of_given_configs(main):
    files = [config("DigitScenes/ml_gcn"), config(IA_GCN)]
    status, out, _ = main("--size", 64, "--table", *files, "--rounds", 2, "--threads", 1)
    assert status == 0
    header, *rows = read_table(out)
    assert header[1:4] == ["backbone, M", "label head, M", "regions, M"]
    assert header[-1] == "s per image"
    assert [row[0] for row in rows] == [file.removesuffix(".yaml") for file in files]
    assert rows[0][1] == rows[1][1]
    assert rows[0][3] == "–"
    assert float(rows[1][3]) > 0
    assert "median of 2 passes of one image, on 1 threads" in out
    assert "A, C×C" in out
    assert "64×64 pixels" in out


def test_the_table_of_the_papers(tool, main, monkeypatch):
    files = []

    def analyze(config_file, args):
        files.append(config_file)
        return {"total": len(files) * 1e6}

    monkeypatch.setattr(tool, "analyze", analyze)
    status, out, _ = main("--table", "--no-time")
    assert status == 0
    assert all(Path(file).is_file() for file in files)
    header, *rows = read_table(out)
    assert header == ["", "total, M"]
    assert [config(name) for name, _ in rows] == files
    assert [float(total) for _, total in rows] == list(range(1, 17))
    assert set(PUBLISHED) < {name for name, _ in rows}
    assert rows[3][0] == "COCO/ia_gcn_R_101"


def test_nothing_is_read_or_logged(tool, caplog, tmp_path):
    gone = str(tmp_path / "gone.pth")
    keys = ["MODEL.WEIGHTS", gone, "MODEL.TIMM.WEIGHTS_FILE", gone, "MODEL.TIMM.PRETRAINED", "True"]
    keys += ["MODEL.DEVICE", "cuda:7", "MODEL.LABEL_HEAD.NAME", "GCNHead"]
    keys += ["MODEL.LABEL_EMBEDDINGS.SOURCE", gone]
    with caplog.at_level(logging.INFO):
        cfg = tool.load_config(config("DigitScenes/asl"), keys)
        model = Trainer.build_model(cfg)
    assert next(model.parameters()).device.type == "cpu"
    assert "gone.pth" not in caplog.text


def test_help_says_what_counts(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    out = capsys.readouterr().out
    for part in ("--no-time", "--table", "A of its label graph, C×C", "embeddings are data"):
        assert part in out


NO_DATA = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "63"], "--size 63: batch norms need 64 or more"),
        (["NO.SUCH_KEY", "1"], "NO.SUCH_KEY 1: "),
        (["MODEL.LABEL_HEAD.NUM_LABELS"], "MODEL.LABEL_HEAD.NUM_LABELS: "),
        (["MODEL.BACKBONE.NAME", "no_such_net"], "no_such_net"),
        # The labels are those of the data, which isn't there.
        (["DATASETS.CUSTOM.TRAIN", "no_such.csv"], "no_such.csv"),
        ([*NO_DATA, "MODEL.LABEL_HEAD.NUM_LABELS", "0"], "MODEL.LABEL_HEAD.NUM_LABELS"),
    ],
)
def test_what_cannot_be_analyzed_is_refused_in_one_line(main, arguments, message):
    status, out, err = main("--config-file", config("DigitScenes/ml_gcn"), *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("analyze_model: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_config_of_a_table_that_is_missing_is_named(main):
    status, _, err = main("--table", "no_such.yaml")
    assert status == 1
    assert err == "analyze_model: --config-file no_such.yaml: no such file\n"


@pytest.mark.parametrize("arguments", [[], ["--table", "--config-file", "x.yaml"]])
def test_it_takes_a_config_or_a_table(main, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(*arguments)
