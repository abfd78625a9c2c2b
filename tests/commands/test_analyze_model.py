"""tools/analyze_model.py: sizes as published, multiply-adds as others count them."""

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn

from ia_gcn.analysis import (
    ModelSize,
    analyze_model,
    count_multiply_adds,
    count_parameters,
    time_forward,
)
from ia_gcn.analysis.model_size import prepare, random_image, without_weights
from ia_gcn.checkpoint import build_model
from ia_gcn.config import find_config
from ia_gcn.engine import setup_cfg
from tests.helpers.commands import ROOT, run_script

COMMAND = "analyze"
IA_GCN = "DigitScenes/ia_gcn"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Whatever --threads says: tests run side by side."""
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)


def config(name):
    return str(ROOT / "configs" / f"{name}.yaml")


def load_config(name, *opts):
    return without_weights(setup_cfg(config(name), ["MODEL.DEVICE", "cpu", *opts]))


def build(name, *opts):
    """The model of a config, without memory for its tensors."""
    cfg = load_config(name, *opts)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def build_prepared(name, size, *opts):
    """The model of a config, ready to run, and an image for it."""
    torch.manual_seed(0)
    cfg = load_config(name, *opts)
    model = build_model(cfg)
    image = random_image(size, size, cfg.MODEL.REGION_BRANCH.NUM_REGIONS)
    prepare(model, image)
    return model, image


# ------------------------------------------------------------------------------------ parameters

# In millions: #params of ML-AGCN's Tables 1 (COCO) and 2 (VG-500), arXiv:2301.04494; that of
# ADD-GCN is of its published network.
PUBLISHED = {
    "COCO/ml_gcn_1l_R_101": 43.1,
    "COCO/ml_gcn_R_101": 44.9,
    "COCO/asl_tresnet_m": 29.5,
    "COCO/asl_tresnet_l": 53.8,
    "COCO/add_gcn_R_101": 48.2,
    "COCO/ssgrl_R_101": 92.2,
    "COCO/iml_gcn_1l": 29.5,
    "COCO/iml_gcn_2l": 31.5,
    "COCO/ml_agcn_1l": 29.9,
    "COCO/ml_agcn_2l": 35.9,
    "VG500/iml_gcn_1l": 30.6,
    "VG500/ml_agcn_1l": 32.7,
    "VG500/ml_agcn_2l": 37.4,
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_published_sizes(name, millions):
    model = build(name)
    assert count_parameters(model)["total"] / 1e6 == pytest.approx(millions, abs=0.1)


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
def test_parameters_of_label_heads(name, expected):
    model = build(name)
    assert count_parameters(model)["label_head"] == expected


def test_a_model_without_a_label_head_has_its_graph_all_the_same():
    model = build("DigitScenes/com_sco_only", "MODEL.REGION_GCN.LCM", "image_dependent")
    assert model.label_head is None
    assert count_parameters(model)["label_head"] == 10 * 10


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("COCO/ia_gcn_R_101", ()),
        ("COCO/id_lcm_R_101", ()),
        ("DigitScenes/base_com_sco", ()),
        ("COCO/iml_gcn_2l", ()),
        ("COCO/resnet101", ("MODEL.GLOBAL_POOLING.NAME", "gem")),
    ],
)
def test_parts_sum_to_the_total(name, opts):
    model = build(name, *opts)
    counts = count_parameters(model)
    total = counts.pop("total")
    assert sum(counts.values()) == total
    starts = ("proposal_generator.", "roi_heads.", "region_gcn.")
    regions = sum(p.numel() for key, p in model.named_parameters() if key.startswith(starts))
    assert counts.get("regions", 0) == regions
    assert ("regions" in counts) == (regions > 0)


def test_what_is_frozen_counts():
    sizes = [
        count_parameters(build("COCO/resnet101", "MODEL.BACKBONE.FREEZE_AT", stages))
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


def test_resnet_101_with_a_linear_head():
    model = build("COCO/resnet101")
    per_image, once = count_multiply_adds(model.eval(), random_image(448, 448, 0))
    assert per_image == torchvision_multiply_adds(448) + 80 * 2048
    assert per_image / 1e9 == pytest.approx(31.2, abs=0.01)
    assert once == 0


def test_resnet_101_as_torchvision_publishes_it():
    published = torchvision.models.ResNet101_Weights.IMAGENET1K_V1.meta["_ops"]
    model = build("COCO/resnet101", "MODEL.LABEL_HEAD.NUM_LABELS", "1000")
    per_image, _ = count_multiply_adds(model.eval(), random_image(224, 224, 0))
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
def test_the_label_graph_is_computed_once_whatever_the_image(head, convolution, size):
    per_image, once = count_multiply_adds(
        *build_prepared("DigitScenes/ml_gcn", size, "MODEL.LABEL_HEAD.NAME", head)
    )
    linear = build_prepared("DigitScenes/ml_gcn", size, "MODEL.LABEL_HEAD.NAME", "LinearHead")
    assert (per_image, 0) == count_multiply_adds(*linear)
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
def test_fvcore_counts_the_same(name):
    model, image = build_prepared(name, 64)
    analysis = FlopCountAnalysis(Logits(model), image[0]["image"])
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    operators = analysis.by_operator()
    # Those can be merged into the convolutions.
    del operators["batch_norm"]
    # It asks for gradients: what comes once is computed anew. And it rounds.
    expected = pytest.approx(sum(operators.values()), rel=1e-3)
    assert sum(count_multiply_adds(model, image)) == expected


@pytest.mark.parametrize("size", [64, 100])
def test_all_regions_are_found_in_noise(size):
    model, image = build_prepared(IA_GCN, size)
    with torch.no_grad():
        (output,) = model(image)
    assert len(output["regions"]) == 20
    assert output["logits"].isfinite().all()


def test_a_model_without_an_rpn_is_given_regions():
    keys = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    model, image = build_prepared(IA_GCN, 64, *keys)
    with torch.no_grad():
        (output,) = model(image)
    boxes = output["regions"].proposal_boxes
    assert len(boxes) == 20
    assert boxes.nonempty().all()
    assert boxes.inside_box((64, 64)).all()


@pytest.mark.parametrize(
    "name",
    [
        *("aam", "add_gcn", "c_tran", "cnn_rnn", "csra", "kggr", "ml_decoder", "query2label"),
        *("rnn_attention", "salgl", "srn", "ssgrl", "tdrg"),
    ],
)
def test_every_head_has_a_size(name):
    cfg = setup_cfg(config(f"DigitScenes/{name}"), ["MODEL.DEVICE", "cpu"])
    size = analyze_model(cfg, rounds=0)
    assert 0 < size.parameters["label_head"] < size.parameters["total"]
    assert size.per_image > 0


def test_the_first_pass_is_not_timed(monkeypatch):
    seconds = iter([9.0, 1.0, 5.0, 2.0])

    def repeat(call, number, repeat):
        return [next(seconds) for _ in range(repeat)]

    monkeypatch.setattr("timeit.repeat", repeat)
    assert time_forward(nn.Identity(), [], rounds=3) == 2.0


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


def test_the_image_has_the_configs_size(main):
    arguments = ["--config-file", config("DigitScenes/asl"), "--no-time"]
    lines = read_lines(main(*arguments)[1])
    assert lines["image"] == "96×96"
    assert read_lines(main(*arguments, "--size", 96)[1]) == lines
    high = read_lines(main(*arguments, "INPUT.IMAGE_SIZE", "(192, 96)")[1])
    assert high["image"] == "192×96"
    # But for the classifier, the cost of a convolutional network is that of its pixels.
    ratio = float(high["GMac per image"]) / float(lines["GMac per image"])
    assert ratio == pytest.approx(2, rel=1e-3)


def test_a_head_of_a_users_own(main, tmp_path):
    """Imported for the command; without --import it is refused."""
    (tmp_path / "head_to_analyze.py").write_text(
        "from ia_gcn.modeling import LABEL_HEAD_REGISTRY, LinearHead\n"
        "@LABEL_HEAD_REGISTRY.register()\n"
        "class HeadToAnalyze(LinearHead):\n"
        "    pass\n"
    )
    arguments = ["--config-file", config("DigitScenes/asl"), "--no-time"]
    keys = ["MODEL.LABEL_HEAD.NAME", "HeadToAnalyze"]
    status, _, err = main(*arguments, *keys)
    assert status == 1
    assert "HeadToAnalyze" in err
    imported = ["--import", tmp_path / "head_to_analyze.py"]
    status, out, err = main(*keys, *arguments, *imported)
    assert status == 0, err
    assert read_lines(out) == read_lines(main(*arguments)[1])


def test_from_python():
    size = analyze_model(load_config("DigitScenes/ml_gcn"), image_size=(64, 96), rounds=1)
    assert size.image_size == (64, 96)
    assert size.parameters == count_parameters(build("DigitScenes/ml_gcn"))
    assert size.seconds > 0
    assert size.once > 0


def test_a_large_region_branch(main):
    name = config("COCO/ia_gcn_R_101")
    status, out, _ = main("--config-file", name, "--size", 64, "--rounds", 1)
    assert status == 0
    lines = read_lines(out)
    assert lines.pop("image") == "64×64"
    lines = {key: float(value) for key, value in lines.items()}
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
    assert [row[header.index("image")] for row in rows] == ["64×64", "64×64"]


def test_the_table_of_the_papers(tool, main, monkeypatch):
    files = []

    def setup_cfg(config_file, *args, **options):
        files.append(config_file)

    def analyze_model(cfg, **options):
        parts = {"backbone": 0, "label_head": 0, "total": len(files) * 1e6}
        return ModelSize((64, 64), parts, 0, 0, None)

    monkeypatch.setattr(tool, "setup_cfg", setup_cfg)
    monkeypatch.setattr(tool, "analyze_model", analyze_model)
    status, out, _ = main("--table", "--no-time")
    assert status == 0
    assert all(Path(find_config(file)).is_file() for file in files)
    header, *rows = read_table(out)
    assert "regions, M" not in header
    assert [f"{name}.yaml" for name, *_ in rows] == files
    total = header.index("total, M")
    assert [float(row[total]) for row in rows] == list(range(1, len(files) + 1))
    assert set(PUBLISHED) < {name for name, *_ in rows}
    assert rows[3][0] == "COCO/ia_gcn_R_101"


def test_nothing_is_read_or_logged(caplog, tmp_path):
    gone = str(tmp_path / "gone.pth")
    keys = ["MODEL.WEIGHTS", gone, "MODEL.TIMM.WEIGHTS_FILE", gone, "MODEL.TIMM.PRETRAINED", "True"]
    keys += ["MODEL.DEVICE", "cuda:7", "MODEL.LABEL_HEAD.NAME", "GCNHead"]
    keys += ["MODEL.LABEL_EMBEDDINGS.SOURCE", gone]
    with caplog.at_level(logging.INFO):
        model = build_model(without_weights(setup_cfg(config("DigitScenes/asl"), keys)))
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
        (["--size", "63"], "INPUT.IMAGE_SIZE 63×63 (--size): batch norms need 64 or more"),
        (["INPUT.IMAGE_SIZE", "(448, 32)"], "INPUT.IMAGE_SIZE 448×32"),
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
