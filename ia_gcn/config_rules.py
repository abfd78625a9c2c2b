"""Rules about keys that a user has set: settings of a timm network, keys without effect.

A value does not show whether the user has set it. So each key also gets the number of the place
where it was set: the files of a chain of _BASE_ in the order in which they are merged, then the
command line. Later places override earlier ones.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from fvcore.common.config import BASE_KEY

from .errors import InputError
from .io.inputs import open_input
from .io.plain_yaml import MAX_LENGTH, load_plain_yaml

TIMM_BACKBONE = "build_timm_backbone"


# Files that a config can be of, with all that _BASE_ names.
MAX_FILES = 100


def apply_rules(cfg: CfgNode, defaults: CfgNode, set_at: Dict[str, int]) -> None:
    """Fill in the settings of a timm network, and refuse keys that would have no effect.

    Args:
        cfg: with all keys merged; changed in place.
        defaults: the config before.
        set_at: of `last_set`.
    Raises:
        InputError: a key that was set has no effect, or timm has no such network.
    """
    settle_timm(cfg, set_at)
    check_effect(cfg, defaults, set_at)


def last_set(config_file: str, opts: Sequence[Any]) -> Dict[str, int]:
    """Where each key was set last: the number of the file, or of the command line, from 0.

    A file with all of detectron2's keys, such as the config.yaml of a training, is a resolved
    config, which does not show what was chosen: its keys are left out.

    Args:
        config_file: path of a YAML file; "" for none.
        opts: alternating keys and values of the command line.
    Raises:
        InputError: see `load_plain_yaml`; or _BASE_ leads back to a file, or to too many.
        OSError: a file can't be read.
    """
    layers: List[Set[str]] = []
    for layer in _files(config_file) if config_file else ():
        layers.append(layer)
        if len(layers) > MAX_FILES:
            raise InputError(f"_BASE_ leads to more than {MAX_FILES} files")
    complete = set(_flat_keys(get_cfg()))
    layers = [set() if layer >= complete else layer for layer in layers]
    layers.append(set(opts[0::2]))
    return {key: place for place, layer in enumerate(layers) for key in layer}


def _files(path: str, above: Tuple[str, ...] = ()) -> Iterator[Set[str]]:
    """The keys of a config file and of its bases, in the order in which detectron2 merges them.

    Args:
        above: the real paths of the files that lead to this one.
    """
    real_path = os.path.realpath(path)
    if real_path in above:
        raise InputError(f"_BASE_ leads from {path} back to itself")
    with open_input(path) as file:
        content = load_plain_yaml(file.read(MAX_LENGTH + 1), path)
    bases = content.pop(BASE_KEY, [])
    for base in [bases] if isinstance(bases, str) else bases:
        # As fvcore has it: an absolute path, a URL, or relative to the file.
        base = os.path.expanduser(base)
        if not base.startswith(("/", "https://", "http://")):
            base = os.path.join(os.path.dirname(path), base)
        yield from _files(base, (*above, real_path))
    yield set(_flat_keys(content))


def _flat_keys(node: Dict, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values in nested dicts."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# ------------------------------------------------------------------------------------------- timm


def settle_timm(cfg: CfgNode, set_at: Dict[str, int]) -> None:
    """If MODEL.TIMM.NAME was set: set that network's backbone, weights, pixels and frozen layers.

    Keys that were set in the same place or later stay. If that is MODEL.BACKBONE.NAME, that
    backbone is used instead of the timm network.

    Raises:
        InputError: timm has no such network; or another backbone, which reads nothing of
            MODEL.TIMM, was chosen in the same place.
    """
    # timm takes seconds to import, and not every command needs it.
    from .data.augmentation import INTERPOLATIONS
    from .modeling.backbone import pretrained_cfg

    name, chosen_at = cfg.MODEL.TIMM.NAME, set_at.get("MODEL.TIMM.NAME", -1)
    if not name or chosen_at < 0:
        return
    backbone, backbone_at = cfg.MODEL.BACKBONE.NAME, set_at.get("MODEL.BACKBONE.NAME", -1)
    if backbone != TIMM_BACKBONE and backbone_at >= chosen_at:
        if backbone_at == chosen_at and _is_built_in(backbone):
            raise InputError(
                f"MODEL.TIMM.NAME {name} has no effect with MODEL.BACKBONE.NAME {backbone}: leave "
                "out one of the two"
            )
        return
    weights = pretrained_cfg(name)
    values = {
        "MODEL.BACKBONE.NAME": TIMM_BACKBONE,
        # A checkpoint is of another network.
        "MODEL.WEIGHTS": "",
        "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in weights.mean],
        "MODEL.PIXEL_STD": [round(255 * value, 3) for value in weights.std],
        "INPUT.FORMAT": "RGB",
    }
    if weights.interpolation in INTERPOLATIONS:
        values["INPUT.INTERPOLATION"] = weights.interpolation
    if cfg.MODEL.BACKBONE.FREEZE_AT not in (0, 5):
        values["MODEL.BACKBONE.FREEZE_AT"] = 0
    values = {key: value for key, value in values.items() if set_at.get(key, -1) < chosen_at}
    cfg.merge_from_list([item for pair in values.items() for item in pair])


def _is_built_in(backbone: str) -> bool:
    """Whether a backbone is detectron2's or ia_gcn's; a user's own may read any key."""
    return backbone in BACKBONE_REGISTRY and BACKBONE_REGISTRY.get(backbone).__module__.startswith(
        ("detectron2.", "ia_gcn.")
    )


