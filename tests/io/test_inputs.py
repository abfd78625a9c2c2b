"""A named pipe or a device in place of a file is refused, wherever files of others are read."""

import os
import threading

import pytest
from detectron2.utils.file_io import PathManager

from ia_gcn.ablation.spec import read_spec
from ia_gcn.checkpoint import read_checkpoint
from ia_gcn.checkpoint.source import read_pickle
from ia_gcn.checkpoint.source_labels import read_matrix
from ia_gcn.commands.predict import read_thresholds
from ia_gcn.config import read_config
from ia_gcn.data import label_embeddings
from ia_gcn.data.datasets import load_multilabel_coco, load_multilabel_voc
from ia_gcn.data.datasets.common import read_label_file
from ia_gcn.data.datasets.custom import read_csv
from ia_gcn.data.proposals import add_proposals
from ia_gcn.evaluation import read_predictions
from ia_gcn.io.inputs import open_input
from ia_gcn.modeling.backbone import read_weights
from ia_gcn.visualization import read_training_log
from tests.helpers.commands import ROOT


def read_based_on(path):
    config = os.path.join(os.path.dirname(path), "config.yaml")
    with open(config, "w") as file:
        file.write(f"_BASE_: {path}\n")
    read_config(config)


def read_voc(path):
    folder = os.path.join(os.path.dirname(path), "ImageSets", "Main")
    os.makedirs(folder)
    os.rename(path, os.path.join(folder, "val.txt"))
    load_multilabel_voc(os.path.dirname(path), "val")


READERS = {
    "a.json": lambda path: load_multilabel_coco(path, "", ["a"]),
    "a.csv": read_csv,
    "labels.txt": read_label_file,
    "val.txt": read_voc,
    "base.yaml": read_based_on,
    "tables.yaml": read_spec,
    "model.pth": read_checkpoint,
    "timm.safetensors": read_weights,
    "timm.pth": read_weights,
    "source.pkl": lambda path: read_pickle(path, path),
    "proposals.pkl": lambda path: add_proposals([], path),
    "vectors.npy": lambda path: read_matrix("--embeddings", path, 2),
    "vectors.txt": lambda path: label_embeddings(["a"], path, 3),
    "vectors.npz": lambda path: label_embeddings(["a"], path, 3),
    "predictions.npz": read_predictions,
    "metrics.json": read_training_log,
    "thresholds.csv": lambda path: read_thresholds(path, ["a"]),
}


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_not_waited_for(tmp_path, error_line, name):
    path = tmp_path / name
    os.mkfifo(path)
    # What waits gets an end after all, so that the test ends.
    opened = []
    watch = threading.Timer(20, lambda: opened.append(os.open(path, os.O_RDWR)))
    watch.start()
    try:
        line = error_line(READERS[name], str(path))
    finally:
        watch.cancel()
    assert not opened
    assert name in line
    assert "not a regular file" in line


def test_devices_and_pipes_are_refused_and_links_followed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(OSError, match="not a regular file"):
            open_input(path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "other link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file", str(tmp_path / "other link")):
        with open_input(path) as file:
            assert file.read() == "text"
        with open_input(path, "rb") as file:
            assert file.read() == b"text"


def test_what_is_missing_or_a_folder_is_said_to_be_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_input(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        open_input(tmp_path)


def test_other_names_are_path_managers(tmp_path, monkeypatch):
    monkeypatch.setattr(PathManager, "open", lambda path, mode: (path, mode))
    assert open_input("scheme://file", "rb") == ("scheme://file", "rb")


def test_there_is_no_other_way_to_read_a_file_of_others():
    """PathManager opens images, for `decode_image` has looked at them, and a cache of ia_gcn's."""
    allowed = {"io/inputs.py", "data/dataset_mapper.py", "evaluation/html_page.py"}
    allowed |= {"data/label_statistics.py", "engine/summary.py"}
    package = ROOT / "ia_gcn"
    using = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "PathManager.open" in path.read_text()
    }
    assert using == allowed
