"""tools/visualize_regions.py: what it writes, and the images it draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from matplotlib import pyplot
from PIL import Image

from ia_gcn.checkpoint import MultiLabelCheckpointer, load_model
from ia_gcn.commands.runs import run_config, sample_records
from ia_gcn.data import MultiLabelDatasetMapper, get_test_dicts
from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.visualization import describe_recognition, recognize
from ia_gcn.visualization.regions import (
    DIMMED,
    Recognition,
    draw_recognition,
    draw_region_sheet,
    labels_to_show,
    region_light,
    thumbnail,
)
from tests.helpers.commands import run_script

COMMAND = "visualize_regions"
# But for what another test left open, which is closed whenever the garbage is collected.
NO_WARNINGS = pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def make_run(tiny_coco, repository, tmp_path):
    """A function that makes what a training leaves behind, without the training: its folder.

    The model is at random. Images of 32×24 pixels become an input of 64×96.
    """
    data = tiny_coco(7)

    def make(*opts, config="ia_gcn"):
        options = {
            "MODEL.DEVICE": "cpu",
            "DATASETS.CUSTOM.TEST": data.json_file,
            "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
            "INPUT.IMAGE_SIZE": (96, 64),
        }
        flat = [item for pair in options.items() for item in pair]
        cfg = setup_cfg(str(repository / f"configs/DigitScenes/{config}.yaml"), [*flat, *opts])
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        if model.label_graph is not None:
            counts = np.array([[4, 2, 3], [2, 4, 1], [3, 1, 5]])
            embeddings = np.random.default_rng(0).normal(size=(3, 300))
            model.label_graph.fill(counts.diagonal(), counts, embeddings)
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text(cfg.dump())
        MultiLabelCheckpointer(model, str(folder), label_names=data.label_names).save("model_best")
        return folder

    return make


def open_run(folder):
    """The config, the model, the mapper and the data set dicts of a run."""
    cfg = run_config(str(folder), [])
    model = load_model(cfg, ["red", "green", "blue"])
    mapper = MultiLabelDatasetMapper(cfg, is_train=False)
    return cfg, model, mapper, get_test_dicts(cfg, "custom_test")


def recognize_record(model, mapper, record):
    """What the model says of a data set's image, whose labels are known."""
    view = mapper(record)
    return recognize(model, view, read_image(record["file_name"]), targets=view["labels"])


def read_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def assert_drawn(path):
    with Image.open(path) as image:
        assert 700 < image.size[0] < 2000
        assert 200 < image.size[1] < 4000
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50


# ---------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_what_it_writes(main, make_run):
    run = make_run()
    status, out, err = main(run, "--num-images", 2)
    assert status == 0, err
    cfg, model, mapper, dicts = open_run(run)
    files = [Path(record["file_name"]) for record in sample_records(cfg, 2)]
    expected = {f"{file.stem}{suffix}" for file in files for suffix in (".json", ".png")}
    written = {path.name for path in (run / "regions").iterdir()}
    assert written == {*expected, "regions.png"}
    assert set(out.split()) == {str(run / "regions" / name) for name in written}
    for path in (run / "regions").glob("*.png"):
        assert_drawn(path)
    for file in files:
        record = next(d for d in dicts if d["file_name"] == str(file))
        check_content(read_json(run / "regions" / f"{file.stem}.json"), model, mapper, record)


def test_the_command(tmp_path):
    result = run_script("tools/visualize_regions.py", tmp_path)
    assert "config.yaml: no such file" in fails((result.returncode, result.stdout, result.stderr))