# --------------------------------------------------------------------------- keys without effect

# Keys of detectron2 that are not used here, each with what to do instead. A key that is set to
# detectron2's default is not refused.
UNUSED = {
    "INPUT.MIN_SIZE_TRAIN": "set INPUT.IMAGE_SIZE",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "set INPUT.IMAGE_SIZE",
    "INPUT.MAX_SIZE_TRAIN": "set INPUT.IMAGE_SIZE",
    "INPUT.MIN_SIZE_TEST": "set INPUT.IMAGE_SIZE",
    "INPUT.MAX_SIZE_TEST": "set INPUT.IMAGE_SIZE",
    "INPUT.CROP.ENABLED": "set INPUT.MULTI_SCALE_CROP.ENABLED",
    "INPUT.CROP.TYPE": "set INPUT.MULTI_SCALE_CROP.ENABLED",
    "INPUT.CROP.SIZE": "set INPUT.MULTI_SCALE_CROP.SCALES",
    "TEST.AUG.MIN_SIZES": "set TEST.AUG.SCALES",
    "TEST.AUG.MAX_SIZE": "set TEST.AUG.SCALES",
    "TEST.DETECTIONS_PER_IMAGE": "set TEST.TOP_K or TEST.THRESHOLD",
}


class Moot(NamedTuple):
    """Keys that have no effect at some values of another key."""

    keys: Tuple[str, ...]
    switch: str
    off: Callable[[Any], bool]
    """Whether they have no effect at this value of the switch."""
    instead: str
    """What to do instead; printed after a colon."""
    harmless: Tuple = ()
    """Values of the keys that are not refused, as they change nothing."""


def _in_epochs(epochs_key: str, key: str, off: str) -> Moot:
    return Moot((key,), epochs_key, bool, f"set that one, or {off} there to count iterations")


