from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ia_gcn import add_ia_gcn_config, config
from ia_gcn.data.dataset_mapper import build_augmentation
from ia_gcn.data.datasets import VOC_LABELS
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("configs/**/*.yaml")
    if not path.name.startswith("Base-") and path.parent.name != "ablations"
)
IA_GCN_ROWS = ["ia_gcn", "id_lcm_var_inf", "id_lcm", "com_sco_only", "base_com_sco"]
PAPER_RECIPES = [
    f"configs/{data}/{name}.yaml"
    for data in ("COCO", "VOC")
    for name in ("ml_gcn_R_101", "resnet101", *(f"{row}_R_101" for row in IA_GCN_ROWS))
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(config_file, *opts):
    """The config, but for timm's weights, which would be downloaded, and labels of a user's own."""
    if config_file.startswith("configs/Custom/"):
        opts = ("MODEL.LABEL_HEAD.NUM_LABELS", 5, *opts)
    return setup_cfg(config_file, ["MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", False, *opts])


def fill_at_random(graph):
    if not graph.has_statistics:
        return graph.fill(None, None, torch.randn_like(graph.embeddings))
    num_labels = len(graph.label_counts)
    presence = torch.rand(100, num_labels).lt(0.3).long()
    pair_counts = presence.T @ presence
    graph.fill(pair_counts.diag(), pair_counts, torch.randn_like(graph.embeddings))


def make_batch(num_labels, size=64, batch=2):
    boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0]]))
    return [
        {
            "image": torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
            "labels": torch.randint(0, 2, (num_labels,)).float(),
            "label_states": torch.randint(-1, 2, (num_labels,)).float(),
            "file_name": f"{i}.png",
            "instances": Instances((size, size), gt_boxes=boxes),
        }
        for i in range(batch)
    ]


def test_there_are_configs():
    assert set(PAPER_RECIPES) < set(CONFIGS)


# In the quick tests, one network of each size.
QUICK = ("configs/COCO/ia_gcn_plus_R_101.yaml", "configs/Custom/", "configs/DigitScenes/")


