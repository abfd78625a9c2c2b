"""The code of docs/python.md runs as it is printed."""

import csv
import json
import re

import numpy as np

from tests.helpers.commands import ROOT, own_log_handlers


def test_the_code_of_the_page_trains_and_predicts(tiny_coco, tmp_path, monkeypatch, capsys):
    data = tiny_coco(21, "data")
    content = json.loads((tmp_path / "data/annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    labels = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        labels[annotation["image_id"]].append(names[annotation["category_id"]])
    for split in ("train", "test"):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            for image in content["images"]:
                writer.writerow([image["file_name"], ";".join(labels[image["id"]])])
    (tmp_path / "photos").symlink_to(data.image_root)
    monkeypatch.chdir(tmp_path)

    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    with own_log_handlers():
        namespace = {}
        exec(code, namespace)
    lines = capsys.readouterr().out.splitlines()
    assert f"{namespace['results']['multi_label']['mAP']}" in lines
    in_memory, loaded = (namespace[name]("photos/000001.png") for name in ("predictor", "later"))
    np.testing.assert_allclose(in_memory.scores, loaded.scores, atol=1e-4)
    assert namespace["later"].label_names == namespace["labels"]
    assert (tmp_path / "output/photos/log.txt").is_file()