@torch.no_grad()
def check_content(content, model, mapper, record):
    """A NAME.json against the model's own output."""
    result = model([mapper(record)])[0]
    assert content["file_name"] == record["file_name"]
    assert (content["width"], content["height"]) == (32, 24)
    labels = content["labels"]
    assert [label["name"] for label in labels] == ["red", "green", "blue"]
    assert [label["present"] for label in labels] == [i in record["labels"] for i in range(3)]
    for key, value in {
        "score": result["logits"].sigmoid(),
        "score_global": result["logits_global"].sigmoid(),
        "score_region": result["logits_region"].sigmoid(),
        "presence": result["presence"],
    }.items():
        assert [label[key] for label in labels] == pytest.approx(value.tolist(), abs=1e-4)

    regions = content["regions"]
    assert len(regions) == len(result["regions"]) > 5
    boxes = torch.tensor([region["box"] for region in regions])
    input_boxes = boxes * torch.tensor([64 / 32, 96 / 24, 64 / 32, 96 / 24])
    torch.testing.assert_close(
        input_boxes, result["regions"].proposal_boxes.tensor, atol=0.05, rtol=0
    )
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 32).all()
    assert (boxes[:, 3] <= 24).all()
    objectness = [region["objectness"] for region in regions]
    assert objectness == pytest.approx(
        result["regions"].objectness_logits.sigmoid().tolist(), abs=1e-4
    )
    assert objectness == sorted(objectness, reverse=True)
    weights = [region["weight"] for region in regions]
    assert weights == pytest.approx(result["regions"].weights.tolist(), abs=1e-4)
    for region, scores in zip(regions, result["regions"].scores):
        order = scores.argsort(descending=True)
        names = [("red", "green", "blue")[i] for i in order]
        assert [label["name"] for label in region["labels"]] == names
        values = [label["score"] for label in region["labels"]]
        assert values == pytest.approx(scores[order].tolist(), abs=1e-4)

    graph = content["label_graph"]
    order = result["scores"].argsort(descending=True)
    assert graph["labels"] == [("red", "green", "blue")[i] for i in order]
    lcm = model.label_graph.lcm[order][:, order]
    individual = result["presence"][order].outer(result["presence"][order])
    torch.testing.assert_close(torch.tensor(graph["statistical"]), lcm, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(graph["individual"]), individual, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(graph["fused"]), lcm * individual, atol=1e-4, rtol=0)


def test_regions_of_a_centre_crop_are_inside_of_its_window(make_run):
    _, model, mapper, dicts = open_run(make_run("INPUT.CENTER_CROP", 0.5))
    view = mapper(dicts[0])
    # The middle half of 32×24 pixels, which the model sees as 64×96.
    np.testing.assert_allclose(view["window"], [8, 6, 24, 18])
    with torch.no_grad():
        seen = model([view])[0]["regions"].proposal_boxes.tensor
    found = recognize_record(model, mapper, dicts[0]).boxes
    assert len(found) == len(seen) > 0
    np.testing.assert_allclose(found, seen.numpy() / (4, 8, 4, 8) + (8, 6, 8, 6))


def test_any_images_from_another_checkpoint(main, tool, make_run, tmp_path, monkeypatch):
    """Grey, 16 bits, odd sizes, twice the same name; an image `regions`; no ground truth."""
    drawn = []
    monkeypatch.setattr(tool, "draw_recognition", lambda *args: drawn.append(args[-1]))
    monkeypatch.setattr(tool, "draw_region_sheet", lambda rows, *args: drawn.append(len(rows)))
    run = make_run()
    weights = tmp_path / "elsewhere.pth"
    (run / "model_best.pth").rename(weights)
    rng = np.random.default_rng(0)
    images = {
        "regions.png": rng.integers(0, 256, (51, 33), dtype=np.uint8),
        "a.png": rng.integers(0, 65536, (7, 90)).astype(np.uint16),
        "sub/a.jpg": rng.integers(0, 256, (1, 1, 3), dtype=np.uint8),
    }
    (tmp_path / "sub").mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / name)
    files = [tmp_path / name for name in images]
    output = tmp_path / "seen"
    options = ["--output", output, "MODEL.WEIGHTS", weights, "--images", *files]
    status, out, err = main(run, *options)
    assert status == 0, err
    names = ["regions_2", "a", "a_2"]
    assert out.split() == [
        *(f"{output / name}.{kind}" for name in names for kind in ("json", "png")),
        f"{output / 'regions.png'}",
    ]
    for name, file, pixels in zip(names, files, images.values()):
        content = read_json(output / f"{name}.json")
        assert content["file_name"] == str(file)
        assert (content["height"], content["width"]) == pixels.shape[:2]
        assert {label["present"] for label in content["labels"]} == {None}
    assert drawn == [*(f"{output / name}.png" for name in names), 3]


def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    assert "tools/visualize_regions.py output/demo\n" in capsys.readouterr().out


def test_the_best_checkpoint_comes_first(make_run):
    run = make_run()
    best, final = run / "model_best.pth", run / "model_final.pth"
    final.write_bytes(best.read_bytes())

    def weights(*opts):
        return run_config(str(run), opts).MODEL.WEIGHTS

    assert weights() == str(best)
    best.unlink()
    assert weights() == str(final)
    assert weights("MODEL.WEIGHTS", "x.pth") == "x.pth"


def test_the_test_sets_images_are_always_the_same(make_run):
    cfg, *_ = open_run(make_run())
    ids = [[record["image_id"] for record in sample_records(cfg, n)] for n in (3, 3, 100)]
    assert ids[0] == ids[1] == ids[2][:3]
    assert sorted(ids[2]) == [1, 2, 3, 4, 5, 6, 7]


# ------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("opts", "branches", "graph"),
    [
        (["MODEL.FUSION.GLOBAL_WEIGHT", 1.0], ["global"], ["statistical", "individual", "fused"]),
        (
            ["MODEL.FUSION.GLOBAL_WEIGHT", 0.0, "MODEL.REGION_GCN.LCM", "individual"],
            ["region"],
            ["individual"],
        ),
        (
            ["MODEL.LABEL_GRAPH.IMAGE_DEPENDENT", False, "MODEL.REGION_GCN.LCM", "individual"],
            ["global", "region"],
            ["statistical", "individual"],
        ),
        (
            ["MODEL.LABEL_HEAD.NAME", "LinearHead", "MODEL.REGION_GCN.LCM", "individual"],
            ["global", "region"],
            ["individual"],
        ),
    ],
)
def test_what_a_model_lacks_is_null(make_run, opts, branches, graph):
    _, model, mapper, dicts = open_run(make_run(*opts))
    recognition = recognize_record(model, mapper, dicts[0])
    content = describe_recognition(recognition, "a.png", ["red", "green", "blue"])
    for label in content["labels"]:
        for branch in ("global", "region"):
            assert (label[f"score_{branch}"] is not None) == (branch in branches)
        if len(branches) == 1:
            assert label["score"] == label[f"score_{branches[0]}"]
    there = [name for name, lcm in content["label_graph"].items() if lcm is not None]
    assert there == ["labels", *graph]


def test_an_image_without_regions(make_run, monkeypatch):
    _, model, mapper, dicts = open_run(make_run())
    propose = model.propose_regions
    monkeypatch.setattr(
        model, "propose_regions", lambda *args: ([p[:0] for p in propose(*args)[0]], {})
    )
    recognition = recognize_record(model, mapper, dicts[0])
    content = describe_recognition(recognition, "a.png", ["red", "green", "blue"])
    assert content["regions"] == []
    assert {label["presence"] for label in content["labels"]} == {1.0}
    assert content["label_graph"]["fused"] == content["label_graph"]["statistical"]


def test_a_box_of_the_input_becomes_one_of_the_image(make_run, monkeypatch):
    _, model, mapper, dicts = open_run(make_run())
    propose = model.propose_regions

    def propose_one(*args):
        proposals = propose(*args)[0][0][:1]
        # The right half of the upper quarter of 64×96.
        proposals.proposal_boxes = Boxes(torch.tensor([[32.0, 0.0, 64.0, 24.0]]))
        return [proposals], {}

    monkeypatch.setattr(model, "propose_regions", propose_one)
    assert recognize_record(model, mapper, dicts[0]).boxes.tolist() == [[16, 0, 32, 6]]


def test_ignored_labels_are_neither_present_nor_absent(make_run):
    _, model, mapper, dicts = open_run(make_run())
    record = {**dicts[0], "labels": [2], "ignored_labels": [0]}
    content = describe_recognition(
        recognize_record(model, mapper, record), "", ["red", "green", "blue"]
    )
    assert [label["present"] for label in content["labels"]] == [None, False, True]


# -------------------------------------------------------------------------------------- errors


def fails(result):
    """The one line that a failed command says."""
    status, out, err = result
    assert status == 1
    assert not out
    line = err.strip().splitlines()[-1]
    assert line.startswith("visualize_regions: ")
    return line


def test_errors_are_one_line(main, make_run, tmp_path):
    assert "config.yaml: no such file" in fails(main(tmp_path / "nowhere"))
    run = make_run()
    assert "SOLVER.NO_SUCH_KEY" in fails(main(run, "SOLVER.NO_SUCH_KEY", 1))
    assert "none.pth" in fails(main(run, "MODEL.WEIGHTS", tmp_path / "none.pth"))
    no_data = ("DATASETS.CUSTOM.TEST", "", "DATASETS.TEST", "()", "MODEL.LABEL_HEAD.NUM_LABELS", 3)
    assert "DATASETS.TEST is empty" in fails(main(run, *no_data, "DATASETS.TRAIN", "()"))
    # The checkpoint has no bias.
    assert "lacks 1 of the model's tensors" in fails(main(run, "MODEL.LABEL_GCN.BIAS", True))

    image = tmp_path / "tiny/images/000001.png"
    before = image.read_bytes()
    assert "would be lost" in fails(main(run, "--output", image.parent, "--images", image))
    assert image.read_bytes() == before
    image.write_bytes(before[:-40])
    assert f"{image}: " in fails(main(run, "--images", image))
    assert f"{image.parent / 'none.jpg'}: " in fails(
        main(run, "--images", image.parent / "none.jpg")
    )

    broken = torch.load(run / "model_best.pth", weights_only=True)
    broken["model"]["region_gcn.classifier.bias"].fill_(torch.nan)
    torch.save(broken, run / "model_best.pth")
    assert "not finite" in fails(main(run))
    (run / "model_best.pth").unlink()
    assert "has no model_best.pth and no model_final.pth" in fails(main(run))


def test_a_model_without_regions_is_refused(main, make_run):
    line = fails(main(make_run(config="ml_gcn")))
    assert "MultiLabelRecognizer has no region branch" in line


@pytest.mark.parametrize("option", ["--num-images", "--regions"])
def test_counts_are_positive(main, option, tmp_path):
    with pytest.raises(SystemExit):
        main(tmp_path, option, 0)


# ------------------------------------------------------------------------------------- drawing


def make_recognition(num_labels=5, num_regions=4, size=(60, 80), present=(0,), **changes):
    rng = np.random.default_rng(0)
    lcm, presence = rng.random((num_labels, num_labels)), rng.random(num_labels)
    corners = rng.random((num_regions, 2, 2)) * size[::-1]
    values = {
        "name": "a $ image.jpg",
        "image": np.full((*size, 3), 200, np.uint8),
        "width": size[1],
        "height": size[0],
        "targets": np.isin(np.arange(num_labels), present).astype(int),
        "scores": {name: rng.random(num_labels) for name in ("fused", "global", "region")},
        "presence": presence,
        "label_graph": {
            "statistical": lcm,
            "individual": np.outer(presence, presence),
            "fused": lcm * np.outer(presence, presence),
        },
        "boxes": np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1),
        "objectness": np.sort(rng.random(num_regions))[::-1],
        "weights": rng.normal(size=num_regions),
        "region_scores": rng.random((num_regions, num_labels)),
    }
    return Recognition(**{**values, **changes})


ODD_NAMES = ["$x^{$", "a label's name that is much longer than what there is room for", "", "a_b"]


NOTHING = {
    "targets": np.full(5, -1),
    "scores": {"fused": np.full(5, 0.5)},
    "label_graph": {"individual": np.ones((5, 5))},
}


@pytest.mark.slow
@NO_WARNINGS
@pytest.mark.parametrize(
    "recognition",
    [
        pytest.param(
            make_recognition(num_labels=80, num_regions=40, size=(300, 20), present=range(30)),
            marks=pytest.mark.slow,
        ),
        make_recognition(num_regions=0, **NOTHING),
    ],
)
def test_anything_can_be_drawn(tmp_path, recognition):
    names = [*ODD_NAMES, *map(str, range(80))][: len(recognition.targets)]
    draw_recognition(recognition, names, 0.5, 10, str(tmp_path / "x.png"))
    assert_drawn(tmp_path / "x.png")
    assert not pyplot.get_fignums()  # no figure is left with pyplot


@NO_WARNINGS
def test_a_sheet_has_a_row_for_each_image(tmp_path):
    recognitions = [
        make_recognition(weights=np.zeros(4)),
        make_recognition(num_regions=0, size=(20, 300), **NOTHING),
        make_recognition(num_regions=1, size=(1, 1)),
    ]
    heights = []
    for count in (1, 3):
        draw_region_sheet(recognitions[:count], list("abcde"), 0.5, 10, str(tmp_path / "x.png"))
        assert_drawn(tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            heights.append(image.size[1])
    assert heights[1] > 2 * heights[0]


def test_all_of_a_row_is_drawn(tmp_path):
    def draw(**changes):
        path = str(tmp_path / "x.png")
        draw_region_sheet([make_recognition(**changes)], list("abcde"), 0.5, 4, path)
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    usual = draw()
    for changes in (
        {"weights": -make_recognition().weights},
        {"boxes": np.array([[1.0, 1.0, 40.0, 50.0]] * 4)},
        {"targets": np.zeros(5)},
        {"scores": {"fused": make_recognition().scores["fused"]}},
    ):
        assert (draw(**changes) != usual).any()


@pytest.mark.slow
def test_all_of_the_label_graph_is_drawn(tmp_path):
    thirds = []
    graph = make_recognition().label_graph
    for changes in ({}, {"statistical": np.eye(5), "fused": np.eye(5)}):
        recognition = make_recognition(label_graph={**graph, **changes})
        draw_recognition(recognition, list("abcde"), 0.5, 4, str(tmp_path / "x.png"))
        with Image.open(tmp_path / "x.png") as image:
            lower = np.asarray(image.convert("RGB"))[image.size[1] // 2 :]
        thirds.append(np.array_split(lower, 3, axis=1))
    statistical, individual, fused = (
        (before != after).any(axis=-1).mean() for before, after in zip(*thirds)
    )
    assert statistical > 0.1
    assert fused > 0.1
    # A neighbour's colour bar may reach into its third.
    assert individual < 0.02


def test_what_is_present_is_shown_and_then_the_highest_scores():
    scores = {"fused": np.array([0.9, 0.1, 0.5, 0.8, 0.2])}
    recognition = make_recognition(present=(1, 4), scores=scores)
    assert labels_to_show(recognition, 5).tolist() == [0, 3, 2, 4, 1]
    assert labels_to_show(recognition, 3).tolist() == [0, 4, 1]
    assert labels_to_show(recognition, 1).tolist() == [4]


def test_the_strongest_region_over_a_pixel_gives_its_light():
    boxes = np.array([[0, 0, 2, 2], [1, 0, 3, 1], [3, 1, 4, 2]])
    light = region_light((2, 5), boxes, np.array([0.5, 1.0, 0.0]))
    half = (1 + DIMMED) / 2
    assert light == pytest.approx(
        np.array([[half, 1, 1, DIMMED, DIMMED], [half, half, DIMMED, DIMMED, DIMMED]])
    )


def test_a_thumbnail_keeps_its_shape():
    assert thumbnail(np.zeros((30, 40, 3), np.uint8)).shape == (30, 40, 3)
    assert thumbnail(np.zeros((1500, 3000, 3), np.uint8)).shape == (400, 800, 3)
