"""Other projects' weights as checkpoints of this one."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from ..config import read_config
from ..data.datasets import COCO_LABELS, VOC_LABELS
from ..errors import InputError
from ..io.files import check_writable, write_atomically
from .add_gcn import MASK, add_gcn_settings, convert_add_gcn
from .c_tran import CLASSIFIER as IMAGENET_CLASSIFIER
from .c_tran import c_tran_settings, convert_c_tran
from .csra import convert_csra, csra_settings
from .detectron2_zoo import (
    REGION_RES5,
    RPN,
    anchors,
    convert_detectron2,
    detectron2_settings,
    has_fpn,
)
from .loading import build_model
from .matching import Match, check_match, describe_names, match_tensors
from .ml_decoder import convert_ml_decoder, ml_decoder_settings, ml_decoder_sizes
from .ml_gcn import convert_ml_gcn, ml_gcn_settings
from .query2label import POSITIONS, convert_query2label, query2label_settings
from .salgl import convert_salgl, salgl_settings, without_effect
from .source import read_source, state_dict_of
from .source_labels import (
    describe_order,
    embeddings_by_name,
    model_order,
    read_labels,
    read_matrix,
    source_labels,
)
from .ssgrl import WITHOUT_EFFECT, convert_ssgrl, ssgrl_settings
from .tdrg import convert_tdrg, tdrg_settings, unused
from .torchvision_resnet import (
    convert_torchvision_resnet,
    is_torchvision_resnet,
    torchvision_settings,
)
from .tresnet import (
    BLUR,
    CLASSIFIER,
    asl_settings,
    convert_classifier,
    convert_tresnet,
    tresnet_settings,
)

logger = logging.getLogger(__name__)

SUFFIX = ".pth"

State = Dict[str, torch.Tensor]


class Request(NamedTuple):
    """What is to be converted, and into which model: the arguments of `convert_checkpoint`."""

    source: str
    format: str
    config_file: str
    opts: Sequence[Any]
    imports: Sequence[str]
    labels: str
    embeddings: str
    graph: str = ""

    @property
    def shown(self) -> str:
        """The name of the source in messages."""
        return f"SOURCE: {self.source}"


class Conversion(NamedTuple):
    """What a format's converter made of a source."""

    cfg: CfgNode
    settings: Dict[str, Any]
    """The config keys that the weights go with."""
    tensors: State
    """Of the source, under the model's names."""
    expected: State
    """The tensors to fill: those of the model, or of a part of it."""
    left: Sequence[str] = ()
    """Names in the source that the model has no part for."""
    fresh: Sequence[str] = ()
    """Names in the model beside those expected."""
    label_names: List[str] | None = None
    """Of a whole model."""
    notes: Sequence[str] = ()
    """Further lines for the report."""


def convert_checkpoint(
    source: str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str],
    *,
    config_file: str = "",
    opts: Sequence[Any] = (),
    imports: Sequence[str] = (),
    labels: str = "",
    embeddings: str = "",
    graph: str = "",
    allow_partial: bool = False,
    report: Callable[[str], None] = logger.info,
) -> None:
    """Convert another project's weights to a checkpoint of this project.

    Of the source, tensors, numbers, strings and containers are read; pickled code is never
    executed. A whole model is saved with its labels, in the order of the data set, and its config.

    Args:
        source: a .pkl file, or a .pth file, whatever its name.
        format: what it is, one of CONVERTERS.
        output: the .pth file to write.
        config_file: of the model; "": one of configs/ that goes with the format.
        opts: alternating config keys and values.
        imports: modules of a user's own that the model needs.
        labels: of a whole model, coco, voc, or a file with a name a line, in the source's order;
            "": what the file says itself, or by their number, 80 or 20.
        embeddings: of ml_gcn, ssgrl, and ml_decoder with a shared readout, a .pkl, .npy or .npz
            file with a row per label, in the source's order; "": by name from
            MODEL.LABEL_EMBEDDINGS.SOURCE.
        graph: of ssgrl, such a file with a row and a column per label.
        allow_partial: save the tensors that match, if not all do.
        report: gets lines that say which tensors were matched, and which config keys the weights
            need; also if the source is then refused.
    Raises:
        InputError: an argument or file can't be used, or a tensor is unmatched, misshaped or
            missing.
        OSError: the output can't be written.
    """
    request = Request(
        *(os.fspath(source), format, config_file, opts, imports),
        *(str(labels), str(embeddings), str(graph)),
    )
    check_request(request, Path(output))
    content = read_source(request.source, request.shown)
    state = state_dict_of(content, request.shown)
    conversion = CONVERTERS[format](state, content, request)
    match = match_tensors(conversion.tensors, conversion.expected)
    report(f"{request.source}: {format}, {len(state)} tensors")
    report(describe_conversion(conversion, match))
    if not allow_partial:
        try:
            check_match(match, request.shown)
        except InputError as error:
            raise InputError(f"{error}{advice(conversion)}; --allow-partial: the rest") from None
    result = {"model": match.taken}
    if conversion.label_names is not None:
        # The device of this machine is no part of the checkpoint.
        conversion.cfg.MODEL.DEVICE = get_cfg().MODEL.DEVICE
        result.update(label_names=conversion.label_names, config=conversion.cfg.dump())
    with write_atomically(output) as file:
        torch.save(result, file)
    report(f"{os.fspath(output)}: {', '.join(result)}")