# Which keys under MODEL.LOSS, or groups of them, are of which losses.
LOSS_KEYS = {
    ("GAMMA_POS", "GAMMA_NEG", "CLIP"): (
        "AsymmetricLoss",
        "AsymmetricAngularLoss",
        "SelectiveLoss",
    ),
    ("FOCUSING_GRADIENT",): ("AsymmetricLoss", "AsymmetricAngularLoss"),
    ("POSITIVE_WEIGHT",): ("AsymmetricAngularLoss",),
    ("LABEL_COUNTS",): ("ExpectedPositiveLoss", "SelectiveLoss", "DistributionBalancedLoss"),
    ("ASSUME_NEGATIVE.UNKNOWN_WEIGHT", "ASSUME_NEGATIVE.SMOOTHING"): ("AssumeNegativeLoss",),
    ("EXPECTED_POSITIVE.NUM_LABELS",): ("ExpectedPositiveLoss",),
    ("LARGE_LOSS.SCHEME", "LARGE_LOSS.RATE"): ("LargeLoss",),
    ("HILL.LAMBDA", "HILL.MARGIN", "HILL.GAMMA"): ("HillLoss",),
    ("SPLC.THRESHOLD", "SPLC.START_EPOCH", "SPLC.MARGIN", "SPLC.GAMMA"): ("SPLCLoss",),
    ("SELECTIVE.GAMMA_UNKNOWN", "SELECTIVE.TOP_K", "SELECTIVE.PRIOR_THRESHOLD"): ("SelectiveLoss",),
    tuple(
        f"DISTRIBUTION_BALANCED.{name}"
        for name in ("ALPHA", "BETA", "MU", "KAPPA", "LAMBDA", "GAMMA")
    ): ("DistributionBalancedLoss",),
}

# A user's own may read any key.
LOSSES = {"MultiLabelBCE", *(name for names in LOSS_KEYS.values() for name in names)}


def _of_losses(keys: Sequence[str], losses: Sequence[str]) -> Moot:
    return Moot(
        tuple(f"MODEL.LOSS.{key}" for key in keys),
        "MODEL.LOSS.NAME",
        lambda name: name in LOSSES.difference(losses),
        f"it is a key of {', '.join(losses)}",
    )


