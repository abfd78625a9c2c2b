#!/usr/bin/env python3
"""Make a checkpoint of this project of another project's weights.

FORMAT says what SOURCE is:
  torchvision  a ResNet: the backbone
  tresnet      a TResNet-M, -L or -XL, of its authors or of timm: the backbone
  detectron2   a Faster R-CNN of detectron2's model zoo: backbone and RPN of an IA-GCN model
  ml_gcn       the published ML-GCN: the whole model
  asl          the published ASL, on a TResNet: the whole model
A whole model has its labels in the order of the data set, has its config with it, and can be
evaluated; with parts the rest of a model is trained. What config keys the weights go with is
printed. A tensor that has no place in the model, or another shape than there, and a place that no
tensor comes for are an error, or with --allow-partial left alone.

Of SOURCE, tensors, numbers, strings and containers are read: nothing that a file may carry is run.

Examples:
  ML-GCN's COCO checkpoint, whose labels are sorted by name, with its own label embeddings:
    tools/convert_checkpoint.py coco_checkpoint.pth.tar --format ml_gcn --output ml_gcn.pth \\
        --embeddings coco_glove_word2vec.pkl
  ASL's:
    tools/convert_checkpoint.py MS_COCO_TRresNet_L_448_86.6.pth --format asl --output asl.pth
  evaluate it:
    tools/train_net.py --config-file configs/COCO/asl_tresnet_l.yaml --eval-only \\
        MODEL.WEIGHTS asl.pth
  a Faster R-CNN of the zoo:
    tools/convert_checkpoint.py model_final_298dad.pkl --format detectron2 --output c4.pth \\
        --config-file configs/VOC/ia_gcn_R_101.yaml MODEL.RPN.CONV_DIMS [-1]
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from ia_gcn.checkpoint import convert_torchvision_resnet
from ia_gcn.checkpoint.detectron2_zoo import (
    REGION_RES5,
    RPN,
    anchors,
    convert_detectron2,
    detectron2_settings,
    has_fpn,
)
from ia_gcn.checkpoint.matching import check_match, describe_names, match_tensors
from ia_gcn.checkpoint.ml_gcn import convert_ml_gcn, ml_gcn_settings
from ia_gcn.checkpoint.source import read_pickle, read_source, state_dict_of
from ia_gcn.checkpoint.torchvision_resnet import is_torchvision_resnet, torchvision_settings
from ia_gcn.checkpoint.tresnet import (
    BLUR,
    CLASSIFIER,
    asl_settings,
    convert_classifier,
    convert_tresnet,
    tresnet_settings,
)
from ia_gcn.data import label_embeddings
from ia_gcn.data.datasets import COCO_LABELS, VOC_LABELS
from ia_gcn.data.datasets.vg500 import read_label_file
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.io.files import check_writable, write_atomically

CONFIGS = Path(__file__).parent.parent / "configs"

SUFFIX = ".pth"

State = Dict[str, torch.Tensor]


class Conversion(NamedTuple):
    """What a format's converter made of a source."""

    cfg: CfgNode
    settings: Dict[str, Any]
    """The config keys that the weights go with."""
    tensors: State
    """Of the source, under the model's names."""
    expected: State
    """What they are to fill: of the model, or a part of it."""
    left: Sequence[str] = ()
    """Names in the source that the model has no part for."""
    fresh: Sequence[str] = ()
    """Names in the model beside those expected."""
    label_names: List[str] | None = None
    """Of a whole model."""
    notes: Sequence[str] = ()
    """What else is to be said."""


def convert(args: argparse.Namespace) -> None:
    check_arguments(args)
    content = read_source(args.source, shown(args))
    state = state_dict_of(content, shown(args))
    conversion = CONVERTERS[args.format](state, content, args)
    match = match_tensors(conversion.tensors, conversion.expected)
    print(f"{args.source}: {args.format}, {len(state)} tensors")
    parts = {
        "taken": [name for name in conversion.tensors if name in match.taken],
        "left in the file": conversion.left,
        "unmatched in the file": match.unmatched,
        "misshaped": match.misshaped,
        "missing": match.missing,
        "fresh in the model": conversion.fresh,
    }
    print("\n".join(describe_names(*part) for part in parts.items() if part[1]))
    print("\n".join([*conversion.notes, describe_settings(conversion.settings)]), flush=True)
    if not args.allow_partial:
        try:
            check_match(match, shown(args))
        except InputError as error:
            raise InputError(f"{error}{advice(conversion)}; --allow-partial: the rest") from None
    result = {"model": match.taken}
    if conversion.label_names is not None:
        # Where it ran is no concern of those who get it.
        conversion.cfg.MODEL.DEVICE = get_cfg().MODEL.DEVICE
        result.update(label_names=conversion.label_names, config=conversion.cfg.dump())
    with write_atomically(args.output) as file:
        torch.save(result, file)
    print(f"{args.output}: {', '.join(result)}")


# -------------------------------------------------------------------------------------- formats


def from_torchvision(state: State, content: Dict, args: argparse.Namespace) -> Conversion:
    if not is_torchvision_resnet(state):
        raise InputError(f"{shown(args)}: the names are not those of torchvision's ResNets")
    tensors = convert_torchvision_resnet(state)
    settings = of_source(args, torchvision_settings, tensors)
    cfg = load_config(args, "Base-MultiLabel.yaml", settings)
    left = [name for name in state if name.startswith("fc.")]
    return Conversion(cfg, settings, tensors, backbone_tensors(cfg), left)


def from_tresnet(state: State, content: Dict, args: argparse.Namespace) -> Conversion:
    settings = of_source(args, tresnet_settings, state)
    cfg = load_config(args, "COCO/asl_tresnet_m.yaml", settings)
    expected = backbone_tensors(cfg)
    left = [name for name in state if name.startswith(CLASSIFIER) or name.endswith(BLUR)]
    return Conversion(cfg, settings, convert_tresnet(state, expected), expected, left)


def from_asl(state: State, content: Dict, args: argparse.Namespace) -> Conversion:
    settings = of_source(args, asl_settings, state)
    # In what order ASL's labels are, its checkpoints say themselves; COCO's are its categories.
    own = content.get("idx_to_class")
    own = list(map(str, own.values())) if isinstance(own, dict) else None
    labels = source_labels(args, settings["MODEL.LABEL_HEAD.NUM_LABELS"], COCO_LABELS, own)
    label_names, order = reorder(labels)
    name = settings["MODEL.TIMM.NAME"]
    base = "asl_tresnet_m" if name == "tresnet_m" else "asl_tresnet_l"
    cfg = load_config(args, f"COCO/{base}.yaml", settings, label_names)
    expected = model_of(cfg).state_dict()
    tensors = {**convert_tresnet(state, expected), **convert_classifier(state, order)}
    left = [name for name in state if name.endswith(BLUR)]
    return Conversion(
        *(cfg, settings, tensors, expected, left),
        label_names=label_names,
        notes=[label_note(label_names, labels)],
    )


def from_ml_gcn(state: State, content: Dict, args: argparse.Namespace) -> Conversion:
    settings = of_source(args, ml_gcn_settings, state)
    # ML-GCN numbers COCO's labels by their sorted names.
    labels = source_labels(args, settings["MODEL.LABEL_HEAD.NUM_LABELS"], sorted(COCO_LABELS))
    label_names, order = reorder(labels)
    folder = "VOC" if label_names == VOC_LABELS else "COCO"
    cfg = load_config(args, f"{folder}/ml_gcn_R_101.yaml", settings, label_names)
    expected = model_of(cfg).state_dict()
    notes = [label_note(label_names, labels)]
    if args.embeddings:
        embeddings = read_embeddings(args.embeddings, len(labels))[order]
    else:
        embeddings = embeddings_by_name(cfg, label_names)
        notes.append(
            f"label embeddings: those of {cfg.MODEL.LABEL_EMBEDDINGS.SOURCE}; the weights were "
            "trained with the source's own (--embeddings), which may differ"
        )
    graph = cfg.MODEL.LABEL_GRAPH
    tensors = of_source(
        args, convert_ml_gcn, state, order, embeddings, graph.THRESHOLD, graph.REWEIGHT
    )
    return Conversion(cfg, settings, tensors, expected, label_names=label_names, notes=notes)


def from_detectron2(state: State, content: Dict, args: argparse.Namespace) -> Conversion:
    # The model is the user's: what the source goes with is said, and not set.
    cfg = load_config(args, "COCO/ia_gcn_R_101.yaml", {})
    model = model_of(cfg)
    names = model.state_dict()
    settings = of_source(args, detectron2_settings, state, names)
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


CONVERTERS: Dict[str, Callable[[State, Dict, argparse.Namespace], Conversion]] = {
    "torchvision": from_torchvision,
    "ml_gcn": from_ml_gcn,
    "asl": from_asl,
    "tresnet": from_tresnet,
    "detectron2": from_detectron2,
}


def of_source(args: argparse.Namespace, function: Callable, *values) -> Any:
    """What a function says of the source; an InputError names the file."""
    try:
        return function(*values)
    except InputError as error:
        raise InputError(f"{shown(args)}: --format {args.format}: {error}") from None


def shown(args: argparse.Namespace) -> str:
    return f"SOURCE: {args.source}"


# --------------------------------------------------------------------------------------- models


def load_config(
    args: argparse.Namespace,
    default: str,
    settings: Dict[str, Any],
    label_names: Sequence[str] | None = None,
) -> CfgNode:
    """--config-file or the default one, with the settings, and KEY VALUE upon them.

    A default config's data sets are left out where they have not the labels of a whole model.
    """
    opts = [item for pair in settings.items() for item in pair]
    own = {"COCO": COCO_LABELS, "VOC": VOC_LABELS}.get(Path(default).parent.name)
    if not args.config_file and label_names not in (None, own):
        opts += ["DATASETS.TRAIN", (), "DATASETS.TEST", ()]
    config_file = args.config_file or str(CONFIGS / default)
    return setup_cfg(config_file, ["MODEL.DEVICE", "cpu", *opts, *args.opts])


def model_of(cfg: CfgNode) -> nn.Module:
    """The config's model, with random weights: its names and shapes are looked at."""
    return build(Trainer.build_model, cfg)


def backbone_tensors(cfg: CfgNode) -> State:
    """Those of the config's backbone, under a model's names."""
    backbone = build(build_backbone, cfg)
    return {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}


def build(function: Callable[[CfgNode], nn.Module], cfg: CfgNode) -> nn.Module:
    """What a function builds of a config that asks for no weights."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS_FILE = ""
    cfg.MODEL.TIMM.PRETRAINED = False
    try:
        return function(cfg)
    except AssertionError as error:  # how detectron2 says what does not go together
        raise InputError(f"MODEL: {error}") from error


def rpn_notes(state: State, model_names: Iterable[str]) -> List[str]:
    if has_fpn(state) and not has_fpn(model_names):
        return [
            "the RPN of an FPN fits a model with MODEL.BACKBONE.NAME build_resnet_fpn_backbone; "
            "--allow-partial takes the backbone without it"
        ]
    return []


def anchor_notes(state: State, model: nn.Module) -> List[str]:
    """Whether the RPN's anchors are those that it was trained with."""
    generator = getattr(getattr(model, "proposal_generator", None), "anchor_generator", None)
    if generator is None:
        return []
    theirs, ours = anchors(state), list(generator.cell_anchors.buffers())
    keys = "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS"
    if not theirs:
        return [f"anchors: the file has none; {keys} must be the source's"]
    same = len(theirs) == len(ours) and all(
        a.shape == b.shape and torch.allclose(a.float(), b) for a, b in zip(theirs, ours)
    )
    return ["anchors: the same" if same else f"anchors: not the source's; see {keys}"]


# --------------------------------------------------------------------------------------- labels


def source_labels(
    args: argparse.Namespace, count: int, coco: Sequence[str], own: Sequence[str] | None = None
) -> List[str]:
    """The names of a source's labels, in its order: of --labels, its own, or by their number.

    Args:
        count: C, how many there are.
        coco: COCO's labels in the order that the format has them.
        own: those in the file.
    Raises:
        InputError: there is no telling, or the names are not C different ones.
    """
    known = {"coco": coco, "voc": VOC_LABELS}
    if args.labels:
        where = f"--labels {args.labels}"
        labels = known[args.labels] if args.labels in known else read_label_file(args.labels)
    elif own is not None:
        where, labels = f"{shown(args)}: idx_to_class", own
    else:
        where = shown(args)
        labels = next((names for names in known.values() if len(names) == count), None)
        if labels is None:
            raise InputError(f"{where} has {count} labels: --labels must name them, in its order")
    if len(labels) != count or len(set(labels)) != count:
        raise InputError(f"{where} names {len(set(labels))} labels, and the source has {count}")
    return list(labels)


