"""tools/ablate.py, run as a user would, on scenes and networks that take next to no time."""

import json
import re

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog

from ia_gcn.ablation import runs
from ia_gcn.ablation.spec import Spec
from ia_gcn.ablation.start import Start, feature_loader
from ia_gcn.checkpoint import build_model
from ia_gcn.config import read_config
from ia_gcn.data import get_multilabel_dicts
from ia_gcn.engine.frozen_features import extract_features, train_heads
from tests.helpers.commands import run_process, run_script

COMMAND = "ablate"
SMALL = {
    "MODEL.DEVICE": "cpu",
    # Not fewer: oneDNN 3.12 for AVX2 loops for ever, or writes where it should not, in the backward
    # pass of a 1×1 convolution of 4 channels with stride 2 (channels_last).
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RPN.CONV_DIMS": [4],
    "MODEL.LABEL_GCN.HIDDEN_DIMS": [8],
    "MODEL.REGION_GCN.HIDDEN_DIMS": [8],
    "INPUT.IMAGE_SIZE": [64, 64],
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_EPOCHS": 2,
}
SPEC = {
    "opts": SMALL,
    "network": {
        "config": "configs/DigitScenes/linear_rpn.yaml",
        "opts": {"DATASETS.TRAIN": ["digit_scenes_train_a"]},
    },
    "train": "digit_scenes_train_b",
    "test": "digit_scenes_val",
    "modes": {"heads": {"SOLVER.MAX_EPOCHS": 3}, "train": {"SOLVER.MAX_EPOCHS": 2}},
    "tables": {
        "parts": {
            "title": "Parts",
            "published": {"COCO": {"Base": 82.9}},
            "rows": {
                "Base": {"config": "configs/DigitScenes/base_rpn.yaml"},
                "IA-GCN": {"config": "configs/DigitScenes/ia_gcn.yaml"},
            },
        },
        "fusion": {
            "title": "Fusion",
            "x": "λ",
            "rows": {
                0: {
                    "config": "configs/DigitScenes/ia_gcn.yaml",
                    "opts": {"MODEL.FUSION.GLOBAL_WEIGHT": 0.0},
                },
                0.8: {"config": "configs/DigitScenes/ia_gcn.yaml"},
            },
        },
        "adaptive": {
            "title": "ML-AGCN",
            "rows": {
                "A": {
                    "config": "configs/DigitScenes/ml_agcn.yaml",
                    "opts": {
                        "MODEL.BACKBONE.NAME": "build_resnet10_backbone",
                        "MODEL.LABEL_EMBEDDINGS.SOURCE": "{output}/network/label_embeddings.npz",
                    },
                },
            },
        },
        "diverging": {
            "title": "Diverging",
            "rows": {
                "too fast": {
                    "config": "configs/DigitScenes/base_rpn.yaml",
                    "opts": {"SOLVER.BASE_LR": 1e30},
                },
                "Base": {"config": "configs/DigitScenes/base_rpn.yaml"},
            },
        },
        "broken": {
            "title": "Broken",
            "rows": {
                "no λ": {
                    "config": "configs/DigitScenes/ia_gcn.yaml",
                    "opts": {"MODEL.FUSION.GLOBAL_WEIGHT": 2.0},
                },
                "Base": {"config": "configs/DigitScenes/base_rpn.yaml"},
            },
        },
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a few scenes, a file of tables, and, in `output`, a network that is trained."""
    root = tmp_path_factory.mktemp("ablate")
    few = ("--train", 32, "--val", 12, "--size", 64)
    result = run_script("datasets/prepare_digit_scenes.py", "--root", root, *few)
    assert result.returncode == 0, result.stderr
    (root / "spec.yaml").write_text(yaml.safe_dump(SPEC, allow_unicode=True, sort_keys=False))
    return root


@pytest.fixture(scope="module")
def ablate(root):
    """A function that runs the tool with these arguments: its Outcome."""

    def call(what, *args, spec="spec.yaml"):
        where = ("--spec", root / spec, "--output", root / "output")
        command = ("-W", "ignore", "tools/ablate.py", what, *where, *args)
        return run_process(*command, DETECTRON2_DATASETS=root)

    return call


@pytest.fixture(scope="module")
def after_heads(ablate, root):
    """The results of two tables and two seeds on frozen features."""
    result = ablate("run", "--tables", "parts,fusion,adaptive", "--seeds", "1,2")
    assert result.returncode == 0, result.stderr[-3000:]
    return root / "output"


def read_results(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_row_that_stands_in_two_tables_is_run_once(after_heads):
    results = read_results(after_heads)
    # Base, IA-GCN, λ = 0 and A.
    assert len(results) == 4 * 2
    assert sorted(result["seed"] for result in results) == [1] * 4 + [2] * 4
    for result in results:
        assert 0 < result["mAP"] <= 100
        assert result["train"]["mAP"] > 0
    regions = {result["config"].split("/")[-1]: result["regions"] for result in results}
    assert set(regions["ia_gcn.yaml"]) == {"mean_abs_mu", "mean_sigma", "kl", "mean_presence"}
    assert regions["ml_agcn.yaml"] == {}


@pytest.mark.slow
def test_what_is_there_is_not_run_again_and_more_seeds_are_added(after_heads, ablate):
    before = read_results(after_heads)
    again = ablate("run", "--tables", "parts", "--seeds", "1-2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "4 of 4 runs are in" in again.stdout
    assert read_results(after_heads) == before
    more = ablate("run", "--tables", "parts", "--seeds", "1-3")
    assert more.returncode == 0, more.stderr[-3000:]
    assert "6 of 6 runs are in" in more.stdout
    assert [result["seed"] for result in read_results(after_heads)[len(before) :]] == [3, 3]


@pytest.mark.slow
def test_features_that_were_cut_short_are_made_again(after_heads, ablate):
    # It is written when all others are complete.
    (after_heads / "network" / "made_with.json").unlink()
    (after_heads / "network" / "digit_scenes_val.safetensors").write_bytes(b"cut")
    result = ablate("run", "--tables", "adaptive", "--seeds", "4")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_a_run_repeats(after_heads, ablate):
    results = read_results(after_heads)
    lost = next(result for result in results if result["config"].endswith("ia_gcn.yaml"))
    kept = [json.dumps(result) + "\n" for result in results if result is not lost]
    (after_heads / "results.jsonl").write_text("".join(kept))
    table = "fusion" if lost["opts"].get("MODEL.FUSION.GLOBAL_WEIGHT") == 0 else "parts"
    assert ablate("run", "--tables", table, "--seeds", str(lost["seed"])).returncode == 0
    again = read_results(after_heads)[-1]
    times = ("seconds",)
    assert {k: v for k, v in again.items() if k not in times} == {
        k: v for k, v in lost.items() if k not in times
    }


@pytest.mark.slow
def test_the_report_says_what_the_results_say(after_heads, ablate):
    result = ablate("report", "--tables", "parts,fusion")
    assert result.returncode == 0, result.stderr[-3000:]
    maps = {}
    for found in read_results(after_heads):
        if found["mode"] == "heads" and "MODEL.FUSION.GLOBAL_WEIGHT" not in found["opts"]:
            maps.setdefault(found["config"].split("/")[-1], {})[found["seed"]] = found["mAP"]
    base, ia_gcn = maps["base_rpn.yaml"], maps["ia_gcn.yaml"]
    table = result.stdout.partition("### Parts (heads)")[2].partition("###")[0]
    header, above, row = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        for line in table.splitlines()
        if line.startswith("| ")
    )
    row, above = dict(zip(header, row)), dict(zip(header, above))
    assert (above["published COCO"], row["published COCO"]) == ("82.9", "–")
    assert float(row["mAP"].split()[0]) == pytest.approx(np.mean(list(ia_gcn.values())), abs=0.006)
    expected = np.mean([ia_gcn[seed] - base[seed] for seed in base])
    difference = row["mAP against the row above"].split()[0]
    assert float(difference) == pytest.approx(expected, abs=0.006)
    assert (above["\\|µ\\|"], int(row["seeds"])) == ("–", len(ia_gcn))
    assert float(row["\\|µ\\|"]) > 0
    assert re.search(r"\| 0 +\|", result.stdout)
    for name in ("parts_heads", "fusion_heads"):
        assert (after_heads / "plots" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_everything_can_be_trained(after_heads, ablate):
    result = ablate("run", "--tables", "parts", "--seeds", "1", "--mode", "train", "--jobs", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    results = [result for result in read_results(after_heads) if result["mode"] == "train"]
    assert [result["config"].split("/")[-1] for result in results] == [
        "base_rpn.yaml",
        "ia_gcn.yaml",
    ]
    for found in results:
        assert 0 < found["mAP"] <= 100
        assert found["train"]["mAP"] != found["mAP"]


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(after_heads, ablate):
    result = ablate("run", "--tables", "diverging", "--seeds", "7")
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("ablate: ")]
    assert len(lines) == 1
    assert "diverging: too fast, seed 7 failed" in lines[0]
    assert read_results(after_heads)[-1]["seed"] == 7


def test_a_row_that_cannot_be_run_is_refused_before_anything_is_trained(root, tmp_path):
    where = ("--spec", root / "spec.yaml", "--output", tmp_path)
    result = run_script("tools/ablate.py", "run", *where, "--tables", "broken", "--seeds", "7")
    assert result.returncode == 1
    assert "broken: no λ, seed 7: MODEL.FUSION.GLOBAL_WEIGHT" in result.last_line
    assert not list(tmp_path.rglob("*.pth"))


def test_a_row_is_known_by_what_is_in_its_config(tool, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("SOLVER: {BASE_LR: 0.1}")
    (tmp_path / "row.yaml").write_text("_BASE_: base.yaml")
    row = {"config": str(tmp_path / "row.yaml")}
    tables = {"t": {"title": "T", "rows": {"a": row, "b": {**row, "opts": {"SEED": 3}}}}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "opts": {}, "tables": tables}))

    def keys():
        spec = tool.read_spec(tmp_path / "spec.yaml")
        return [spec.run("heads", row, 1).key for row in spec.tables["t"].rows]

    before = keys()
    # What the seed is has a place of its own.
    assert before[0] == before[1]
    assert keys() == before
    base.write_text("SOLVER: {BASE_LR: 0.2}")
    assert before[0] not in keys()


@pytest.mark.parametrize(
    ("what", "args", "spec", "message"),
    [
        ("list", ["--tables", "more"], "spec.yaml", "--tables more: must be of adaptive, broken"),
        ("list", [], "missing.yaml", "No such file"),
        ("run", [], "list.yaml", "no keys with values"),
        ("report", ["--tables", "unrun"], "unrun.yaml", "no two rows of a table were run"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, what, args, spec, message):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    unrun = {"unrun": {"title": "Unrun", "rows": {"Base": {"config": "none.yaml"}}}}
    (tmp_path / "unrun.yaml").write_text(yaml.safe_dump({**SPEC, "tables": unrun}))
    where = ("--spec", tmp_path / spec, "--output", tmp_path / "output")
    result = run_script("tools/ablate.py", what, *where, *args)
    assert result.returncode == 1
    assert result.last_line.startswith("ablate: ")
    assert message in result.last_line


@pytest.mark.parametrize(("ignored", "state"), [("nowhere", -1), ("absent", 0), ("present", 1)])
def test_heads_are_trained_on_ignored_labels_as_the_row_says(
    make_cfg, tmp_path, monkeypatch, ignored, state
):
    cfg = make_cfg("row", "DATASETS.IGNORED_LABELS", ignored)
    cfg.defrost()
    dicts = get_multilabel_dicts(["custom_train"])
    dicts[3] = {**dicts[3], "labels": [1], "ignored_labels": [0]}
    DatasetCatalog.remove("custom_train")
    DatasetCatalog.register("custom_train", lambda: dicts)
    start = Start(tmp_path)
    start.network.parent.mkdir()
    model = build_model(cfg)
    for name in ("custom_train", "custom_test"):
        extract_features(model, feature_loader(cfg, name)).save(str(start.features(name)))
    trained = []

    def train(cfg, model, features):
        trained.append(features.targets)
        return train_heads(cfg, model, features)

    monkeypatch.setattr(runs, "train_heads", train)
    spec = Spec({}, None, "custom_train", "custom_test", {}, {})
    runs.run_heads(cfg, spec, start)
    assert trained[0][3].tolist() == [state, 1, 0]
    assert (trained[0] == -1).sum() == (state == -1)


def test_seeds(tool):
    assert tool.seeds("1,3-5") == [1, 3, 4, 5]


@pytest.mark.slow
def test_what_is_shipped_is_a_file_of_tables(tool, repository, monkeypatch):
    monkeypatch.chdir(repository)
    spec = tool.read_spec(tool.SPEC)
    assert set(spec.modes) == set(tool.MODES)
    for table in spec.tables.values():
        for row in table.rows:
            run = spec.run("heads", row, 1)
            cfg = read_config(run.config, tool.as_list(run.opts, repository))
            assert cfg.SOLVER.MAX_EPOCHS > 0
        if table.x:
            assert [float(row.name) for row in table.rows]
