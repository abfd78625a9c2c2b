"""Values of keys that can't be used: one line that names the key."""

from functools import reduce

import pytest
from detectron2.config import get_cfg

from ia_gcn.config import add_ia_gcn_config, read_config
from ia_gcn.config_values import VALUES, check_values
from tests.helpers.commands import ROOT


@pytest.fixture
def refusal(error_line):
    """A function that gives keys and values, and returns the one line that refuses them."""
    return lambda *opts: error_line(read_config, "", opts)


def value_of(cfg, key):
    return reduce(lambda node, name: node[name], key.split("."), cfg)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("SOLVER.MAX_ITER", 0, "be a whole number of at least 1, not 0"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "be a whole number of at least 1, not 0"),
        ("SOLVER.IMS_PER_BATCH", 0, "be a whole number of at least 1, not 0"),
        ("SOLVER.BASE_LR", -0.1, "be a finite number of at least 0, not -0.1"),
        ("SOLVER.BASE_LR", float("nan"), "be a finite number of at least 0, not nan"),
        ("SOLVER.WEIGHT_DECAY", float("inf"), "be a finite number of at least 0, not inf"),
        ("SOLVER.STEPS", (5, "x"), "each be a whole number of at least 1, not (5, 'x')"),
        ("SOLVER.STEPS", (5, True), "each be a whole number of at least 1, not (5, True)"),
        (
            "SOLVER.LR_SCHEDULER_NAME",
            "Step",
            "be one of OneCycleLR, WarmupMultiStepLR, WarmupCosineLR, not 'Step'",
        ),
        ("DATALOADER.NUM_WORKERS", -1, "be a whole number from 0 to 1024, not -1"),
        ("INPUT.CENTER_CROP", 0.4, "be a finite number from 0.5 to 1, not 0.4"),
        ("INPUT.IMAGE_SIZE", (0, 0), "be 2 whole numbers from 1 to 16384, not (0, 0)"),
        ("INPUT.IMAGE_SIZE", (448,), "be 2 whole numbers from 1 to 16384, not (448,)"),
        ("INPUT.IMAGE_SIZE", (448.5, 448), "be 2 whole numbers from 1 to 16384, not (448.5, 448)"),
        ("INPUT.RANDOM_FLIP", "both", "be one of none, horizontal, vertical, not 'both'"),
        ("TEST.IMS_PER_BATCH", 0, "be a whole number of at least 1, not 0"),
        ("TEST.EVAL_PERIOD", -1, "be a whole number of at least 0, not -1"),
        ("TEST.THRESHOLD", 1.5, "be a finite number from 0 to 1, not 1.5"),
        ("MODEL.REGION_BRANCH.NUM_REGIONS", 0, "be a whole number from 1 to 16384, not 0"),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "each be a number above 0, not [1.0, 0.0, 1.0]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32, -1]], "each be a number above 0, not [[32, -1]]"),
        ("MODEL.RESNETS.DEPTH", 51, "be one of 18, 34, 50, 101, 152, not 51"),
        ("SEED", 2**70, f"be a whole number from {-(2**31)} to {2**31 - 1}, not {2**70}"),
        ("SOLVER.MAX_ITER", None, "not be None"),
        ("MODEL.WEIGHTS", None, "not be None"),
    ],
)
def test_the_line_names_the_key_and_what_it_may_be(refusal, key, value, must):
    assert refusal(key, value) == f"{key} must {must}"


def test_the_defaults_are_allowed_and_each_key_is_one():
    defaults = get_cfg()
    add_ia_gcn_config(defaults)
    check_values(defaults, defaults)
    for key in VALUES:
        assert value_of(defaults, key) is not False, key


@pytest.mark.parametrize(
    "opts",
    [
        # A random seed; 0 is off; None is detectron2's default.
        ("SEED", -1, "TEST.EVAL_PERIOD", 0, "SOLVER.WEIGHT_DECAY_BIAS", None),
        ("SOLVER.STEPS", (), "TEST.TOP_K", 0, "DATALOADER.NUM_WORKERS", 0),
        ("MODEL.LABEL_GCN.HIDDEN_DIMS", (), "MODEL.REGION_BRANCH.EVAL_SAMPLES", 0),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64, 128]], "INPUT.IMAGE_SIZE", (1, 16384)),
    ],
)
def test_the_limits_are_allowed(opts):
    cfg = read_config("", opts)
    for key, value in zip(opts[::2], opts[1::2]):
        assert value_of(cfg, key) == value


def test_a_list_may_not_be_of_any_length(error_line):
    for key, value in (("SOLVER.STEPS", 1), ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", 0.5)):
        read_config("", [key, [value] * 256])
        for values in ([value] * 257, [[value] * 200, [value] * 100]):
            line = error_line(read_config, "", [key, values])
            assert line.startswith(f"{key} must have at most 256 values, not ")


def test_a_value_in_a_file_is_refused_too(error_line, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER:\n  MAX_ITER: 0\n")
    assert "SOLVER.MAX_ITER must be" in error_line(read_config, str(path))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_the_configs_of_the_repository_are_allowed(path):
    if path.parent.name != "ablations":
        read_config(str(path))
