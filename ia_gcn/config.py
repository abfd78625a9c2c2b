"""Every config key that ia_gcn adds to detectron2's, with its default and symbol; reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .config_rules import apply_rules, last_set
from .config_values import check_values
from .errors import InputError
from .extensions import check_extensions, import_extensions, merge_extensions

_PACKAGE = Path(__file__).parent


def read_config(config_file: str, opts: Sequence[Any] = (), imports: Sequence[str] = ()) -> CN:
    """Read a config; `ia_gcn.engine.setup_cfg` also fills in what depends on the data.

    With MODEL.TIMM.NAME, the keys that go with a timm network are filled in, see `settle_timm`.

    Args:
        config_file: path of a YAML file, see `find_config`; "" for the defaults.
        opts: alternating keys and values, which come after the file's.
        imports: modules to import first, of which the config keeps the names as IMPORTS.
    Returns:
        the config, not frozen.
    Raises:
        InputError: a file, module, key or value that can't be used, see `check_values`, or a key
            that has no effect.
    """
    import_extensions(imports)
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    defaults = cfg.clone()
    path = find_config(config_file) if config_file else ""
    try:
        # Which first reads all files within limits.
        set_at = last_set(path, opts)
        if path:
            # detectron2's default would execute code in a YAML file.
            cfg.merge_from_file(path, allow_unsafe=False)
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"--config-file {config_file}: {_one_line(error)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{' '.join(map(str, opts))}: {_one_line(error)}") from error
    check_values(cfg, defaults)
    cfg.IMPORTS = merge_extensions(imports, cfg.IMPORTS)
    check_extensions(cfg.IMPORTS)
    apply_rules(cfg, defaults, set_at)
    return cfg


def _one_line(error: Exception) -> str:
    # A KeyError's own text is its argument in quotes.
    return " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())


def find_config(path: str) -> str:
    """The path itself if the file exists, else the path of a config of ia_gcn.

    Args:
        path: of a YAML file, or such as DigitScenes/ml_gcn.yaml or configs/DigitScenes/ml_gcn.yaml.
    Raises:
        InputError: there is neither.
    """
    if PathManager.isfile(path):
        return path
    # Installed, the folder is in the package; in a checkout beside it.
    for folder in (_PACKAGE, _PACKAGE.parent):
        found = folder / "configs" / path.removeprefix("configs/")
        if found.is_file():
            return str(found)
    raise InputError(f"--config-file {path}: no such file")


def add_ia_gcn_config(cfg: CN) -> None:
    """Add ia_gcn's keys to `cfg`, a detectron2 config.

    Where a comment starts with a symbol, it is the paper's; B, C, D and d are the numbers of
    images, labels, feature channels and label embedding dimensions.
    """
    # Modules and .py files with code of the model, as given with --import. They are only named
    # here: a config or checkpoint never imports anything.
    cfg.IMPORTS = ()
    # Whether train_net.py and predict.py keep freed memory for the next step instead of returning
    # it to the system, which is faster on a CPU. It has an effect if the C library is glibc, as on
    # most Linux systems.
    cfg.KEEP_FREED_MEMORY = True
    _add_model_keys(cfg)
    _add_data_keys(cfg)
    _add_training_keys(cfg)


def _add_model_keys(cfg: CN) -> None:
    # Train another model, or the same model for other labels, from the checkpoint in MODEL.WEIGHTS:
    # tensors that fit by name and shape are loaded; the others start anew and are listed in the
    # log. Tensors that depend on the labels are loaded only if the labels are the same. False: a
    # checkpoint with other labels is refused.
    cfg.MODEL.TRANSFER = False

    # Store feature maps and weights of convolutions with the channels last in memory: faster, with
    # the same results within rounding.
    cfg.MODEL.CHANNELS_LAST = True

    # A timm network as the backbone.
    cfg.MODEL.TIMM = CN()
    # timm's name of it, for example tresnet_m. Choosing one sets MODEL.BACKBONE.NAME, MODEL.WEIGHTS
    # (""), MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT and INPUT.INTERPOLATION to the values of
    # this network, except for those that are set in the same file or after it.
    cfg.MODEL.TIMM.NAME = ""
    # Whether to start from timm's weights, which are downloaded once.
    cfg.MODEL.TIMM.PRETRAINED = True
    # A file to start from instead, with timm's names, .safetensors or .pth. If MODEL.WEIGHTS is a
    # checkpoint, it contains the backbone too, and neither of the two is read.
    cfg.MODEL.TIMM.WEIGHTS_FILE = ""

    # How pooled heads compute x, the feature of the whole image, from a feature map.
    cfg.MODEL.GLOBAL_POOLING = CN()
    # The name of MODEL.LABEL_HEAD.IN_FEATURES in version 0.1; read if that one is empty.
    cfg.MODEL.GLOBAL_POOLING.IN_FEATURE = ""
    # max (ML-GCN, IA-GCN), mean, or gem: the generalised mean (mean of v^p)^(1/p), p learned.
    cfg.MODEL.GLOBAL_POOLING.NAME = "max"
    # The initial value of p.
    cfg.MODEL.GLOBAL_POOLING.GEM_POWER = 3.0

    cfg.MODEL.LABEL_HEAD = CN()
    # A name in LABEL_HEAD_REGISTRY: LinearHead, GCNHead, AdaptiveGCNHead, CSRAHead, MLDecoderHead,
    # Query2LabelHead, CTranHead, ADDGCNHead, SSGRLHead, SALGLHead, TDRGHead, SRNHead or
    # RecurrentHead.
    cfg.MODEL.LABEL_HEAD.NAME = "GCNHead"
    # The backbone's feature maps that the head reads. (): the deepest one.
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ()
    # C: number of labels. 0: as many as the data set has; the tools fill it in.
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = 0

    # Of LinearHead.
    cfg.MODEL.LINEAR_HEAD = CN()
    # s: logits s · cos θ of the angle between x and each classifier, for AsymmetricAngularLoss.
    # OpenVINO's training extensions have 7; 0: a linear layer.
    cfg.MODEL.LINEAR_HEAD.COSINE_SCALE = 0.0

    # A_S: the statistical label correlation matrix.
    cfg.MODEL.LABEL_GRAPH = CN()
    # τ: there is an edge i → j, of weight 1, if P(j|i) is at least this; in (0, 1]. 0: no
    # threshold, the weight of an edge is its probability (ML-AGCN).
    cfg.MODEL.LABEL_GRAPH.THRESHOLD = 0.4
    # p: the sum of the weights of a label's incoming edges, beside its own weight of 1.
    cfg.MODEL.LABEL_GRAPH.REWEIGHT = 0.25
    # Whether the label head gets A_F = A_S ⊙ a aᵀ of each image (ID_LCM) or A_S; only used by
    # InstanceAwareRecognizer.
    cfg.MODEL.LABEL_GRAPH.IMAGE_DEPENDENT = True

    # H⁽⁰⁾: the label embeddings.
    cfg.MODEL.LABEL_EMBEDDINGS = CN()
    # "names": random vectors that are a function of the label's name, which need no download; or
    # the path of a file: in GloVe's text format, or an .npz of tools/build_label_embeddings.py.
    cfg.MODEL.LABEL_EMBEDDINGS.SOURCE = "names"
    # d: the dimension of that source's vectors.
    cfg.MODEL.LABEL_EMBEDDINGS.DIM = 300
    # Words to look up for a label, as "label=words": ("tvmonitor=television", ...).
    cfg.MODEL.LABEL_EMBEDDINGS.ALIASES = ()
    # none; standardize: each dimension to mean 0 and deviation 1/√d over the labels, so that a
    # label's vector has a length of about 1; whiten: to vectors of length 1 that are uncorrelated.
    cfg.MODEL.LABEL_EMBEDDINGS.NORM = "none"

    # The GCN over labels, whose output rows are the classifiers: of GCNHead and AdaptiveGCNHead.
    cfg.MODEL.LABEL_GCN = CN()
    # Output dimensions of every layer but the last, whose is D. (1024,) is ML-GCN; () is 1 layer.
    cfg.MODEL.LABEL_GCN.HIDDEN_DIMS = (1024,)
    # Of the LeakyReLU between layers; 0 makes it the ReLU of IA-GCN.
    cfg.MODEL.LABEL_GCN.NEGATIVE_SLOPE = 0.2
    # Whether ŷ_w gets a bias per label. The papers have none.
    cfg.MODEL.LABEL_GCN.BIAS = False

    # The learned label graph of ML-AGCN: A + B + C, of AdaptiveGCNHead.
    cfg.MODEL.ADAPTIVE_GCN = CN()
    # Which of A (statistics), B (attention) and C (similarity) there are, for example "AB".
    cfg.MODEL.ADAPTIVE_GCN.GRAPHS = "ABC"
    # W: a matrix for each graph (per_graph), or one for all (shared), as Eq. 3 is printed.
    cfg.MODEL.ADAPTIVE_GCN.WEIGHTS = "per_graph"
    # Of the LeakyReLU of the attention scores (Eq. 4).
    cfg.MODEL.ADAPTIVE_GCN.ATTENTION_SLOPE = 0.2
    # C: row, so that a row's absolute values sum to 1; or none, as Eq. 7 is printed, where they sum
    # to nearly C.
    cfg.MODEL.ADAPTIVE_GCN.SIMILARITY_NORM = "row"

    # Residual attention, of CSRAHead.
    cfg.MODEL.CSRA = CN()
    # T of each head, whose logits are added up; from 99 on it stands for the maximum. The paper
    # has (1,), (1, 99), (1, 2, 4, 99), (1, ..., 5, 99) and (1, ..., 7, 99).
    cfg.MODEL.CSRA.TEMPERATURES = (1.0,)
    # λ: of the attended scores beside their mean over the image.
    cfg.MODEL.CSRA.ATTENTION_WEIGHT = 0.1

    # The Transformer encoder over cells and labels, of CTranHead.
    cfg.MODEL.C_TRAN = CN()
    cfg.MODEL.C_TRAN.NUM_LAYERS = 3
    # Heads of the attention, which divide the map's channels among them.
    cfg.MODEL.C_TRAN.NUM_HEADS = 4
    # Whether the cells get an encoding of their place. The published model has none.
    cfg.MODEL.C_TRAN.POSITIONS = False

    # Convolutions over attention maps, of SRNHead.
    cfg.MODEL.SRN = CN()
    # Channels of the convolutions; the last one has four times as many.
    cfg.MODEL.SRN.HIDDEN_DIM = 512
    # G: height and width of the last one, and of the maps that it sees. ResNet's res4 has 14×14
    # cells at 224×224 pixels; maps of another size are put on this grid.
    cfg.MODEL.SRN.GRID_SIZE = 14

    # The attention LSTM, of RecurrentHead.
    cfg.MODEL.RECURRENT = CN()
    # T: how often it looks at the image. RNN-Attention has 5.
    cfg.MODEL.RECURRENT.STEPS = 5
    # M: dimension of the LSTM.
    cfg.MODEL.RECURRENT.HIDDEN_DIM = 512
    # Dimension of the labels' embeddings, which are their classifiers.
    cfg.MODEL.RECURRENT.EMBEDDING_DIM = 256
    # Whether it is told, in each step, which label it has said before, as in CNN-RNN.
    cfg.MODEL.RECURRENT.LABEL_FEEDBACK = False
    # P: how many sequences of labels the beam search keeps, with LABEL_FEEDBACK.
    cfg.MODEL.RECURRENT.BEAM_SIZE = 1

    # Queries that attend to the feature map, each with the classifiers of a group of labels: of
    # MLDecoderHead.
    cfg.MODEL.ML_DECODER = CN()
    # K: number of groups, and of queries; as many as there are labels if that is less.
    cfg.MODEL.ML_DECODER.NUM_GROUPS = 100
    # random: fixed random vectors, as published; learned; or words: made of the label embeddings,
    # one for each label.
    cfg.MODEL.ML_DECODER.QUERIES = "random"
    # group: each label has a classifier; shared: all have one, which takes queries of words. It
    # scores labels that it was not trained on, see TEST.LABELS.
    cfg.MODEL.ML_DECODER.READOUT = "group"
    # Channels of queries and tokens, a multiple of 4 and of the number of attention heads.
    cfg.MODEL.ML_DECODER.DIM = 768
    cfg.MODEL.ML_DECODER.NUM_HEADS = 8
    # Channels between the two linear layers.
    cfg.MODEL.ML_DECODER.FFN_DIM = 2048
    cfg.MODEL.ML_DECODER.DROPOUT = 0.1

    # A Transformer with a query for each label, of Query2LabelHead.
    cfg.MODEL.QUERY2LABEL = CN()
    # Layers in which the cells of the feature map attend to each other, with their places.
    cfg.MODEL.QUERY2LABEL.ENCODER_LAYERS = 1
    # Layers in which the queries attend to the cells.
    cfg.MODEL.QUERY2LABEL.DECODER_LAYERS = 2
    # Whether the queries attend to each other, too. They don't in the published models.
    cfg.MODEL.QUERY2LABEL.SELF_ATTENTION = False
    # Channels, a multiple of 4 and of the number of attention heads, with a linear layer before the
    # encoder. 0: those of the feature map, and no such layer.
    cfg.MODEL.QUERY2LABEL.DIM = 0
    cfg.MODEL.QUERY2LABEL.NUM_HEADS = 4
    # Channels between the two linear layers of each layer.
    cfg.MODEL.QUERY2LABEL.FFN_DIM = 8192
    cfg.MODEL.QUERY2LABEL.DROPOUT = 0.1

    # Graphs over nodes of the labels, of ADDGCNHead.
    cfg.MODEL.ADD_GCN = CN()
    # K: the dimension of a label's node.
    cfg.MODEL.ADD_GCN.NODE_DIM = 1024
    # Whether there is the graph that all images share, and that of each image.
    cfg.MODEL.ADD_GCN.STATIC_GRAPH = True
    cfg.MODEL.ADD_GCN.DYNAMIC_GRAPH = True

    # The gated graph over nodes of the labels, of SSGRLHead.
    cfg.MODEL.SSGRL = CN()
    # Dimension of the products of a cell and a label's embedding, by which the label attends.
    cfg.MODEL.SSGRL.HIDDEN_DIM = 1024
    # Dimension of f, from which a label is scored.
    cfg.MODEL.SSGRL.OUTPUT_DIM = 2048
    # T: steps of the gated graph.
    cfg.MODEL.SSGRL.STEPS = 3
    # Whether a second graph makes the classifiers (KGGR).
    cfg.MODEL.SSGRL.CLASSIFIER_GRAPH = False

    # Scenes and their graphs, of SALGLHead.
    cfg.MODEL.SALGL = CN()
    # Of the encoder layer: heads, channels between its two linear layers, dropout, and whether the
    # places of the cells are added.
    cfg.MODEL.SALGL.NUM_HEADS = 8
    cfg.MODEL.SALGL.FFN_DIM = 2048
    cfg.MODEL.SALGL.DROPOUT = 0.1
    cfg.MODEL.SALGL.POSITIONS = False
    # Dimension of the products of a cell and a label's embedding, by which the label attends.
    cfg.MODEL.SALGL.HIDDEN_DIM = 1024
    # S
    cfg.MODEL.SALGL.NUM_SCENES = 4
    # Whether an image is of all scenes, weighted by their probabilities; else of the likeliest.
    cfg.MODEL.SALGL.SOFT_SCENES = False
    # Whether a scene's graph has P(i|i) = 1, else 0; and whether its rows are divided by their sum.
    cfg.MODEL.SALGL.SELF_EDGES = True
    cfg.MODEL.SALGL.NORMALIZE = False
    # Steps of the gated graph; 0: none. Whether messages go against the edges, too.
    cfg.MODEL.SALGL.STEPS = 3
    cfg.MODEL.SALGL.BOTH_DIRECTIONS = False

    # Three maps, an encoder and a graph over nodes of the labels, of TDRGHead.
    cfg.MODEL.TDRG = CN()
    # Channels of the three maps, and of each half of a label's node.
    cfg.MODEL.TDRG.DIM = 512
    # Of the encoder, the same for the three maps.
    cfg.MODEL.TDRG.LAYERS = 3
    cfg.MODEL.TDRG.NUM_HEADS = 4
    cfg.MODEL.TDRG.FFN_DIM = 2048
    # The share of a label's cells of which the mean is its auxiliary score.
    cfg.MODEL.TDRG.TOP_SHARE = 0.05
    # Of the structural logits; the rest is that of the graph's.
    cfg.MODEL.TDRG.STRUCTURE_WEIGHT = 0.7
    # What a cell attends to: image, the cells of its image; batch, the same cell of the other
    # images. The latter is what the published code computes and its weights were trained with. An
    # image's scores then depend on its batch, and training is refused.
    cfg.MODEL.TDRG.ATTENTION = "image"

    # P(label | other labels), which a recogniser's logits are combined with.
    cfg.MODEL.LABEL_PRIOR = CN()
    # PairwisePrior: a regression of each label on the others; ThemePrior: a mixture of themes; "":
    # none. tools/fit_label_prior.py adds one to a checkpoint and sets these keys.
    cfg.MODEL.LABEL_PRIOR.NAME = ""
    # Whether it is trained along, from a fit to the training labels on. A training needs True.
    cfg.MODEL.LABEL_PRIOR.TRAINED = False
    # In such a training, the share of the labels whose evidence is hidden at random.
    cfg.MODEL.LABEL_PRIOR.HIDDEN_EVIDENCE = 0.5
    # K: of ThemePrior.
    cfg.MODEL.LABEL_PRIOR.NUM_THEMES = 64
    # Of PairwisePrior: how many other labels each one is regressed on; 0: all.
    cfg.MODEL.LABEL_PRIOR.NUM_NEIGHBORS = 0
    # Steps of mean field, of PairwisePrior.
    cfg.MODEL.LABEL_PRIOR.STEPS = 15

    # The region branch of InstanceAwareRecognizer, beside MODEL.PROPOSAL_GENERATOR, MODEL.RPN,
    # MODEL.ROI_HEADS and the pooler's keys in MODEL.ROI_BOX_HEAD, which are detectron2's.
    cfg.MODEL.REGION_BRANCH = CN()
    # N: regions of an image, the best by objectness. Fewer may be found.
    cfg.MODEL.REGION_BRANCH.NUM_REGIONS = 40
    # Whether every region goes through a res5 stage of its own, as in Faster R-CNN C4; needs
    # MODEL.ROI_HEADS.IN_FEATURES ["res4"] and a POOLER_RESOLUTION of 14.
    cfg.MODEL.REGION_BRANCH.RES5 = False
    # z: whether variational inference weighs the regions (Var_Inf); else z = 1.
    cfg.MODEL.REGION_BRANCH.VARIATIONAL = True
    # µ₀: mean of the prior N(µ₀, 1) of z, and initial value of zµ. 0 in the paper; with 1, a region
    # whose z is the prior's mean keeps its features.
    cfg.MODEL.REGION_BRANCH.PRIOR_MEAN = 0.0
    # z in evaluation: 0 for zµ; else the number of draws over which the logits are averaged, the
    # same draws for every image.
    cfg.MODEL.REGION_BRANCH.EVAL_SAMPLES = 0
    # Whether the RPN's weights stay as they were loaded. No boxes are needed then; training the RPN
    # needs INPUT.WITH_BOXES.
    cfg.MODEL.RPN.FROZEN = False

    # ŷ_r: the GCN over the regions' scores of the labels.
    cfg.MODEL.REGION_GCN = CN()
    # Its nodes, labels or regions: the two readings of Eq. 10.
    cfg.MODEL.REGION_GCN.READING = "labels"
    # image_dependent: A_F; individual: A_I = a aᵀ.
    cfg.MODEL.REGION_GCN.LCM = "image_dependent"
    # Output dimensions of its layers. A linear layer to C scores follows.
    cfg.MODEL.REGION_GCN.HIDDEN_DIMS = (256, 512, 1024, 2048)

    cfg.MODEL.FUSION = CN()
    # λ of ŷ_f = λ ŷ_w + (1 - λ) ŷ_r. 1: there is no region GCN; 0: there is no label head.
    cfg.MODEL.FUSION.GLOBAL_WEIGHT = 0.8

    cfg.MODEL.LOSS = CN()
    # A name in MULTI_LABEL_LOSS_REGISTRY: MultiLabelBCE, AsymmetricLoss, AsymmetricAngularLoss; for
    # labels that are not all known, AssumeNegativeLoss, ExpectedPositiveLoss, LargeLoss, HillLoss,
    # SPLCLoss or SelectiveLoss; for rare ones, DistributionBalancedLoss.
    cfg.MODEL.LOSS.NAME = "MultiLabelBCE"
    # γ+, γ-: focusing exponents for labels that are present and absent. AAM has 0 and 1,
    # SelectiveLoss 0 and 1 to 3.
    cfg.MODEL.LOSS.GAMMA_POS = 0.0
    cfg.MODEL.LOSS.GAMMA_NEG = 4.0
    # m: is subtracted from an absent label's probability, which is then at least 0. SelectiveLoss
    # was published with 0.
    cfg.MODEL.LOSS.CLIP = 0.05
    # Whether the focusing of AsymmetricLoss has a gradient; the published training has none.
    cfg.MODEL.LOSS.FOCUSING_GRADIENT = False
    # k: weight of the labels that are present in AsymmetricAngularLoss; 1 - k of those absent.
    cfg.MODEL.LOSS.POSITIVE_WEIGHT = 0.8
    # Where ExpectedPositiveLoss, SelectiveLoss and DistributionBalancedLoss have the labels'
    # frequencies from. "": counted where a label is known, in the training set; or a
    # predictions.npz of the training images, whose scores are added up.
    cfg.MODEL.LOSS.LABEL_COUNTS = ""
    _add_loss_keys(cfg)
    # Of a head's auxiliary losses, as "name=weight"; 1 for those not named.
    cfg.MODEL.LOSS.AUX_WEIGHTS = ()
    # Of the KL divergence of z from its prior; 1 in the paper.
    cfg.MODEL.LOSS.KL_WEIGHT = 1.0
    # Of a BCE on a, the regions' rough scores of the whole image; the paper has none.
    cfg.MODEL.LOSS.ROUGH_SCORE_WEIGHT = 0.0


def _add_loss_keys(cfg: CN) -> None:
    # BCE in which unknown labels are absent: AN, WAN and AN-LS, of AssumeNegativeLoss.
    cfg.MODEL.LOSS.ASSUME_NEGATIVE = CN()
    # γ: weight of a label that is unknown. 1: AN; 0: 1 / (C - 1), WAN.
    cfg.MODEL.LOSS.ASSUME_NEGATIVE.UNKNOWN_WEIGHT = 1.0
    # How likely a target is wrong; AN-LS has 0.1.
    cfg.MODEL.LOSS.ASSUME_NEGATIVE.SMOOTHING = 0.0

    # BCE of known labels and a penalty on the number of labels: EPR, of ExpectedPositiveLoss.
    cfg.MODEL.LOSS.EXPECTED_POSITIVE = CN()
    # k: labels of an image, on average. 0: from the labels' frequencies.
    cfg.MODEL.LOSS.EXPECTED_POSITIVE.NUM_LABELS = 0.0

    # BCE in which unknown labels are absent, but for those with a large loss: of LargeLoss.
    cfg.MODEL.LOSS.LARGE_LOSS = CN()
    # LL-R: these are left out; LL-Ct: they are present ones; LL-Cp: they are from then on.
    cfg.MODEL.LOSS.LARGE_LOSS.SCHEME = "LL-R"
    # Δ_rel: by which share of all labels there are more of them in each epoch after the first; with
    # LL-Cp, their share in each of these epochs. The paper tried 0.001 to 0.005.
    cfg.MODEL.LOSS.LARGE_LOSS.RATE = 0.002

    # Of HillLoss.
    cfg.MODEL.LOSS.HILL = CN()
    # λ of (λ - p) p², the loss of labels that are not present.
    cfg.MODEL.LOSS.HILL.LAMBDA = 1.5
    # m: subtracted from the logits of present labels, and γ: their focusing exponent.
    cfg.MODEL.LOSS.HILL.MARGIN = 1.0
    cfg.MODEL.LOSS.HILL.GAMMA = 2.0

    # Unknown labels are present where the model finds them: of SPLCLoss.
    cfg.MODEL.LOSS.SPLC = CN()
    # τ: above this probability.
    cfg.MODEL.LOSS.SPLC.THRESHOLD = 0.6
    # From this epoch on, counted from 0.
    cfg.MODEL.LOSS.SPLC.START_EPOCH = 1
    # m: subtracted from the logits of present labels, and γ: focusing exponent of all.
    cfg.MODEL.LOSS.SPLC.MARGIN = 1.0
    cfg.MODEL.LOSS.SPLC.GAMMA = 2.0

    # Unknown labels are absent ones or ignored, label by label: of SelectiveLoss.
    cfg.MODEL.LOSS.SELECTIVE = CN()
    # γu: focusing exponent for unknown labels.
    cfg.MODEL.LOSS.SELECTIVE.GAMMA_UNKNOWN = 4.0
    # K: the likeliest unknown labels of an image are ignored.
    cfg.MODEL.LOSS.SELECTIVE.TOP_K = 5
    # η: an unknown label is ignored if its frequency is above this.
    cfg.MODEL.LOSS.SELECTIVE.PRIOR_THRESHOLD = 0.05

    # BCE with weights that balance the labels, of DistributionBalancedLoss; the paper's for COCO.
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED = CN()
    # α, β and µ of the weight α + σ(β (r - µ)). VOC: µ = 0.3.
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED.ALPHA = 0.1
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED.BETA = 10.0
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED.MU = 0.2
    # κ: of the labels' log-odds, by which logits are shifted.
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED.KAPPA = 0.05
    # λ: scale of absent labels' logits, and divisor of their loss. VOC: 5.
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED.LAMBDA = 2.0
    # γ: focusing exponent; 0: none.
    cfg.MODEL.LOSS.DISTRIBUTION_BALANCED.GAMMA = 2.0


def _add_data_keys(cfg: CN) -> None:
    # Your own data, without Python: given TRAIN or TEST, the tools register custom_train and
    # custom_test and use them as DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.CUSTOM = CN()
    # COCO-format JSON; CSV with a line "file,label;label;..." per image, !label being one that is
    # known to be absent; or the index (.jsonl) of tar shards, see tools/make_shards.py.
    cfg.DATASETS.CUSTOM.TRAIN = ""
    cfg.DATASETS.CUSTOM.TEST = ""
    # Folder that the files' image names are relative to. Of shards: where they are, if not beside
    # their index.
    cfg.DATASETS.CUSTOM.IMAGE_ROOT = ""
    # The same for TEST where it is another folder.
    cfg.DATASETS.CUSTOM.TEST_IMAGE_ROOT = ""
    # What a label is that a file doesn't name for an image, in TRAIN and in TEST: absent, or
    # unknown, so that it counts nowhere. In images with LVIS's neg_category_ids it is always
    # unknown; shards say it of each image themselves.
    cfg.DATASETS.CUSTOM.UNLABELED = "absent"
    # With TRAIN alone, this share of its images, stratified by label, is held out as custom_test;
    # 0.0: none, so that there is no evaluation.
    cfg.DATASETS.CUSTOM.HOLD_OUT = 0.2
    # Another seed holds out other images. It is not SEED, so that trainings with several seeds
    # are measured on the same images.
    cfg.DATASETS.CUSTOM.HOLD_OUT_SEED = 0
    # Filled in by the tools: a hash of the images that are held out, by which a
    # checkpoint that was trained on them is recognised.
    cfg.DATASETS.CUSTOM.SPLIT = ""
    # Labels in the order of the model's outputs. (): a JSON's categories by id; those of shards;
    # all labels that a CSV names, sorted; with --eval-only and a CSV for TEST, the checkpoint's.
    cfg.DATASETS.CUSTOM.LABELS = ()
    # What ignored labels (VOC's difficult objects) and unknown ones are in training: nowhere: still
    # ignored; absent; or present, but for the unknown ones. TEST.IGNORED_LABELS is for evaluation.
    cfg.DATASETS.IGNORED_LABELS = "nowhere"
    # An image or a tar shard that can't be read is skipped with a warning; more such files than
    # this in a process are an error.
    cfg.DATASETS.MAX_UNREADABLE = 10
    # Evaluate (--eval-only) on data whose labels are the checkpoint's in another order, or some of
    # them: the model's outputs are selected by the names of their labels. False: such data is
    # refused.
    cfg.DATASETS.MATCH_LABELS_BY_NAME = False

    # Training on tar shards: how many shards of a stream are mixed, which is how many of them are
    # read at a time. 0: images are shuffled as loose files are; all shards are read all the time.
    cfg.DATALOADER.SHARD_WINDOW = 4
    # How many streams take turns to give the next image; each has its own shards. To be a multiple
    # of the number of processes: else several read the same shards. The order of the images depends
    # on it, and not on the number of processes.
    cfg.DATALOADER.SHARD_STREAMS = 8

    # Height and width of the model's input, in pixels.
    cfg.INPUT.IMAGE_SIZE = (448, 448)
    # Share of each side of an image that the test view keeps: the image is resized to IMAGE_SIZE
    # divided by it, and of that the centre is taken. 1: the whole image.
    cfg.INPUT.CENTER_CROP = 1.0
    # How images are resized, bilinear or bicubic: Pillow's, which takes the mean over what becomes
    # a pixel. MODEL.TIMM.NAME sets that of the network's own training.
    cfg.INPUT.INTERPOLATION = "bilinear"
    # Training view: a crop whose height and width are those of BASE times one of SCALES each, at
    # most MAX_DISTORT places apart in that list, warped to IMAGE_SIZE.
    cfg.INPUT.MULTI_SCALE_CROP = CN()
    cfg.INPUT.MULTI_SCALE_CROP.ENABLED = True
    cfg.INPUT.MULTI_SCALE_CROP.SCALES = (1.0, 0.875, 0.75, 0.66)
    cfg.INPUT.MULTI_SCALE_CROP.MAX_DISTORT = 2
    # square: one of the image's shorter side (ML-GCN); image: the image itself, as if it were
    # warped to a square before (ADD-GCN, TDRG, SSGRL, C-Tran).
    cfg.INPUT.MULTI_SCALE_CROP.BASE = "square"
    # Instead of it, torchvision's RandomResizedCrop: the least area of the crop as a share of the
    # image's; 0: none.
    cfg.INPUT.RANDOM_RESIZED_CROP = 0.0
    # Side of a square of one random colour that covers part of a training image, as a share of the
    # image's sides; 0: none. It may extend beyond the border.
    cfg.INPUT.CUTOUT = 0.0
    # The number of RandAugment operations (torchvision's) on a training image; 0: none. They do not
    # transform boxes, so that INPUT.WITH_BOXES must be False.
    cfg.INPUT.RAND_AUGMENT_OPS = 0
    # How strong they are, 0 to 30.
    cfg.INPUT.RAND_AUGMENT_MAGNITUDE = 9
    # Label-mask training: the largest share of its labels that a model is told of a training image,
    # in [0, 1]. Their number is uniform from 0 to that share of C, and the loss is that of the
    # others. C-Tran has 0.75; 0: none is known. For label heads that make use of known labels.
    cfg.INPUT.KNOWN_LABELS = 0.0
    # Whether the mapper returns the boxes, as detectron2's `instances`.
    cfg.INPUT.WITH_BOXES = False


def _add_training_keys(cfg: CN) -> None:
    # SGD, Adam or AdamW.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # The backbone's learning rate as a multiple of BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # With AMP.ENABLED, detectron2's key for mixed precision: fp16 (on a GPU alone; the loss is
    # scaled), bf16, or auto. auto: fp16 on a GPU; bf16 on a CPU where that is faster, which needs a
    # processor with AMX or AVX512-BF16 and a network without depthwise convolutions, else none.
    cfg.SOLVER.AMP.DTYPE = "auto"
    # Gradient accumulation: the number of parts of a batch that pass the network one after the
    # other, with one step of the optimizer. Less memory, and the same gradient except for batch
    # norms.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Decay of an EMA of the weights, which is evaluated and kept in the checkpoints beside the
    # weights; 0: none. The published training has 0.9997.
    cfg.SOLVER.EMA_DECAY = 0.0
    # With LR_SCHEDULER_NAME "OneCycleLR": the share of the training in which the rate rises.
    cfg.SOLVER.ONE_CYCLE_RISE = 0.2
    # Epochs instead of iterations: where not 0 or (), these take the place of MAX_ITER, STEPS,
    # CHECKPOINT_PERIOD and TEST.EVAL_PERIOD. An epoch is as many iterations as it takes to see as
    # many images as the training set has, also where some are repeated (DATALOADER.SAMPLER_TRAIN
    # "RepeatFactorTrainingSampler").
    cfg.SOLVER.MAX_EPOCHS = 0
    cfg.SOLVER.STEP_EPOCHS = ()
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0
    cfg.TEST.EVAL_EPOCHS = 0
    # Images per batch and process in evaluation.
    cfg.TEST.IMS_PER_BATCH = 16
    # A label counts as predicted from this probability on (CP, CR, CF1, OP, OR, OF1).
    cfg.TEST.THRESHOLD = 0.5
    # k: the same six figures with at most the k highest labels of an image. 0: leave them out.
    cfg.TEST.TOP_K = 3
    # A file with a label a line: score these in place of the labels that the checkpoint was trained
    # on, with --eval-only and in prediction (zero-shot). It takes a head with a shared readout, see
    # MODEL.ML_DECODER.READOUT, and embeddings of the labels in MODEL.LABEL_EMBEDDINGS.SOURCE.
    cfg.TEST.LABELS = ""
    # Evaluate (--eval-only) the EMA of the weights that a checkpoint contains.
    cfg.TEST.EMA = False
    # Evaluate (--eval-only) with batch norms folded into their convolutions and channels last in
    # memory: faster, with the same scores within rounding.
    cfg.TEST.OPTIMIZE_MODEL = False
    # The backbone's precision with --eval-only: fp32, bf16, or auto: bf16 where the processor
    # or GPU has instructions for it. Heads stay in fp32; bf16 changes scores a little.
    cfg.TEST.PRECISION = "fp32"
    # Write report.html, a page for a browser, and per_label.csv beside metrics.json: with
    # --eval-only and at the last evaluation of a training.
    cfg.TEST.REPORT = True
    # MiB of scores and targets, 5 bytes for each label of an image, that all processes of an
    # evaluation together keep in memory. What is more is kept in files in OUTPUT_DIR, which all
    # machines must share, and measured from there: the same figures, in memory that grows with the
    # images and with the labels but not with both multiplied, and a predictions.npz that is not
    # compressed.
    cfg.TEST.MEMORY_LIMIT = 1024
    # With TEST.AUG.ENABLED, detectron2's, --eval-only takes the mean of the logits over views of
    # each image: at INPUT.IMAGE_SIZE times each of these, from the file, and with TEST.AUG.FLIP
    # each of them mirrored too. detectron2's MIN_SIZES and MAX_SIZE have no effect.
    cfg.TEST.AUG.SCALES = (1.0,)
    # AP: all_points; envelope (VOC 2012): a positive counts with the highest precision that is
    # reached at its recall or more; eleven_points (VOC 2007).
    cfg.TEST.AP = "all_points"
    # The name of TEST.AP "eleven_points" in version 0.1; read if that one is all_points.
    cfg.TEST.ELEVEN_POINT_AP = False
    # CF1: of_means: 2 CP CR / (CP + CR); mean_of_labels: the mean of the labels' F1.
    cfg.TEST.CF1 = "of_means"
    # Whether the TEST.TOP_K highest labels of an image count as predicted below the threshold too.
    cfg.TEST.FORCED_TOP_K = False
    # mAP of frequent, middle and rare labels: a label with at most the first number of training
    # images is rare, with at most the second one middle. LVIS has (10, 100), VOC-MLT and COCO-MLT
    # (19, 100). (): thirds of the labels. A checkpoint knows the numbers of its training; without
    # them, for example after a conversion, thirds by the test images.
    cfg.TEST.FREQUENCY_GROUPS = ()
    # Where ignored (VOC's difficult objects) and unknown labels count, as absent ones: nowhere,
    # in_f1 (in all measures but AP and mAP), or everywhere.
    cfg.TEST.IGNORED_LABELS = "nowhere"
    # The share of each test image's labels that the model is told, in [0, 1]; the others are
    # measured. 0: none.
    cfg.TEST.KNOWN_LABELS = 0.0
    # Which ones these are follows from this and the image's id. It is not SEED, so that trainings
    # with several seeds are measured on the same labels.
    cfg.TEST.KNOWN_LABELS_SEED = 0
    # Whether these count, with the model's own scores, in all measures but AP and mAP, as in
    # C-Tran's code: a model that makes use of them is then measured on what it was told.
    cfg.TEST.KNOWN_LABELS_IN_F1 = False
    # Leave out test images without a label; DATALOADER.FILTER_EMPTY_ANNOTATIONS is for training.
    cfg.TEST.FILTER_EMPTY_ANNOTATIONS = False
