"""tools/visualize_attention.py: what it writes, and how a map lies on its image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ia_gcn.checkpoint import MultiLabelCheckpointer, load_model
from ia_gcn.commands.runs import run_config
from ia_gcn.data import MultiLabelDatasetMapper, get_test_dicts
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.visualization.attention import (
    DIMMED,
    AttendedImage,
    attention_light,
    draw_attention_sheet,
    likely_labels,
)
from tests.helpers.commands import run_script

COMMAND = "visualize_attention"


@pytest.fixture
def make_run(tiny_coco, repository, tmp_path):
    """A function that makes what a training leaves behind, without the training: its folder.

    Images of 32×24 pixels become an input of 64×96, whose maps have 2×3 cells.
    """
    data = tiny_coco(5)

    def make(*opts, config="csra"):
        options = {
            "MODEL.DEVICE": "cpu",
            "DATASETS.CUSTOM.TEST": data.json_file,
            "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
            "INPUT.IMAGE_SIZE": (96, 64),
        }
        flat = [item for pair in options.items() for item in pair]
        cfg = setup_cfg(str(repository / f"configs/DigitScenes/{config}.yaml"), [*flat, *opts])
        torch.manual_seed(0)
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text(cfg.dump())
        checkpointer = MultiLabelCheckpointer(
            Trainer.build_model(cfg), str(folder), label_names=data.label_names
        )
        checkpointer.save("model_best")
        return folder

    return make


def make_attended(attention, size=(4, 6), cell=(2.0, 2.0), window=None, scores=None, targets=None):
    height, width = size
    attention = np.asarray(attention, np.float32)
    return AttendedImage(
        name="a <b> $c$",
        image=np.full((height, width, 3), 200, np.uint8),
        width=width,
        height=height,
        targets=np.full(len(attention), -1) if targets is None else np.array(targets),
        scores=np.full(len(attention), 0.9) if scores is None else np.array(scores),
        attention=attention,
        window=window or (0.0, 0.0, float(width), float(height)),
        cell=cell,
    )


def test_what_it_writes(main, make_run):
    run = make_run()
    status, out, err = main(run, "--num-images", 3)
    assert status == 0, err
    folder = run / "attention"
    assert out.split() == [str(folder / "attention.json"), str(folder / "attention.png")]
    with Image.open(folder / "attention.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    described = json.loads((folder / "attention.json").read_text())["images"]

    cfg = run_config(str(run), [])
    names = ["red", "green", "blue"]
    model, mapper = load_model(cfg, names), MultiLabelDatasetMapper(cfg, is_train=False)
    records = {record["file_name"]: record for record in get_test_dicts(cfg, "custom_test")}
    assert len(described) == len({image["file_name"] for image in described}) == 3
    for image in described:
        record = records[image["file_name"]]
        with torch.no_grad():
            result = model([mapper(record)])[0]
        assert (image["width"], image["height"]) == (32, 24)
        assert image["window"] == [0, 0, 32, 24]
        # 2 cells over 32 pixels, 3 over 24.
        assert image["cell"] == [16, 8]
        order = result["scores"].argsort(descending=True).tolist()
        found = [names.index(label["name"]) for label in image["labels"]]
        above = int((result["scores"] >= cfg.TEST.THRESHOLD).sum())
        assert found == order[: max(1, above)]
        for c, label in zip(found, image["labels"]):
            assert label["score"] == pytest.approx(result["scores"][c].item(), abs=1e-4)
            assert label["present"] == (c in record["labels"])
            np.testing.assert_allclose(label["attention"], result["attention"][c], atol=1e-4)
            assert np.shape(label["attention"]) == (3, 2)
            # CSRA's is a softmax over the cells.
            assert np.sum(label["attention"]) == pytest.approx(1, abs=1e-3)


def test_cells_of_a_centre_crop(main, make_run, tmp_path):
    run = make_run("INPUT.CENTER_CROP", 0.8)
    status, _, err = main(run, "--num-images", 1)
    assert status == 0, err
    (image,) = json.loads((run / "attention/attention.json").read_text())["images"]
    # The model sees 64×96 of 80×120 pixels, of an image of 32×24.
    assert image["window"] == pytest.approx([3.2, 2.4, 28.8, 21.6])
    assert image["cell"] == pytest.approx([12.8, 6.4])


def test_images_of_a_users_own(main, make_run, tmp_path):
    run, photo = make_run(), tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "red").save(photo)
    status, _, err = main(run, "--output", tmp_path / "seen", "--images", photo)
    assert status == 0, err
    (image,) = json.loads((tmp_path / "seen/attention.json").read_text())["images"]
    assert image["file_name"] == str(photo)
    assert {label["present"] for label in image["labels"]} == {None}


def fails(outcome):
    status, _, err = outcome
    assert status == 1
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_refusals(main, make_run, tmp_path):
    run = make_run(config="asl")
    assert fails(main(run)).endswith("MODEL.LABEL_HEAD.NAME: LinearHead has no attention")
    sheet = tmp_path / "attention.png"
    Image.new("RGB", (8, 8)).save(sheet)
    assert "would be lost" in fails(main(run, "--output", tmp_path, "--images", sheet))
    assert "has room for 100" in fails(main(run, "--images", *[sheet] * 101))


def test_the_command(tmp_path):
    result = run_script("tools/visualize_attention.py", tmp_path)
    assert "config.yaml: no such file" in fails((result.returncode, result.stdout, result.stderr))


def test_likely_labels_are_at_least_one():
    attended = make_attended(np.ones((4, 2, 3)), scores=[0.2, 0.7, 0.9, 0.4])
    assert likely_labels(attended, 0.5).tolist() == [2, 1]
    assert likely_labels(attended, 0.3).tolist() == [2, 1, 3]
    assert likely_labels(attended, 0.3, count=2).tolist() == [2, 1]
    assert likely_labels(attended, 0.95).tolist() == [2]


def test_light_is_where_the_attention_is():
    weights = np.zeros((1, 2, 3))
    weights[0, 1, 2] = 0.3
    light = attention_light(make_attended(weights), 0)
    assert light.shape == (4, 6)
    assert light[3, 5] == light.max() == 1
    assert light[0, 0] == pytest.approx(DIMMED)
    # Nothing anywhere is dark everywhere.
    nothing = attention_light(make_attended(np.zeros((1, 2, 3))), 0)
    np.testing.assert_allclose(nothing, DIMMED)


def test_cells_may_reach_beyond_the_image():
    # Cells of 4×4 pixels: the second column and row begin at the fourth of 5 pixels.
    weights = np.array([[[0.0, 1], [0, 0]]])
    light = attention_light(make_attended(weights, size=(5, 5), cell=(4.0, 4.0)), 0)
    assert light.shape == (5, 5)
    assert light[0].argmax() == 4
    assert light[0, 0] == pytest.approx(DIMMED)


def test_what_the_model_did_not_see_is_dark():
    # Of 8×10 pixels the model saw 4×6, in cells of 2×2.
    weights = np.zeros((1, 2, 3))
    weights[0, 1, 2] = 0.3
    inside = attention_light(make_attended(weights), 0)
    window = (2.0, 1.0, 8.0, 5.0)
    light = attention_light(make_attended(weights, size=(8, 10), window=window), 0)
    np.testing.assert_allclose(light[1:5, 2:8], inside)
    light[1:5, 2:8] = DIMMED
    np.testing.assert_allclose(light, DIMMED)


def test_a_map_that_ends_before_the_image_by_rounding():
    light = attention_light(make_attended(np.ones((1, 1, 1)), size=(3, 5), cell=(4.4, 2.4)), 0)
    np.testing.assert_allclose(light, np.ones((3, 5)))


@pytest.mark.parametrize("targets", [None, [1, 0]])
def test_a_sheet_of_images_of_unequal_numbers_of_labels(tmp_path, targets):
    images = [
        make_attended(np.ones((2, 2, 3)), scores=scores, targets=targets)
        for scores in ([0.9, 0.8], [0.9, 0.1])
    ]
    path = tmp_path / "sheet.png"
    draw_attention_sheet(images, ["$x$", "y" * 300], 0.5, str(path))
    with Image.open(path) as image:
        assert min(image.size) > 200