def check_request(request: Request, output: Path) -> None:
    """Refuse at once what can't be converted or written.

    Raises:
        InputError: the arguments contradict each other, or there is no such format.
        OSError: the folder of the output can't be written to.
    """
    if request.format not in CONVERTERS:
        raise InputError(f"--format {request.format}: there is {', '.join(CONVERTERS)}")
    if request.labels and request.format not in WHOLE_MODELS:
        raise InputError(f"--labels: --format {request.format} has no labels")
    if request.embeddings and request.format not in WITH_EMBEDDINGS:
        raise InputError(f"--embeddings: --format {request.format} has no label embeddings")
    if request.graph and request.format not in WITH_GRAPH:
        raise InputError(f"--graph: --format {request.format} has no graph in another file")
    if output.suffix != SUFFIX:
        raise InputError(f"--output {output}: the name must end in {SUFFIX}")
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder")
    if output.exists() and os.path.exists(request.source) and output.samefile(request.source):
        raise InputError(f"--output {output}: is SOURCE")
    check_writable(output.parent)


# -------------------------------------------------------------------------------------- formats


def from_torchvision(state: State, content: Dict, request: Request) -> Conversion:
    if not is_torchvision_resnet(state):
        raise InputError(f"{request.shown}: the names are not those of torchvision's ResNets")
    tensors = convert_torchvision_resnet(state)
    settings = of_source(request, torchvision_settings, tensors)
    cfg = model_config(request, "Base-MultiLabel.yaml", settings)
    left = [name for name in state if name.startswith("fc.")]
    return Conversion(cfg, settings, tensors, backbone_tensors(cfg), left)


def from_tresnet(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, tresnet_settings, state)
    cfg = model_config(request, "COCO/asl_tresnet_m.yaml", settings)
    expected = backbone_tensors(cfg)
    left = [name for name in state if name.startswith(CLASSIFIER) or name.endswith(BLUR)]
    return Conversion(cfg, settings, convert_tresnet(state, expected), expected, left)


def from_asl(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, asl_settings, state)
    # ASL's checkpoints contain the order of their labels; COCO's is that of its categories.
    own = names_of(content)
    label_names, order, note = label_order(request, settings, COCO_LABELS, own)
    name = settings["MODEL.TIMM.NAME"]
    base = "asl_tresnet_m" if name == "tresnet_m" else "asl_tresnet_l"
    cfg = model_config(request, f"COCO/{base}.yaml", settings, label_names)
    expected = random_model(cfg).state_dict()
    tensors = {**convert_tresnet(state, expected), **convert_classifier(state, order)}
    left = [name for name in state if name.endswith(BLUR)]
    return Conversion(
        *(cfg, settings, tensors, expected, left),
        label_names=label_names,
        notes=[note],
    )


def from_ml_decoder(state: State, content: Dict, request: Request) -> Conversion:
    count, movable = of_source(request, ml_decoder_sizes, state)
    own = names_of(content)
    if count is None:
        # A classifier that all labels share says nothing of their number.
        labels = shared_labels(request, own)
        count = len(labels)
    else:
        labels = source_labels(request.labels, count, COCO_LABELS, own, request.shown)
    label_names, order = model_order(labels) if movable else (labels, list(range(count)))
    settings = of_source(request, ml_decoder_settings, state, count)
    size = "m" if settings["MODEL.TIMM.NAME"] == "tresnet_m" else "l"
    base = default_config(f"ml_decoder_tresnet_{size}", label_names)
    cfg = model_config(request, base, settings, label_names)
    expected = random_model(cfg).state_dict()
    embeddings, notes = None, [describe_order(label_names, labels)]
    if "MODEL.LABEL_EMBEDDINGS.DIM" in settings:
        embeddings, note = embeddings_of(request, cfg, label_names, order)
        notes += note
    return Conversion(
        *(cfg, settings, convert_ml_decoder(state, expected, order, embeddings), expected),
        [name for name in state if name.endswith(BLUR)],
        label_names=label_names,
        notes=notes,
    )


def from_query2label(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, query2label_settings, state)
    label_names, order, note = label_order(request, settings)
    name = "tresnet_l" if "MODEL.TIMM.NAME" in settings else "R_101"
    base = default_config(f"query2label_{name}", label_names)
    cfg = model_config(request, base, settings, label_names)
    expected = random_model(cfg).state_dict()
    return Conversion(
        *(cfg, settings, convert_query2label(state, expected, order), expected),
        [name for name in state if name == POSITIONS or name.endswith(BLUR)],
        label_names=label_names,
        notes=[note],
    )


def from_csra(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, csra_settings, state)
    label_names, order, note = label_order(request, settings)
    cfg = model_config(request, default_config("resnet101", label_names), settings, label_names)
    weight = cfg.MODEL.CSRA.ATTENTION_WEIGHT
    return Conversion(
        *(cfg, settings, convert_csra(state, order), random_model(cfg).state_dict()),
        label_names=label_names,
        notes=[note, f"λ, which is not in the file: MODEL.CSRA.ATTENTION_WEIGHT {weight}"],
    )


def from_ml_gcn(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, ml_gcn_settings, state)
    # ML-GCN numbers COCO's labels by their sorted names.
    label_names, order, note = label_order(request, settings, sorted(COCO_LABELS))
    cfg = model_config(request, default_config("ml_gcn_R_101", label_names), settings, label_names)
    expected = random_model(cfg).state_dict()
    embeddings, notes = embeddings_of(request, cfg, label_names, order)
    graph = cfg.MODEL.LABEL_GRAPH
    tensors = of_source(
        request, convert_ml_gcn, state, order, embeddings, graph.THRESHOLD, graph.REWEIGHT
    )
    notes = [note, *notes]
    return Conversion(cfg, settings, tensors, expected, label_names=label_names, notes=notes)


def from_c_tran(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, c_tran_settings, state)
    label_names, order, note = label_order(request, settings)
    cfg = model_config(request, "COCO/c_tran_R_101.yaml", settings, label_names)
    return Conversion(
        cfg,
        settings,
        of_source(request, convert_c_tran, state, order),
        random_model(cfg).state_dict(),
        [name for name in state if name.startswith(IMAGENET_CLASSIFIER)],
        label_names=label_names,
        notes=[note],
    )


def embeddings_of(
    request: Request, cfg: CfgNode, label_names: Sequence[str], order: Sequence[int]
) -> Tuple[torch.Tensor, List[str]]:
    """The label embeddings that are given, or those of the labels' names; and notes on them."""
    if request.embeddings:
        return read_matrix("--embeddings", request.embeddings, len(order))[order], []
    return embeddings_by_name(cfg, label_names), [
        f"label embeddings: those of {cfg.MODEL.LABEL_EMBEDDINGS.SOURCE}; the weights were trained "
        "with the source's own (--embeddings), which may differ"
    ]


def from_ssgrl(state: State, content: Dict, request: Request) -> Conversion:
    if not request.graph:
        raise InputError(
            f"--graph: the weights of --format ssgrl in {request.shown} go with a graph that is in "
            "another file, such as prob_train.npy"
        )
    settings = of_source(request, ssgrl_settings, state)
    label_names, order, note = label_order(request, settings)
    cfg = model_config(request, default_config("ssgrl_R_101", label_names), settings, label_names)
    embeddings, notes = embeddings_of(request, cfg, label_names, order)
    graph = read_matrix("--graph", request.graph, len(order), columns=len(order))[order][:, order]
    return Conversion(
        cfg,
        settings,
        of_source(request, convert_ssgrl, state, order, embeddings, graph),
        random_model(cfg).state_dict(),
        [name for name in state if name in WITHOUT_EFFECT],
        label_names=label_names,
        notes=[note, *notes],
    )


def from_add_gcn(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, add_gcn_settings, state)
    # As ML-GCN's.
    label_names, order, note = label_order(request, settings, sorted(COCO_LABELS))
    cfg = model_config(request, default_config("add_gcn_R_101", label_names), settings, label_names)
    return Conversion(
        cfg,
        settings,
        of_source(request, convert_add_gcn, state, order),
        random_model(cfg).state_dict(),
        [name for name in state if name == MASK],
        label_names=label_names,
        notes=[note],
    )