# A key is only refused if it was set in the same place as the switch, or later. If it was set
# before, in a _BASE_, the config with the switch replaces it on purpose.
MOOT = [
    _in_epochs("SOLVER.MAX_EPOCHS", "SOLVER.MAX_ITER", "0"),
    _in_epochs("SOLVER.STEP_EPOCHS", "SOLVER.STEPS", "()"),
    _in_epochs("SOLVER.CHECKPOINT_EPOCHS", "SOLVER.CHECKPOINT_PERIOD", "0"),
    _in_epochs("TEST.EVAL_EPOCHS", "TEST.EVAL_PERIOD", "0"),
    Moot(
        ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_METHOD"),
        "SOLVER.LR_SCHEDULER_NAME",
        lambda name: name == "OneCycleLR",
        "set SOLVER.ONE_CYCLE_RISE",
        harmless=(0,),
    ),
    Moot(
        ("SOLVER.STEPS", "SOLVER.STEP_EPOCHS", "SOLVER.GAMMA"),
        "SOLVER.LR_SCHEDULER_NAME",
        lambda name: name in ("OneCycleLR", "WarmupCosineLR"),
        "steps need WarmupMultiStepLR",
        harmless=((), []),
    ),
    Moot(
        ("SOLVER.ONE_CYCLE_RISE",),
        "SOLVER.LR_SCHEDULER_NAME",
        lambda name: name in ("WarmupMultiStepLR", "WarmupCosineLR"),
        "set that to OneCycleLR",
    ),
    Moot(
        ("SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
        "SOLVER.OPTIMIZER",
        lambda name: name != "SGD",
        "only SGD has them",
        harmless=(False,),
    ),
    Moot(
        (
            "INPUT.MULTI_SCALE_CROP.SCALES",
            "INPUT.MULTI_SCALE_CROP.MAX_DISTORT",
            "INPUT.MULTI_SCALE_CROP.BASE",
        ),
        "INPUT.MULTI_SCALE_CROP.ENABLED",
        lambda enabled: not enabled,
        "set that to True",
    ),
    Moot(
        ("INPUT.RAND_AUGMENT_MAGNITUDE",),
        "INPUT.RAND_AUGMENT_OPS",
        lambda number: not number,
        "set the number of operations as well, for example 2",
    ),
    Moot(
        ("DATALOADER.REPEAT_THRESHOLD",),
        "DATALOADER.SAMPLER_TRAIN",
        lambda name: name == "TrainingSampler",
        "set that to RepeatFactorTrainingSampler",
        harmless=(0,),
    ),
    Moot(
        ("DATALOADER.SHARD_STREAMS",),
        "DATALOADER.SHARD_WINDOW",
        lambda window: window == 0,
        "all images are mixed then",
    ),
    Moot(
        ("DATALOADER.SAMPLER_TRAIN",),
        "DATALOADER.REPEAT_THRESHOLD",
        lambda threshold: not threshold,
        "set that to the share of the images below which a label is rare, for example 0.001",
        harmless=("TrainingSampler",),
    ),
    Moot(
        ("TEST.AUG.SCALES",),
        "TEST.AUG.ENABLED",
        lambda enabled: not enabled,
        "set that to True",
    ),
    *(_of_losses(keys, losses) for keys, losses in LOSS_KEYS.items()),
    Moot(
        ("MODEL.LOSS.FOCUSING_GRADIENT",),
        "MODEL.LOSS.NAME",
        lambda name: name == "AsymmetricAngularLoss",
        "its focusing always has a gradient",
        harmless=(True,),
    ),
    Moot(
        ("MODEL.RECURRENT.BEAM_SIZE",),
        "MODEL.RECURRENT.LABEL_FEEDBACK",
        lambda feedback: not feedback,
        "without labels there is one path alone; set that to True",
        harmless=(1,),
    ),
    Moot(
        ("MODEL.GLOBAL_POOLING.GEM_POWER",),
        "MODEL.GLOBAL_POOLING.NAME",
        lambda name: name in ("max", "mean"),
        "set that to gem",
    ),
    Moot(
        ("MODEL.ML_DECODER.NUM_GROUPS",),
        "MODEL.ML_DECODER.QUERIES",
        lambda queries: queries == "words",
        "each label has its own query of words",
    ),
    Moot(
        ("MODEL.TIMM.WEIGHTS_FILE",),
        "MODEL.BACKBONE.NAME",
        lambda name: name != TIMM_BACKBONE and _is_built_in(name),
        "set MODEL.TIMM.NAME to the network of these weights",
        harmless=("",),
    ),
    Moot(
        ("DATASETS.CUSTOM.TEST_IMAGE_ROOT",),
        "DATASETS.CUSTOM.TEST",
        lambda path: not path,
        "set DATASETS.CUSTOM.TEST as well",
        harmless=("",),
    ),
    Moot(
        ("DATASETS.CUSTOM.HOLD_OUT", "DATASETS.CUSTOM.HOLD_OUT_SEED"),
        "DATASETS.CUSTOM.TEST",
        bool,
        "images are only held out without a test file",
        harmless=(0,),
    ),
]


def check_effect(cfg: CfgNode, defaults: CfgNode, set_at: Dict[str, int]) -> None:
    """Refuse keys that were set and have no effect.

    Raises:
        InputError: naming the key, why it has no effect, and what to set instead.
    """
    for key, instead in UNUSED.items():
        if key in set_at and _value(cfg, key) != _value(defaults, key):
            raise InputError(f"{key} has no effect: {instead}")
    for moot in MOOT:
        switch, switched_at = _value(cfg, moot.switch), set_at.get(moot.switch, -1)
        if not moot.off(switch):
            continue
        for key in moot.keys:
            if set_at.get(key, -1) >= max(switched_at, 0) and _value(cfg, key) not in moot.harmless:
                raise InputError(
                    f"{key} has no effect with {moot.switch} {switch!r}: {moot.instead}"
                )


def _value(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg
