"""What follows from the keys that are set: a timm network's settings, and keys without effect."""

import pytest
import timm
import yaml
from detectron2.config import get_cfg

from ia_gcn.config import add_ia_gcn_config, read_config
from ia_gcn.config_rules import MOOT, UNUSED, last_set
from ia_gcn.inference.predictor import _read_config

IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


@pytest.fixture
def write(tmp_path):
    """A function that writes a config file and returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write_file


RESNET = {
    "MODEL": {
        "WEIGHTS": "resnet.pth",
        "BACKBONE": {"NAME": "build_resnet_backbone"},
        "PIXEL_MEAN": [1.0, 2.0, 3.0],
        "PIXEL_STD": [4.0, 5.0, 6.0],
    },
    "INPUT": {"FORMAT": "BGR"},
}


def pixels(cfg):
    return cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD


# ---------------------------------------------------------------------------- where a key was set


def test_files_count_in_the_order_in_which_they_are_merged(write):
    write("first.yaml", "SEED: 1\nVERSION: 2\nMODEL:\n  MASK_ON: False\n  WEIGHTS: a\n")
    write("sub/second.yaml", "_BASE_: third.yaml\nSEED: 2\nMODEL:\n  WEIGHTS: b\n")
    write("sub/third.yaml", "OUTPUT_DIR: x\n")
    path = write("top.yaml", "_BASE_: [first.yaml, sub/second.yaml]\nMODEL:\n  DEVICE: cpu\n")
    found = last_set(path, ["OUTPUT_DIR", "y"])
    assert found == {
        **{"VERSION": 0, "MODEL.MASK_ON": 0, "SEED": 2, "MODEL.WEIGHTS": 2},
        **{"MODEL.DEVICE": 3, "OUTPUT_DIR": 4},
    }
    # That is the order of detectron2's own merging.
    cfg = read_config(path, ["OUTPUT_DIR", "y"])
    assert (cfg.SEED, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR) == (2, "b", "y")


def test_a_config_of_the_package_is_found_without_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = read_config("Custom/small.yaml")
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_backbone"
    assert cfg.MODEL.WEIGHTS == ""


# ------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("name", ["resnet50", "tf_efficientnet_lite0", "tresnet_m"])
def test_a_timm_network_on_the_command_line_takes_the_place_of_the_files_backbone(write, name):
    cfg = read_config(write("r.yaml", RESNET), ["MODEL.TIMM.NAME", name])
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_backbone"
    assert cfg.MODEL.WEIGHTS == ""
    assert cfg.MODEL.TIMM.PRETRAINED
    assert cfg.INPUT.FORMAT == "RGB"
    weights = timm.get_pretrained_cfg(name)
    assert weights.interpolation == cfg.INPUT.INTERPOLATION
    assert pytest.approx([255 * value for value in weights.mean]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([255 * value for value in weights.std]) == cfg.MODEL.PIXEL_STD
    # detectron2's default freezes two stages, which a timm network can't.
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0


def test_what_is_set_beside_or_after_the_network_stays(write):
    base = write("base.yaml", RESNET)
    path = write(
        "mine.yaml",
        {
            "_BASE_": base,
            "MODEL": {"TIMM": {"NAME": "resnet50"}, "PIXEL_MEAN": [0.0] * 3, "WEIGHTS": "own.pth"},
        },
    )
    cfg = read_config(path, ["MODEL.PIXEL_STD", [255.0] * 3, "MODEL.BACKBONE.FREEZE_AT", 5])
    assert pixels(cfg) == ([0.0] * 3, [255.0] * 3)
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT) == ("own.pth", 5)
    assert (cfg.MODEL.BACKBONE.NAME, cfg.INPUT.FORMAT) == ("build_timm_backbone", "RGB")


def test_evaluation_of_a_checkpoint_keeps_it(write):
    path = write("mine.yaml", {"MODEL": {"TIMM": {"NAME": "resnet50"}}})
    cfg = read_config(path, ["MODEL.WEIGHTS", "model_best.pth"])
    assert cfg.MODEL.WEIGHTS == "model_best.pth"
    assert pixels(cfg) == IMAGENET


def test_a_backbone_that_is_chosen_later_takes_the_place_of_the_timm_network(write):
    path = write("t.yaml", {"_BASE_": write("r.yaml", RESNET), "MODEL": {"TIMM": {"NAME": "x"}}})
    cfg = read_config(path, ["MODEL.BACKBONE.NAME", "build_resnet10_backbone"])
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet10_backbone"
    assert pixels(cfg) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


def test_two_backbones_in_one_place_are_refused(error_line):
    opts = ["MODEL.TIMM.NAME", "resnet50", "MODEL.BACKBONE.NAME", "build_resnet_backbone"]
    message = error_line(read_config, "", opts)
    assert "MODEL.TIMM.NAME resnet50" in message
    assert "MODEL.BACKBONE.NAME build_resnet_backbone" in message


def test_a_network_that_timm_does_not_have_is_refused(error_line):
    message = error_line(read_config, "", ["MODEL.TIMM.NAME", "resnet5000"])
    assert "MODEL.TIMM.NAME: timm has no network 'resnet5000'" in message


def test_a_dump_is_taken_as_it_is(write):
    """Of a config from before MODEL.TIMM.NAME chose anything, and of one with what it chose."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.merge_from_list(["MODEL.TIMM.NAME", "tresnet_m", "SOLVER.MAX_EPOCHS", 3])
    cfg.SOLVER.MAX_ITER = 77
    again = read_config(write("old.yaml", cfg.dump()))
    assert again.MODEL.BACKBONE.NAME == "build_resnet_backbone"
    assert again.SOLVER.MAX_ITER == 77

    chosen = read_config("", ["MODEL.TIMM.NAME", "resnet50", "MODEL.PIXEL_MEAN", [9.0] * 3])
    again = read_config(write("new.yaml", chosen.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(chosen.dump())


def test_the_predictor_reads_a_config_file_in_the_same_way(write):
    path = write("mine.yaml", {"MODEL": {"TIMM": {"NAME": "tresnet_m"}}})
    cfg = _read_config({}, "model.pth", path, [])
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_backbone"
    assert pixels(cfg) == ([0.0] * 3, [255.0] * 3)


# --------------------------------------------------------------------------- keys without effect


def value_of(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def test_the_rules_are_of_keys_that_there_are():
    cfg = read_config("")
    for moot in MOOT:
        for key in (*moot.keys, moot.switch):
            value_of(cfg, key)
    for key in UNUSED:
        value_of(cfg, key)


@pytest.mark.parametrize("key", UNUSED)
def test_a_key_that_nothing_reads_is_refused(error_line, key):
    default = value_of(get_cfg(), key)
    other = {"INPUT.CROP.TYPE": "x"}
    changed = other.get(key, [1, 1] if isinstance(default, (list, tuple)) else None)
    if changed is None:
        changed = "x" if isinstance(default, str) else (not default or type(default)(default / 2))
    opts = [key, type(default)(changed)]
    message = error_line(read_config, "", opts)
    assert message.startswith(f"{key} has no effect: ")
    read_config("", [key, default])


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["SOLVER.MAX_EPOCHS", 3, "SOLVER.MAX_ITER", 10], "SOLVER.MAX_ITER"),
        (["TEST.EVAL_EPOCHS", 1, "TEST.EVAL_PERIOD", 0], "TEST.EVAL_PERIOD"),
        (["SOLVER.STEP_EPOCHS", (1,), "SOLVER.STEPS", (5,)], "SOLVER.STEPS"),
        (["SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.WARMUP_ITERS", 9], "ONE_CYCLE_RISE"),
        (["SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.STEP_EPOCHS", (2,)], "STEP_EPOCHS"),
        (["SOLVER.ONE_CYCLE_RISE", 0.5], "set that to OneCycleLR"),
        (["SOLVER.OPTIMIZER", "Adam", "SOLVER.NESTEROV", True], "SOLVER.NESTEROV"),
        (["MODEL.LOSS.GAMMA_NEG", 2.0], "AsymmetricLoss"),
        (["MODEL.LOSS.NAME", "HillLoss", "MODEL.LOSS.SPLC.THRESHOLD", 0.5], "SPLCLoss"),
        (["MODEL.LOSS.NAME", "LargeLoss", "MODEL.LOSS.LABEL_COUNTS", "x.npz"], "SelectiveLoss"),
        (["MODEL.GLOBAL_POOLING.GEM_POWER", 2.0], "gem"),
        (["INPUT.RAND_AUGMENT_MAGNITUDE", 5], "INPUT.RAND_AUGMENT_OPS"),
        (["TEST.AUG.SCALES", (1.0, 1.25)], "TEST.AUG.ENABLED"),
        (["DATALOADER.REPEAT_THRESHOLD", 0.1], "set that to RepeatFactorTrainingSampler"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "for example 0.001"),
        (["MODEL.TIMM.WEIGHTS_FILE", "x.pth"], "set MODEL.TIMM.NAME"),
        (["DATASETS.CUSTOM.TEST", "t.csv", "DATASETS.CUSTOM.HOLD_OUT", 0.1], "HOLD_OUT"),
        (["DATASETS.CUSTOM.TEST_IMAGE_ROOT", "photos"], "DATASETS.CUSTOM.TEST"),
    ],
)
def test_a_key_that_another_makes_moot_is_refused(error_line, opts, says):
    assert says in error_line(read_config, "", opts)


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 10],
        ["SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.WARMUP_ITERS", 0],
        ["SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.STEP_EPOCHS", ()],
        ["MODEL.LOSS.NAME", "AsymmetricLoss", "MODEL.LOSS.GAMMA_NEG", 2.0],
        ["MODEL.LOSS.NAME", "SelectiveLoss", "MODEL.LOSS.GAMMA_NEG", 2.0],
        ["TEST.AUG.ENABLED", True, "TEST.AUG.SCALES", (1.0, 1.25)],
        # A user's own, which may read any key.
        ["MODEL.LOSS.NAME", "MyLoss", "MODEL.LOSS.GAMMA_NEG", 2.0],
        ["MODEL.BACKBONE.NAME", "my_timm_fpn", "MODEL.TIMM.NAME", "resnet50"],
    ],
)
def test_a_key_that_has_an_effect_is_not(opts):
    read_config("", opts)


def test_a_base_config_may_say_what_a_later_one_makes_moot(write, error_line):
    base = write("base.yaml", {"SOLVER": {"MAX_ITER": 100, "STEPS": [50]}})
    path = write("mine.yaml", {"_BASE_": base, "SOLVER": {"MAX_EPOCHS": 3, "STEP_EPOCHS": [2]}})
    read_config(path)
    assert "SOLVER.MAX_ITER" in error_line(read_config, path, ["SOLVER.MAX_ITER", 10])
    # The file's own is refused as well where it is in the same file.
    both = write("both.yaml", {"SOLVER": {"MAX_EPOCHS": 3, "MAX_ITER": 100}})
    assert "SOLVER.MAX_ITER" in error_line(read_config, both)