def from_salgl(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, salgl_settings, state)
    label_names, order, note = label_order(request, settings)
    cfg = model_config(request, "COCO/salgl_R_101.yaml", settings, label_names)
    keys = ("NUM_HEADS", "STEPS", "SOFT_SCENES", "SELF_EDGES", "NORMALIZE")
    values = [f"MODEL.SALGL.{key} {cfg.MODEL.SALGL[key]}" for key in keys]
    return Conversion(
        cfg,
        settings,
        convert_salgl(state, order),
        random_model(cfg).state_dict(),
        without_effect(state),
        label_names=label_names,
        notes=[
            note,
            f"not in the file, but in the config.yaml beside it: {', '.join(values)}",
        ],
    )


def from_tdrg(state: State, content: Dict, request: Request) -> Conversion:
    settings = of_source(request, tdrg_settings, state)
    # As ML-GCN's.
    label_names, order, note = label_order(request, settings, sorted(COCO_LABELS))
    cfg = model_config(request, default_config("tdrg_R_101", label_names), settings, label_names)
    return Conversion(
        cfg,
        settings,
        of_source(request, convert_tdrg, state, order),
        random_model(cfg).state_dict(),
        list(filter(unused, state)),
        label_names=label_names,
        notes=[
            note,
            f"not in the file: MODEL.TDRG.NUM_HEADS {cfg.MODEL.TDRG.NUM_HEADS}",
            "with MODEL.TDRG.ATTENTION batch, as published, an image's scores depend on the "
            "others of its batch; with image they do not, and differ from the published ones",
        ],
    )


def from_detectron2(state: State, content: Dict, request: Request) -> Conversion:
    # The model is the user's: the keys of the source are reported, and not set.
    cfg = model_config(request, "COCO/ia_gcn_R_101.yaml", {})
    model = random_model(cfg)
    names = model.state_dict()
    settings = of_source(request, detectron2_settings, state, names)
    tensors = convert_detectron2(state, names)
    parts = ("backbone.", RPN, REGION_RES5)
    used = set(map(id, tensors.values()))
    return Conversion(
        cfg,
        settings,
        tensors,
        {name: tensor for name, tensor in names.items() if name.startswith(parts)},
        [name for name, tensor in state.items() if id(tensor) not in used],
        [name for name in names if not name.startswith(parts)],
        notes=[*rpn_notes(state, names), *anchor_notes(state, model)],
    )


CONVERTERS: Dict[str, Callable[[State, Dict, Request], Conversion]] = {
    "torchvision": from_torchvision,
    "ml_gcn": from_ml_gcn,
    "add_gcn": from_add_gcn,
    "ssgrl": from_ssgrl,
    "salgl": from_salgl,
    "tdrg": from_tdrg,
    "asl": from_asl,
    "csra": from_csra,
    "c_tran": from_c_tran,
    "ml_decoder": from_ml_decoder,
    "query2label": from_query2label,
    "tresnet": from_tresnet,
    "detectron2": from_detectron2,
}


# Formats with labels; of these, those whose labels have embeddings, and a graph, in other files.
WHOLE_MODELS = (
    *("ml_gcn", "asl", "csra", "ml_decoder", "query2label", "c_tran"),
    *("add_gcn", "ssgrl", "salgl", "tdrg"),
)
WITH_EMBEDDINGS = ("ml_gcn", "ml_decoder", "ssgrl")
WITH_GRAPH = ("ssgrl",)


def names_of(content: Dict) -> List[str] | None:
    """The labels that ASL's and ML-Decoder's checkpoints name, in their order."""
    own = content.get("idx_to_class")
    return list(map(str, own.values())) if isinstance(own, dict) else None


def label_order(
    request: Request,
    settings: Dict[str, Any],
    default: Sequence[str] = COCO_LABELS,
    own: List[str] | None = None,
) -> Tuple[List[str], List[int], str]:
    """The labels of a source in the data set's order, where each is in the source, and a note.

    Args:
        settings: of the source, with the number of its labels.
        default: COCO's labels in the order that its authors gave them.
        own: those that the source names itself.
    """
    count = settings["MODEL.LABEL_HEAD.NUM_LABELS"]
    labels = source_labels(request.labels, count, default, own, request.shown)
    label_names, order = model_order(labels)
    return label_names, order, describe_order(label_names, labels)


def shared_labels(request: Request, own: List[str] | None) -> List[str]:
    """The labels of a model whose readout is shared: those given, or its own."""
    if not request.labels and own is None:
        raise InputError(
            f"{request.shown}: all labels share a classifier: --labels must name those to score"
        )
    given = read_labels(request.labels, COCO_LABELS) if request.labels else own
    return source_labels(request.labels, len(given), COCO_LABELS, own, request.shown)


def of_source(request: Request, function: Callable, *values) -> Any:
    """What a function says of the source; an InputError names the file."""
    try:
        return function(*values)
    except InputError as error:
        raise InputError(f"{request.shown}: --format {request.format}: {error}") from None


# --------------------------------------------------------------------------------------- models


def default_config(name: str, label_names: Sequence[str]) -> str:
    """The config file of a name, for VOC if the labels are VOC's, else for COCO."""
    return f"{'VOC' if label_names == VOC_LABELS else 'COCO'}/{name}.yaml"


def model_config(
    request: Request,
    default: str,
    settings: Dict[str, Any],
    label_names: Sequence[str] | None = None,
) -> CfgNode:
    """The config file that was given, or the default one, with the settings, and `opts` upon them.

    A default config's data sets are left out where they have not the labels of a whole model.
    """
    opts = [item for pair in settings.items() for item in pair]
    own = {"COCO": COCO_LABELS, "VOC": VOC_LABELS}.get(Path(default).parent.name)
    if not request.config_file and label_names not in (None, own):
        opts += ["DATASETS.TRAIN", (), "DATASETS.TEST", ()]
    config_file = request.config_file or default
    cfg = read_config(config_file, ["MODEL.DEVICE", "cpu", *opts, *request.opts], request.imports)
    # The number of labels has no effect on a part of the model.
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = cfg.MODEL.LABEL_HEAD.NUM_LABELS or 1
    return cfg


def random_model(cfg: CfgNode) -> nn.Module:
    """The config's model, with random weights: its names and shapes are looked at."""
    return build_model(without_weights(cfg))


def backbone_tensors(cfg: CfgNode) -> State:
    """Those of the config's backbone, under a model's names."""
    try:
        backbone = build_backbone(without_weights(cfg))
    except AssertionError as error:  # how detectron2 says what does not go together
        raise InputError(f"MODEL: {error}") from error
    return {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}


def without_weights(cfg: CfgNode) -> CfgNode:
    """A copy of a config that asks for no weights."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS_FILE = ""
    cfg.MODEL.TIMM.PRETRAINED = False
    return cfg


# --------------------------------------------------------------------------------------- report


def describe_conversion(conversion: Conversion, match: Match) -> str:
    """Which tensors were matched, by group, and the config keys that they need."""
    parts = {
        "taken": [name for name in conversion.tensors if name in match.taken],
        "left in the file": conversion.left,
        "unmatched in the file": match.unmatched,
        "misshaped": match.misshaped,
        "missing": match.missing,
        "fresh in the model": conversion.fresh,
    }
    groups = [describe_names(*part) for part in parts.items() if part[1]]
    return "\n".join([*groups, *conversion.notes, describe_settings(conversion.settings)])


def describe_settings(settings: Dict[str, Any]) -> str:
    """A line per key, all together as a command line takes them."""
    lines = [f"  {key} {shlex.quote(str(value))}" for key, value in settings.items()]
    return "it goes with\n" + " \\\n".join(lines)


def advice(conversion: Conversion) -> str:
    """Which keys of the config are not those that the source goes with."""
    values = {key: value_of(conversion.cfg, key) for key in conversion.settings}
    wrong = [f"{key} {value}" for key, value in conversion.settings.items() if values[key] != value]
    return f"; it goes with {', '.join(wrong)}" if wrong else ""


def value_of(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def rpn_notes(state: State, model_names: Iterable[str]) -> List[str]:
    if has_fpn(state) and not has_fpn(model_names):
        return [
            "the RPN of an FPN fits a model with MODEL.BACKBONE.NAME build_resnet_fpn_backbone; "
            "--allow-partial takes the backbone without it"
        ]
    return []


def anchor_notes(state: State, model: nn.Module) -> List[str]:
    """Whether the RPN's anchors are those that it was trained with."""
    theirs, ours = anchors(state), anchors(dict(model.named_buffers()))
    if not ours:
        return []
    keys = "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS"
    if not theirs:
        return [f"anchors: the file has none; {keys} must be the source's"]
    same = len(theirs) == len(ours) and all(
        a.shape == b.shape and torch.allclose(a.float(), b) for a, b in zip(theirs, ours)
    )
    return ["anchors: the same" if same else f"anchors: not the source's; see {keys}"]
