"""tools/build_label_embeddings.py: run as a user would, and what it writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.data import MultiLabelDatasetMapper
from ia_gcn.data.datasets.common import register_multilabel
from ia_gcn.data.label_embeddings import normalize_embeddings
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.inference.image_embeddings import label_means
from tests.helpers.commands import run_script

COMMAND = "build_label_embeddings"
LABELS = ["red", "green", "blue"]
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RPN.CONV_DIMS": "[8]",
    "MODEL.LABEL_EMBEDDINGS.DIM": 12,
    "MODEL.LABEL_GCN.HIDDEN_DIMS": "[16]",
    "MODEL.REGION_GCN.HIDDEN_DIMS": "[5, 8]",
    "INPUT.IMAGE_SIZE": "(64, 96)",
    "DATASETS.TEST": "()",
    "SEED": 1,
}


@pytest.fixture
def two_data_sets(tiny_coco):
    """Config keys of data sets whose images have labels, ignored ones, both or neither."""
    keys = {"DATASETS.TRAIN": "('first', 'second')", "MODEL.LABEL_HEAD.NUM_LABELS": 3}
    rng = np.random.default_rng(0)
    for name, count in (("first", 8), ("second", 5)):
        images = Path(tiny_coco(count, name).image_root)
        targets = rng.integers(-1, 2, (count, 3))
        targets[0] = 0
        dicts = [
            {
                "file_name": str(images / f"{i + 1:06d}.png"),
                "image_id": i,
                "labels": np.flatnonzero(target == 1).tolist(),
                "ignored_labels": np.flatnonzero(target == -1).tolist(),
            }
            for i, target in enumerate(targets)
        ]
        register_multilabel(name, lambda dicts=dicts: dicts, LABELS)
    return keys


@pytest.fixture
def custom(tiny_coco):
    """Config keys of 7 images in which every combination of the labels occurs once."""
    data = tiny_coco(7, "custom")
    return {
        "DATASETS.CUSTOM.TRAIN": data.json_file,
        "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
    }


@pytest.fixture
def trained(repository, tmp_path):
    """A function that makes a checkpoint of a model at random, without a training.

    Returns:
        the tool's arguments but for --kind, the config and the model.
    """

    def make(keys, config="ml_gcn", **extra):
        config_file = repository / f"configs/DigitScenes/{config}.yaml"
        opts = [str(item) for pair in {**SMALL, **keys}.items() for item in pair]
        cfg = setup_cfg(str(config_file), opts)
        torch.manual_seed(0)
        model = Trainer.build_model(cfg).eval()
        graph = model.label_graph
        if graph is not None:
            counts = np.array([[4, 2, 3], [2, 4, 1], [3, 1, 5]])
            graph.fill(counts.diagonal(), counts, graph.embeddings)
        folder = tmp_path / "run"
        folder.mkdir()
        MultiLabelCheckpointer(model, str(folder), label_names=LABELS).save("model")
        weights = folder / "model.pth"
        return ["--config-file", config_file, "--weights", weights, *opts], cfg, model

    return make


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@torch.no_grad()
def describe(kind, model, cfg, record):
    """What a label's embedding is the mean of, for one image."""
    sample = MultiLabelDatasetMapper(cfg, is_train=False)(record)
    if kind == "scores":
        return model([sample])[0]["scores"].double().numpy()
    assert cfg.MODEL.GLOBAL_POOLING.NAME == "mean"
    cells = model.backbone(model.preprocess_image([sample]).tensor)["res5"]
    return cells[0].double().mean(dim=(1, 2)).numpy()


def means_of_a_loop(kind, model, cfg, unreadable=()):
    rows = [[] for _ in LABELS]
    for name in cfg.DATASETS.TRAIN:
        for record in DatasetCatalog.get(name):
            if record["file_name"] in unreadable:
                continue
            vector = describe(kind, model, cfg, record)
            for label in set(record["labels"]):
                rows[label].append(vector)
    return np.array([np.mean(vectors, axis=0) for vectors in rows])


# ---------------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize(
    ("kind", "config", "batch_size"),
    [
        ("scores", "ml_gcn", 1),
        ("scores", "ia_gcn", 4),
        ("features", "ml_gcn", 4),
        ("features", "ia_gcn", 100),
    ],
)
def test_embeddings_are_the_means_of_a_plain_loop(
    main, trained, two_data_sets, tmp_path, kind, config, batch_size
):
    arguments, cfg, model = trained({**two_data_sets, "TEST.IMS_PER_BATCH": batch_size}, config)
    status, out, err = main(*arguments, "--kind", kind)
    assert status == 0, err
    output = tmp_path / "run" / "label_embeddings.npz"
    content = read(output)
    assert set(content) == {"embeddings", "label_names", "kind"}
    assert content["embeddings"].dtype == np.float32
    expected = means_of_a_loop(kind, model, cfg)
    assert expected.shape == (3, {"scores": 3, "features": 64}[kind])
    np.testing.assert_allclose(content["embeddings"], expected, rtol=1e-4, atol=1e-6)
    # The labels' own means are further apart than that.
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.allclose(expected[a], expected[b], rtol=1e-3, atol=1e-5)
    assert content["label_names"].tolist() == LABELS
    assert content["kind"] == kind
    dim = expected.shape[1]
    assert f"MODEL.LABEL_EMBEDDINGS.SOURCE {output} MODEL.LABEL_EMBEDDINGS.DIM {dim}\n" in out


def test_the_images_are_not_augmented(main, trained, custom, tmp_path):
    keys = {**custom, "INPUT.MULTI_SCALE_CROP.ENABLED": True, "INPUT.RANDOM_FLIP": "horizontal"}
    arguments, cfg, model = trained(keys)
    status, _, err = main(*arguments, "--kind", "features")
    assert status == 0, err
    found = read(tmp_path / "run" / "label_embeddings.npz")["embeddings"]
    np.testing.assert_allclose(found, means_of_a_loop("features", model, cfg), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_does_not_count(main, trained, custom, tmp_path, workers):
    arguments, cfg, model = trained({**custom, "DATALOADER.NUM_WORKERS": workers})
    broken = Path(custom["DATASETS.CUSTOM.IMAGE_ROOT"]) / "000002.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    status, _, err = main(*arguments, "--kind", "scores")
    assert status == 0, err
    found = read(tmp_path / "run" / "label_embeddings.npz")["embeddings"]
    expected = means_of_a_loop("scores", model, cfg, [str(broken)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_label_without_a_image_gets_the_mean_of_the_others(
    main, trained, two_data_sets, tmp_path
):
    for name in ("first", "second"):
        for record in DatasetCatalog.get(name):
            record["ignored_labels"] = [1]
            record["labels"] = [label for label in record["labels"] if label != 1]
    arguments, *_ = trained(two_data_sets)
    status, _, err = main(*arguments, "--kind", "features")
    assert status == 0
    assert "no image has 1 label(s)" in err
    assert err.rstrip().endswith(": green")
    red, green, blue = read(tmp_path / "run" / "label_embeddings.npz")["embeddings"]
    np.testing.assert_allclose(green, (red + blue) / 2, rtol=1e-6)
    assert not np.allclose(red, blue, rtol=1e-3)


def test_sums_are_divided_by_counts():
    sums = np.array([[2, 4], [0, 0], [9, 0], [0, 0]], np.float64)
    found = label_means(sums, np.array([2.0, 0.0, 3.0, 0.0]))
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2], [2, 1], [3, 0], [2, 1]]


@pytest.mark.slow
def test_a_training_keeps_them_in_its_checkpoint(trained, custom, tmp_path, repository):
    """The command line as it is, and the keys that it prints."""
    arguments, *_ = trained({**custom, "MODEL.LABEL_HEAD.NAME": "LinearHead"})
    output = tmp_path / "folder" / "of images.npz"
    options = ("--kind", "features", "--output", output)
    result = run_script("tools/build_label_embeddings.py", *arguments, *options)
    assert result.returncode == 0, result.stderr
    written, keys = result.stdout.splitlines()
    assert written == f"{output}: features, 3 labels, 64 numbers each"
    assert keys == (f"MODEL.LABEL_EMBEDDINGS.SOURCE '{output}' MODEL.LABEL_EMBEDDINGS.DIM 64")
    training = {
        **SMALL,
        **custom,
        "MODEL.LABEL_EMBEDDINGS.SOURCE": output,
        "MODEL.LABEL_EMBEDDINGS.DIM": 64,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_EPOCHS": 1,
        "OUTPUT_DIR": tmp_path / "training",
    }
    embeddings = read(output)["embeddings"]
    for norm in ("none", "standardize", "whiten"):
        opts = [str(item) for pair in training.items() for item in pair]
        opts += ["MODEL.LABEL_EMBEDDINGS.NORM", norm]
        cfg = setup_cfg(str(repository / "configs/DigitScenes/ml_gcn.yaml"), opts)
        Trainer(cfg).train()
        state = torch.load(tmp_path / "training/model_final.pth", weights_only=True)["model"]
        found = state["label_graph.embeddings"].numpy()
        assert np.array_equal(found, normalize_embeddings(embeddings, norm))


def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    out = capsys.readouterr().out
    for part in ("--kind scores\n", "MODEL.LABEL_EMBEDDINGS.DIM 20\n", "DATASETS.CUSTOM.TRAIN"):
        assert part in out


# ------------------------------------------------------------------------------------------ errors


def fails(result):
    """The last line on stderr of a command that fails; before it there may be what was logged."""
    status, out, err = result
    assert status == 1
    assert not out
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("build_label_embeddings: ")
    return line


def test_errors_are_one_line(main, trained, custom, tmp_path):
    arguments, *_ = trained(custom)
    kind = ["--kind", "scores"]
    assert "SOLVER.NO_SUCH_KEY" in fails(main(*arguments, *kind, "SOLVER.NO_SUCH_KEY", 1))
    assert "MODEL.WEIGHTS is empty" in fails(main(*arguments, *kind, "--weights", ""))
    none = tmp_path / "none.pth"
    assert str(none) in fails(main(*arguments, *kind, "--weights", none))
    assert "none.yaml" in fails(main(*arguments, *kind, "--config-file", tmp_path / "none.yaml"))
    bias = ["MODEL.LABEL_GCN.BIAS", "True"]
    assert "lacks 1 of the model's tensors" in fails(main(*arguments, *kind, *bias))
    other = ["DATASETS.CUSTOM.LABELS", "('blue','red','green')"]
    assert "same labels in another order" in fails(main(*arguments, *kind, *other))
    json_file = custom["DATASETS.CUSTOM.TRAIN"]
    test_only = ["DATASETS.CUSTOM.TRAIN", "", "DATASETS.CUSTOM.TEST", json_file]
    assert "DATASETS.TRAIN is empty" in fails(main(*arguments, *kind, *test_only))
    rcnn = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    rcnn += ["MODEL.RPN.IN_FEATURES", "['res5']"]
    assert "ProposalNetwork is no multi-label recogniser" in fails(main(*arguments, *kind, *rcnn))
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("missing", ["--weights", "--kind", "--config-file"])
def test_options_that_it_takes(main, trained, custom, capsys, missing):
    arguments = [*trained(custom)[0], "--kind", "scores"]
    place = arguments.index(missing)
    with pytest.raises(SystemExit, match="2"):
        main(*arguments[:place], *arguments[place + 2 :])
    assert missing in capsys.readouterr().err


def test_an_unknown_kind_is_refused(main, trained, custom, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(*trained(custom)[0], "--kind", "pixels")
    err = capsys.readouterr().err
    assert "'pixels'" in err
    assert "features" in err


def test_weights_that_are_not_finite(main, trained, custom, tmp_path):
    arguments, *_ = trained(custom)
    weights = tmp_path / "run" / "model.pth"
    state = torch.load(weights, weights_only=True)
    state["model"]["backbone.stem.conv1.weight"].fill_(torch.nan)
    torch.save(state, weights)
    for kind in ("scores", "features"):
        line = fails(main(*arguments, "--kind", kind))
        assert "MODEL.WEIGHTS" in line
        assert "backbone.stem.conv1.weight has values that are not finite" in line


def test_images_without_any_label(main, trained, two_data_sets):
    arguments, *_ = trained(two_data_sets)
    for name in ("first", "second"):
        for record in DatasetCatalog.get(name):
            record["labels"] = []
    assert "no image of first, second has a label" in fails(main(*arguments, "--kind", "scores"))


def test_where_it_can_not_write(main, trained, custom, tmp_path, monkeypatch, tool):
    """It says so before it looks at an image."""
    monkeypatch.setattr(tool, "embed_labels", None)
    arguments = [*trained(custom)[0], "--kind", "scores", "--output"]
    (tmp_path / "folder.npz").mkdir()
    assert "folder.npz" in fails(main(*arguments, tmp_path / "folder.npz"))
    assert "must end in .npz" in fails(main(*arguments, tmp_path / "embeddings.txt"))
    image = Path(custom["DATASETS.CUSTOM.IMAGE_ROOT"]) / "000001.png"
    assert str(image) in fails(main(*arguments, image / "embeddings.npz"))


def test_a_file_is_written_all_or_not_at_all(main, trained, custom, tmp_path, monkeypatch):
    arguments = [*trained(custom)[0], "--kind"]
    output = tmp_path / "run" / "label_embeddings.npz"
    assert main(*arguments, "scores")[0] == 0
    before = output.read_bytes()

    def savez(file, **arrays):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", savez)
        assert "No space left" in fails(main(*arguments, "features"))
    assert output.read_bytes() == before
    assert main(*arguments, "features")[0] == 0
    assert read(output)["kind"] == "features"
    assert {path.name for path in output.parent.iterdir()} == {
        "label_embeddings.npz",
        "model.pth",
        "last_checkpoint",
    }
