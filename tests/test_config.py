"""Where a config is found, and configs made in Python."""

import pytest
from detectron2.config import CfgNode

from ia_gcn.config import find_config
from ia_gcn.data import register_multilabel_csv
from ia_gcn.engine import make_config
from ia_gcn.errors import InputError
from tests.helpers.commands import ROOT


@pytest.mark.parametrize("name", ["DigitScenes/ml_gcn.yaml", "configs/DigitScenes/ml_gcn.yaml"])
def test_a_config_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (ROOT / "configs/DigitScenes/ml_gcn.yaml").samefile(find_config(name))


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DigitScenes").mkdir()
    (tmp_path / "DigitScenes/ml_gcn.yaml").write_text("SEED: 7\n")
    assert find_config("DigitScenes/ml_gcn.yaml") == "DigitScenes/ml_gcn.yaml"
    assert make_config("DigitScenes/ml_gcn.yaml").SEED == 7


def test_no_such_config_is_refused(error_line):
    assert error_line(find_config, "no/such.yaml") == "--config-file no/such.yaml: no such file"


def test_options_of_any_type(tmp_path):
    options = {"SOLVER.BASE_LR": 0.5, "INPUT.IMAGE_SIZE": (64, 32), "OUTPUT_DIR": "a b"}
    cfg = make_config("DigitScenes/ml_gcn.yaml", options)
    assert (cfg.SOLVER.BASE_LR, cfg.INPUT.IMAGE_SIZE, cfg.OUTPUT_DIR) == (0.5, (64, 32), "a b")
    assert isinstance(cfg, CfgNode)
    assert cfg.is_frozen()
    with pytest.raises(InputError, match=r"SOLVER\.NO_SUCH_KEY"):
        make_config("", {"SOLVER.NO_SUCH_KEY": 1})


def test_the_number_of_labels_is_that_of_the_data_sets_given(tmp_path):
    assert make_config("COCO/ml_gcn_R_101.yaml").MODEL.LABEL_HEAD.NUM_LABELS == 80
    (tmp_path / "train.csv").write_text("a.png,cat;dog\nb.png,ant\n")
    register_multilabel_csv("mine", str(tmp_path / "train.csv"), str(tmp_path))
    options = {"DATASETS.TRAIN": ("mine",), "DATASETS.TEST": ()}
    cfg = make_config("COCO/ml_gcn_R_101.yaml", options)
    assert cfg.MODEL.LABEL_HEAD.NUM_LABELS == 3