def reorder(labels: Sequence[str]) -> tuple[List[str], List[int]]:
    """Labels in the order of the data set that has them, and where each was; of others, as is."""
    names = next((n for n in (COCO_LABELS, VOC_LABELS) if sorted(n) == sorted(labels)), labels)
    return list(names), [labels.index(name) for name in names]


def label_note(label_names: Sequence[str], labels: Sequence[str]) -> str:
    """Which labels come first in the model, and whether they did in the source."""
    order = "as in the source" if list(labels) == list(label_names) else "reordered"
    return f"labels: {', '.join(label_names[:3])} ...; {order}"


def read_embeddings(path: str, count: int) -> torch.Tensor:
    """(C, d) float32, of a .pkl, .npy or .npz file with one matrix.

    Raises:
        InputError: it can't be read, or is no matrix of finite numbers with C rows.
    """
    where = f"--embeddings {path}"
    matrix = (read_pickle if path.endswith(".pkl") else read_numpy)(path, where)
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise InputError(f"{where} is no matrix of numbers")
    if len(matrix) != count:
        raise InputError(f"{where} is of {len(matrix)} labels, and the source has {count}")
    matrix = torch.tensor(matrix.astype(np.float32))
    if not matrix.isfinite().all():
        raise InputError(f"{where}: a number is not finite")
    return matrix


def read_numpy(path: str, where: str) -> Any:
    """The array of a .npy file, or the only one of an .npz."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            arrays = [content[name] for name in content.files]
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from None
    except Exception:  # of a damaged file numpy and zipfile raise nearly anything
        raise InputError(f"{where} is damaged, or no .pkl, .npy or .npz file") from None
    if len(arrays) != 1:
        raise InputError(
            f"{where} has {len(arrays)} arrays; a file of tools/build_label_embeddings.py is "
            "given as MODEL.LABEL_EMBEDDINGS.SOURCE"
        )
    return arrays[0]


def embeddings_by_name(cfg: CfgNode, label_names: Sequence[str]) -> torch.Tensor:
    """(C, d) float32 of MODEL.LABEL_EMBEDDINGS."""
    source = cfg.MODEL.LABEL_EMBEDDINGS
    if source.SOURCE == "names":
        raise InputError(
            "MODEL.LABEL_EMBEDDINGS.SOURCE names: no weights were trained with these; give those "
            "of the source as --embeddings"
        )
    try:
        matrix = label_embeddings(
            label_names, source.SOURCE, source.DIM, source.ALIASES, source.NORM
        )
    except InputError as error:
        raise InputError(f"{error}; or give those of the source as --embeddings") from None
    return torch.tensor(matrix)


# --------------------------------------------------------------------------------------- output


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


def check_arguments(args: argparse.Namespace) -> None:
    """Say at once what can't be."""
    if args.labels and args.format not in ("ml_gcn", "asl"):
        raise InputError(f"--labels: --format {args.format} has no labels")
    if args.embeddings and args.format != "ml_gcn":
        raise InputError(f"--embeddings: --format {args.format} has no label embeddings")
    path = Path(args.output)
    if path.suffix != SUFFIX:
        raise InputError(f"--output {path}: its name must end in {SUFFIX}")
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder")
    if path.exists() and os.path.exists(args.source) and path.samefile(args.source):
        raise InputError(f"--output {path}: is SOURCE")
    check_writable(path.parent)


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a .pth file, whatever its name, or .pkl")
    parser.add_argument("--format", required=True, choices=list(CONVERTERS), help="what it is")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=f"write there ({SUFFIX} file)"
    )
    parser.add_argument(
        "--labels",
        metavar="LABELS",
        help="of ml_gcn and asl: coco, voc, or a file with a name a line, in the source's order "
        "(what the file says itself; or by their number, 80 or 20)",
    )
    parser.add_argument(
        "--embeddings",
        metavar="FILE",
        help="of ml_gcn: a .pkl, .npy or .npz with a row per label, in the source's order (by name "
        "from MODEL.LABEL_EMBEDDINGS.SOURCE)",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model")
    parser.add_argument(
        "--allow-partial", action="store_true", help="take the tensors that match, if not all do"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between SOURCE and the keys.
    args = parser.parse_intermixed_args()
    try:
        convert(args)
    except (InputError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
