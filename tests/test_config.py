"""Where a config is found, and configs made in Python."""

import pytest
from detectron2.config import CfgNode

from ia_gcn.config import find_config, read_config
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


def test_a_circle_of_bases_is_named(tmp_path, error_line):
    for name, base in [("self", "./self"), ("a", "b"), ("b", "../x/c"), ("c", "a")]:
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {base}.yaml\n")
    (tmp_path / "b.yaml").write_text(f"_BASE_: ../{tmp_path.name}/c.yaml\n")
    for name in ("self", "a"):
        line = error_line(read_config, str(tmp_path / f"{name}.yaml"))
        assert "--config-file" in line
        assert "_BASE_ leads from" in line
        assert f"{name}.yaml back to itself" in line


def test_more_bases_than_anybody_has_are_refused(tmp_path, error_line):
    for level in range(30):
        bases = f"_BASE_: [{level + 1}.yaml, {level + 1}.yaml]\n" if level < 29 else ""
        (tmp_path / f"{level}.yaml").write_text(f"{bases}SEED: 1\n")
    assert "more than 100 files" in error_line(read_config, str(tmp_path / "0.yaml"))


def test_a_base_without_an_end_is_refused(tmp_path, error_line):
    path = tmp_path / "a.yaml"
    path.write_text("_BASE_: /dev/zero")
    assert "not a regular file: '/dev/zero'" in error_line(read_config, str(path))
    path.write_text("_BASE_: b.yaml")
    (tmp_path / "b.yaml").write_text("#" * 2**21)
    assert "b.yaml: not a text of at most" in error_line(read_config, str(path))


def test_a_value_of_a_type_that_no_key_has_is_refused(tmp_path, error_line):
    (tmp_path / "a.yaml").write_text("OUTPUT_DIR: !!set {a, b}")
    assert "OUTPUT_DIR" in error_line(read_config, str(tmp_path / "a.yaml"))


def test_a_config_that_grows_is_refused(tmp_path, error_line):
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(["l0: &l0 [1]", *levels]))
    assert "with its aliases" in error_line(read_config, str(tmp_path / "a.yaml"))