@pytest.mark.parametrize(
    "config_file",
    [
        pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_config_takes_a_training_step(config_file):
    torch.manual_seed(0)
    cfg = load(config_file)
    model = build_model(cfg).train()
    if model.label_graph is not None:
        graph = model.label_graph
        fill_at_random(graph)
    if model.label_prior is not None:
        # Themes that are all alike have no gradient apart.
        torch.nn.init.normal_(model.label_prior.label_logits)
    heads = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("backbone")
    }
    before = {name: parameter.clone() for name, parameter in heads.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EventStorage():
        if "salgl" in config_file:
            # Its first graphs are those of the first batch.
            model(make_batch(cfg.MODEL.LABEL_HEAD.NUM_LABELS))
        # SSGRL halves its map, of which a single cell would be left: nothing to attend to.
        size = 128 if cfg.MODEL.LABEL_HEAD.NAME == "SSGRLHead" else 64
        loss = sum(model(make_batch(cfg.MODEL.LABEL_HEAD.NUM_LABELS, size)).values())
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    assert heads
    for name, parameter in heads.items():
        # Beside these heads the region branch changes no score, and is not trained.
        if config_file.endswith("_rpn.yaml") and name.startswith("roi_heads."):
            continue
        assert parameter.isfinite().all(), name
        # A bias before a batch norm changes nothing.
        if name == "label_head.graph.context.bias":
            continue
        # A batch norm follows, which takes it away again.
        if name == "label_head.dynamic_graph.context.bias":
            continue
        assert not parameter.equal(before[name]), name


def test_every_config_writes_to_a_folder_of_its_own():
    folders = [load(config_file).OUTPUT_DIR for config_file in CONFIGS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("config_file", PAPER_RECIPES)
def test_recipe_of_the_papers(config_file):
    cfg = load(config_file)
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.NESTEROV) == ("SGD", 0.9, False)
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == 1e-4
    assert (solver.BASE_LR, solver.BACKBONE_MULTIPLIER, solver.GAMMA) == (0.01, 0.1, 0.1)
    assert (solver.MAX_EPOCHS, tuple(solver.STEP_EPOCHS)) == (120, (30, 60, 90))
    assert solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    assert solver.WARMUP_ITERS == 0
    assert tuple(cfg.INPUT.IMAGE_SIZE) == (448, 448)
    assert cfg.INPUT.MULTI_SCALE_CROP.ENABLED
    assert cfg.MODEL.RESNETS.DEPTH == 101
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.MODEL.GLOBAL_POOLING.NAME == "max"
    # ImageNet's, of red, green and blue in that order.
    assert cfg.INPUT.FORMAT == "RGB"
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    assert mean == pytest.approx([255 * c for c in (0.485, 0.456, 0.406)])
    assert std == pytest.approx([255 * c for c in (0.229, 0.224, 0.225)])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("COCO", (80, "coco_2014_train_multilabel", "coco_2014_val_multilabel")),
        ("VOC", (20, "voc_2007_trainval_multilabel", "voc_2007_test_multilabel")),
    ],
)
def test_data_of_the_recipes(data, expected):
    for config_file in PAPER_RECIPES:
        if f"/{data}/" in config_file:
            cfg = load(config_file)
            found = (cfg.MODEL.LABEL_HEAD.NUM_LABELS, *cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
            assert found == expected


@pytest.mark.parametrize("data", ["COCO", "VOC"])
def test_ml_gcn_has_its_published_hyperparameters(data):
    cfg = load(f"configs/{data}/ml_gcn_R_101.yaml")
    assert cfg.MODEL.LABEL_HEAD.NAME == "GCNHead"
    assert (cfg.MODEL.LABEL_GRAPH.THRESHOLD, cfg.MODEL.LABEL_GRAPH.REWEIGHT) == (0.4, 0.25)
    assert tuple(cfg.MODEL.LABEL_GCN.HIDDEN_DIMS) == (1024,)
    assert cfg.MODEL.LABEL_GCN.NEGATIVE_SLOPE == 0.2
    assert cfg.MODEL.LABEL_EMBEDDINGS.DIM == 300


@pytest.mark.parametrize("row", ["COCO/ssgrl", "VOC/ssgrl", "VG500/kggr", "COCO/c_tran"])
def test_ssgrl_and_c_tran_are_tested_on_the_published_centre(row):
    cfg = load(f"configs/{row}_R_101.yaml")
    resize, crop = build_augmentation(cfg, is_train=False)
    assert tuple(resize.shape) == (640, 640)
    assert (crop.x0, crop.y0, crop.w, crop.h) == (32, 32, 576, 576)


def test_labels_of_voc_are_looked_up_by_words_that_glove_has():
    for config_file in PAPER_RECIPES:
        if "/VOC/" in config_file:
            aliases = load(config_file).MODEL.LABEL_EMBEDDINGS.ALIASES
            assert {alias.split("=")[0] for alias in aliases} <= set(VOC_LABELS)
            assert len(aliases) == 3


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_configs_for_own_images_start_from_the_weights_of_a_timm_network(size):
    cfg = setup_cfg(f"configs/Custom/{size}.yaml", ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.TIMM.PRETRAINED
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_backbone"
    assert cfg.MODEL.WEIGHTS == ""
    weights = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    assert pytest.approx([255 * value for value in weights.mean]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([255 * value for value in weights.std]) == cfg.MODEL.PIXEL_STD


@pytest.mark.parametrize("data", ["COCO", "VOC"])
def test_ia_gcn_has_the_settings_of_its_paper(data):
    for row in IA_GCN_ROWS:
        cfg = load(f"configs/{data}/{row}_R_101.yaml")
        model = cfg.MODEL
        assert model.META_ARCHITECTURE == "InstanceAwareRecognizer"
        assert (model.LABEL_GRAPH.THRESHOLD, model.LABEL_GRAPH.REWEIGHT) == (0.4, 0.25)
        assert (*model.LABEL_GCN.HIDDEN_DIMS, 2048) == (512, 1024, 2048)
        assert model.LABEL_GCN.NEGATIVE_SLOPE == 0.0
        assert tuple(model.REGION_GCN.HIDDEN_DIMS) == (256, 512, 1024, 2048)
        assert model.LABEL_EMBEDDINGS.DIM == 300
        assert model.REGION_BRANCH.NUM_REGIONS == 40
        assert model.RPN.POST_NMS_TOPK_TRAIN == model.RPN.POST_NMS_TOPK_TEST == 40
        # Off in the paper.
        assert (model.LOSS.KL_WEIGHT, model.LOSS.ROUGH_SCORE_WEIGHT) == (1.0, 0.0)
        assert (model.REGION_BRANCH.PRIOR_MEAN, model.REGION_BRANCH.EVAL_SAMPLES) == (0.0, 0)
        assert not model.LABEL_GCN.BIAS


@pytest.mark.parametrize("data", ["COCO/{}_R_101", "VOC/{}_R_101", "DigitScenes/{}"])
def test_rows_of_the_ablation_differ_in_what_they_are_called_after(data):
    def switches(row):
        model = load(f"configs/{data.format(row)}.yaml").MODEL
        return (
            model.LABEL_GRAPH.IMAGE_DEPENDENT,
            model.REGION_BRANCH.VARIATIONAL,
            model.REGION_GCN.LCM,
            model.FUSION.GLOBAL_WEIGHT,
        )

    assert switches("ia_gcn") == (True, True, "image_dependent", 0.8)
    assert switches("id_lcm_var_inf") == (True, True, "image_dependent", 1.0)
    assert switches("id_lcm") == (True, False, "image_dependent", 1.0)
    assert switches("com_sco_only")[1:] == (False, "individual", 0.0)
    assert switches("base_com_sco") == (False, False, "individual", 0.8)


ML_AGCN_ROWS = ["ml_agcn_1l", "ml_agcn_2l", "ml_agcn_1l_a", "ml_agcn_1l_ab"]
ASL_ROWS = ["asl_tresnet_m", "asl_tresnet_l", "iml_gcn_1l", "iml_gcn_2l", *ML_AGCN_ROWS]


@pytest.mark.parametrize("data", ["COCO", "VG500"])
@pytest.mark.parametrize("row", ASL_ROWS)
def test_recipe_of_asl_and_ml_agcn(data, row):
    cfg = load(f"configs/{data}/{row}.yaml")
    solver, model = cfg.SOLVER, cfg.MODEL
    assert (solver.OPTIMIZER, solver.LR_SCHEDULER_NAME) == ("Adam", "OneCycleLR")
    assert 1e-4 <= solver.BASE_LR <= 2e-4
    assert solver.ONE_CYCLE_RISE == 0.2
    assert (solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS) == (0, 0)
    assert solver.EMA_DECAY == 0.9997
    assert (cfg.INPUT.CUTOUT, cfg.INPUT.RAND_AUGMENT_OPS) == (0.5, 2)
    assert tuple(cfg.INPUT.IMAGE_SIZE) == (448, 448)
    # Red, green, blue from 0 to 1.
    assert (cfg.INPUT.FORMAT, set(model.PIXEL_MEAN), set(model.PIXEL_STD)) == ("RGB", {0}, {255})
    name = "tresnet_l" if row.endswith("_l") else "tresnet_m"
    assert name == model.TIMM.NAME
    loss = model.LOSS
    assert (loss.NAME, loss.GAMMA_POS, loss.GAMMA_NEG) == ("AsymmetricLoss", 0, 4)
    assert (loss.CLIP, loss.FOCUSING_GRADIENT) == (0.05, False)


@pytest.mark.parametrize("data", ["COCO", "VG500"])
def test_graphs_of_ml_agcn(data):
    for row in ML_AGCN_ROWS:
        model = load(f"configs/{data}/{row}.yaml").MODEL
        assert model.LABEL_HEAD.NAME == "AdaptiveGCNHead"
        assert model.LABEL_EMBEDDINGS.DIM == model.LABEL_HEAD.NUM_LABELS
        assert model.LABEL_GRAPH.THRESHOLD == 0
        assert tuple(model.LABEL_GCN.HIDDEN_DIMS) == ((1024,) if "2l" in row else ())
        graphs = {"a": "A", "ab": "AB"}.get(row[11:], "ABC")
        assert graphs == model.ADAPTIVE_GCN.GRAPHS
        assert model.ADAPTIVE_GCN.WEIGHTS == "per_graph"
        fixed = load(f"configs/{data}/{row[:10].replace('ml_agcn', 'iml_gcn')}.yaml").MODEL
        assert fixed.LABEL_HEAD.NAME == "GCNHead"
        assert fixed.LABEL_GRAPH.THRESHOLD == 0.4
        assert fixed.LABEL_GCN == model.LABEL_GCN


def test_equations_3_and_7_to_the_letter():
    model = load("configs/COCO/ml_agcn_2l_literal.yaml").MODEL
    assert (model.ADAPTIVE_GCN.WEIGHTS, model.ADAPTIVE_GCN.SIMILARITY_NORM) == ("shared", "none")
    assert model.LABEL_EMBEDDINGS.NORM == "none"


@pytest.mark.parametrize(("hidden_dims", "millions"), [("(1024,)", 44.9), ("()", 43.1)])
def test_ml_gcn_has_its_published_size(hidden_dims, millions):
    cfg = load("configs/COCO/ml_gcn_R_101.yaml", "MODEL.LABEL_GCN.HIDDEN_DIMS", hidden_dims)
    parameters = sum(parameter.numel() for parameter in build_model(cfg).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)


# setup_cfg on what can't be used


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("key", ["MODEL.LABEL_HEAD.NAEM", "SLOVER"])
def test_an_unknown_key_is_named(tmp_path, key):
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        setup_cfg("", [key, "1"])
    *parents, last = key.split(".")
    text = "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(parents))
    config_file = write(tmp_path / "typo.yaml", f"VERSION: 2\n{text}{'  ' * len(parents)}{last}: 1")
    with pytest.raises(InputError, match=r"typo\.yaml.*" + key.replace(".", r"\.")):
        setup_cfg(config_file)


@pytest.mark.parametrize("name", ["no_such.yaml", "configs"])
def test_a_missing_config_file_is_named(name):
    with pytest.raises(InputError, match=name):
        setup_cfg(name)


@pytest.mark.parametrize(
    "opts",
    [["SOLVER.MAX_EPOCHS"], ["SOLVER.MAX_EPOCHS", "many"], ["INPUT.IMAGE_SIZE", "448"]],
)
def test_values_that_do_not_fit_are_refused(opts):
    with pytest.raises(InputError, match=opts[0]):
        setup_cfg("", opts)


@pytest.mark.parametrize(
    "text",
    [
        "_BASE_: no_such_base.yaml",
        "MODEL: [",
        "MODEL",
        "",
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    with pytest.raises(InputError, match=r"broken\.yaml|no_such_base"):
        setup_cfg(write(tmp_path / "broken.yaml", text))


def test_a_config_file_runs_no_code(tmp_path):
    folder = tmp_path / "made"
    text = f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{folder}]\n"
    with pytest.raises(InputError, match=r"code\.yaml"):
        setup_cfg(write(tmp_path / "code.yaml", text))
    assert not folder.exists()


def test_options_win_over_the_file():
    assert load("configs/VOC/resnet101.yaml").SOLVER.BASE_LR == 0.01
    cfg = load("configs/VOC/resnet101.yaml", "SOLVER.BASE_LR", "0.5")
    assert cfg.SOLVER.BASE_LR == 0.5


# The comments in config.py are its reference.


def flat_keys(cfg, prefix="cfg"):
    """The dotted names of all values in a config."""
    keys = set()
    for name, value in cfg.items():
        key = f"{prefix}.{name}"
        keys |= flat_keys(value, key) if isinstance(value, type(cfg)) else {key}
    return keys


def test_every_key_has_a_comment():
    cfg = get_cfg()
    before = flat_keys(cfg)
    add_ia_gcn_config(cfg)
    added = flat_keys(cfg) - before
    commented, in_comment = set(), False
    for line in Path(config.__file__).read_text(encoding="utf-8").splitlines():
        line = line.strip()
        # A comment is for the keys below it, up to the next blank line.
        in_comment = line.startswith("#") or (in_comment and line.startswith("cfg."))
        if in_comment and " = " in line:
            commented.add(line.split(" = ")[0])
    assert added
    assert added <= commented
