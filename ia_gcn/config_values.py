"""Which values the keys of a config may have, where not every value of their type can be used."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Dict, Iterator, NamedTuple, Tuple, Union

from detectron2.config import CfgNode

from .errors import InputError


class Whole(NamedTuple):
    """Whole numbers: one, or each of a list; a list may have lists in it.

    count: how many a list must have; None: any number.
    """

    least: float = -math.inf
    most: float = math.inf
    count: int | None = None

    def allows(self, value: Any) -> bool:
        return isinstance(value, int) and self.least <= value <= self.most

    def __str__(self) -> str:
        noun = f"{self.count} whole numbers" if self.count else "a whole number"
        return f"{noun}{_between(self.least, self.most)}"


class Number(NamedTuple):
    """Finite numbers, see `Whole`.

    above: whether the least value itself is not allowed.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    count = None

    def allows(self, value: Any) -> bool:
        return (
            isinstance(value, Real)
            and math.isfinite(value)
            and self.least <= value <= self.most
            and not (self.above and value == self.least)
        )

    def __str__(self) -> str:
        return (
            f"a number above {self.least}"
            if self.above
            else (f"a finite number{_between(self.least, self.most)}")
        )


class OneOf(NamedTuple):
    """Some values alone."""

    values: Tuple
    count = None

    def allows(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


class Folder(NamedTuple):
    """The path of a folder, which need not be there."""

    count = None

    def allows(self, value: Any) -> bool:
        return bool(value.strip()) and "\0" not in value

    def __str__(self) -> str:
        return "the path of a folder"


def _between(least: float, most: float) -> str:
    if most < math.inf:
        return f" from {least} to {most}"
    return f" of at least {least}" if least > -math.inf else ""


COUNT = Whole(0)
POSITIVE = Whole(1)
FACTOR = Number(0)
SHARE = Number(0, 1)
ABOVE_0 = Number(0, above=True)

# Of a list. Anchors are of each size with each ratio.
MAX_VALUES = 256

# Keys whose values nothing else checks. A key of detectron2's is here if ia_gcn uses it.
VALUES: Dict[str, Union[Whole, Number, OneOf, Folder]] = {
    # numpy's seeds are below 2³², and the number of the process is added to this one.
    "SEED": Whole(-(2**31), 2**31 - 1),
    "DATALOADER.NUM_WORKERS": Whole(0, 1024),
    "DATALOADER.REPEAT_THRESHOLD": SHARE,
    "DATALOADER.SAMPLER_TRAIN": OneOf(("TrainingSampler", "RepeatFactorTrainingSampler")),
    "DATALOADER.SHARD_STREAMS": POSITIVE,
    "DATALOADER.SHARD_WINDOW": COUNT,
    "DATASETS.CUSTOM.HOLD_OUT_SEED": COUNT,
    "DATASETS.CUSTOM.UNLABELED": OneOf(("absent", "unknown")),
    "DATASETS.IGNORED_LABELS": OneOf(("nowhere", "absent", "present")),
    "DATASETS.MAX_UNREADABLE": COUNT,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": POSITIVE,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": POSITIVE,
    "INPUT.CENTER_CROP": Number(0.5, 1),
    "INPUT.IMAGE_SIZE": Whole(1, 2**14, count=2),
    "INPUT.KNOWN_LABELS": SHARE,
    "INPUT.MULTI_SCALE_CROP.BASE": OneOf(("square", "image")),
    "INPUT.MULTI_SCALE_CROP.MAX_DISTORT": COUNT,
    "INPUT.RANDOM_FLIP": OneOf(("none", "horizontal", "vertical")),
    "MODEL.ADAPTIVE_GCN.ATTENTION_SLOPE": Number(),
    "MODEL.ADD_GCN.NODE_DIM": POSITIVE,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ABOVE_0,
    "MODEL.ANCHOR_GENERATOR.OFFSET": SHARE,
    "MODEL.ANCHOR_GENERATOR.SIZES": ABOVE_0,
    "MODEL.BACKBONE.FREEZE_AT": Whole(0, 5),
    "MODEL.CSRA.ATTENTION_WEIGHT": Number(),
    "MODEL.C_TRAN.NUM_HEADS": POSITIVE,
    "MODEL.C_TRAN.NUM_LAYERS": POSITIVE,
    "MODEL.FPN.OUT_CHANNELS": POSITIVE,
    "MODEL.GLOBAL_POOLING.GEM_POWER": ABOVE_0,
    "MODEL.LABEL_EMBEDDINGS.DIM": POSITIVE,
    "MODEL.LABEL_GCN.HIDDEN_DIMS": POSITIVE,
    "MODEL.LABEL_GCN.NEGATIVE_SLOPE": Number(),
    "MODEL.LABEL_GRAPH.REWEIGHT": FACTOR,
    "MODEL.LABEL_HEAD.NUM_LABELS": COUNT,
    "MODEL.LABEL_PRIOR.HIDDEN_EVIDENCE": SHARE,
    "MODEL.LABEL_PRIOR.NAME": OneOf(("", "PairwisePrior", "ThemePrior")),
    "MODEL.LABEL_PRIOR.NUM_NEIGHBORS": COUNT,
    "MODEL.LABEL_PRIOR.NUM_THEMES": POSITIVE,
    "MODEL.LABEL_PRIOR.STEPS": COUNT,
    "MODEL.LINEAR_HEAD.COSINE_SCALE": FACTOR,
    "MODEL.LOSS.ASSUME_NEGATIVE.SMOOTHING": SHARE,
    "MODEL.LOSS.ASSUME_NEGATIVE.UNKNOWN_WEIGHT": SHARE,
    "MODEL.LOSS.DISTRIBUTION_BALANCED.ALPHA": FACTOR,
    "MODEL.LOSS.DISTRIBUTION_BALANCED.BETA": ABOVE_0,
    "MODEL.LOSS.DISTRIBUTION_BALANCED.GAMMA": FACTOR,
    "MODEL.LOSS.DISTRIBUTION_BALANCED.KAPPA": FACTOR,
    "MODEL.LOSS.DISTRIBUTION_BALANCED.LAMBDA": ABOVE_0,
    "MODEL.LOSS.DISTRIBUTION_BALANCED.MU": Number(),
    "MODEL.LOSS.EXPECTED_POSITIVE.NUM_LABELS": FACTOR,
    "MODEL.LOSS.HILL.GAMMA": FACTOR,
    "MODEL.LOSS.HILL.LAMBDA": ABOVE_0,
    "MODEL.LOSS.HILL.MARGIN": Number(),
    "MODEL.LOSS.KL_WEIGHT": FACTOR,
    "MODEL.LOSS.LARGE_LOSS.RATE": SHARE,
    "MODEL.LOSS.LARGE_LOSS.SCHEME": OneOf(("LL-R", "LL-Ct", "LL-Cp")),
    "MODEL.LOSS.POSITIVE_WEIGHT": SHARE,
    "MODEL.LOSS.ROUGH_SCORE_WEIGHT": FACTOR,
    "MODEL.LOSS.SELECTIVE.GAMMA_UNKNOWN": FACTOR,
    "MODEL.LOSS.SELECTIVE.PRIOR_THRESHOLD": SHARE,
    "MODEL.LOSS.SELECTIVE.TOP_K": COUNT,
    "MODEL.LOSS.SPLC.GAMMA": FACTOR,
    "MODEL.LOSS.SPLC.MARGIN": Number(),
    "MODEL.LOSS.SPLC.START_EPOCH": COUNT,
    "MODEL.LOSS.SPLC.THRESHOLD": SHARE,
    "MODEL.ML_DECODER.DIM": POSITIVE,
    "MODEL.ML_DECODER.DROPOUT": SHARE,
    "MODEL.ML_DECODER.FFN_DIM": POSITIVE,
    "MODEL.ML_DECODER.NUM_GROUPS": POSITIVE,
    "MODEL.ML_DECODER.NUM_HEADS": POSITIVE,
    "MODEL.ML_DECODER.QUERIES": OneOf(("random", "learned", "words")),
    "MODEL.ML_DECODER.READOUT": OneOf(("group", "shared")),
    "MODEL.PIXEL_MEAN": Number(),
    "MODEL.PIXEL_STD": ABOVE_0,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": FACTOR,
    "MODEL.QUERY2LABEL.DECODER_LAYERS": POSITIVE,
    "MODEL.QUERY2LABEL.DIM": COUNT,
    "MODEL.QUERY2LABEL.DROPOUT": SHARE,
    "MODEL.QUERY2LABEL.ENCODER_LAYERS": COUNT,
    "MODEL.QUERY2LABEL.FFN_DIM": POSITIVE,
    "MODEL.QUERY2LABEL.NUM_HEADS": POSITIVE,
    "MODEL.RECURRENT.BEAM_SIZE": POSITIVE,
    "MODEL.RECURRENT.EMBEDDING_DIM": POSITIVE,
    "MODEL.RECURRENT.HIDDEN_DIM": POSITIVE,
    "MODEL.RECURRENT.STEPS": POSITIVE,
    "MODEL.REGION_BRANCH.EVAL_SAMPLES": COUNT,
    "MODEL.REGION_BRANCH.NUM_REGIONS": Whole(1, 2**14),
    "MODEL.REGION_BRANCH.PRIOR_MEAN": Number(),
    "MODEL.REGION_GCN.HIDDEN_DIMS": POSITIVE,
    "MODEL.RESNETS.DEPTH": OneOf((18, 34, 50, 101, 152)),
    "MODEL.RESNETS.NUM_GROUPS": POSITIVE,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": POSITIVE,
    "MODEL.RESNETS.RES5_DILATION": OneOf((1, 2)),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": POSITIVE,
    "MODEL.RESNETS.WIDTH_PER_GROUP": POSITIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": POSITIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": COUNT,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": POSITIVE,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": FACTOR,
    "MODEL.RPN.LOSS_WEIGHT": FACTOR,
    "MODEL.RPN.NMS_THRESH": SHARE,
    "MODEL.RPN.POSITIVE_FRACTION": SHARE,
    "MODEL.RPN.POST_NMS_TOPK_TEST": POSITIVE,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": POSITIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": POSITIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": POSITIVE,
    "MODEL.RPN.SMOOTH_L1_BETA": FACTOR,
    "MODEL.SALGL.DROPOUT": SHARE,
    "MODEL.SALGL.FFN_DIM": POSITIVE,
    "MODEL.SALGL.HIDDEN_DIM": POSITIVE,
    "MODEL.SALGL.NUM_HEADS": POSITIVE,
    "MODEL.SALGL.NUM_SCENES": POSITIVE,
    "MODEL.SALGL.STEPS": COUNT,
    "MODEL.SRN.GRID_SIZE": Whole(1, 64),
    "MODEL.SRN.HIDDEN_DIM": POSITIVE,
    "MODEL.SSGRL.HIDDEN_DIM": POSITIVE,
    "MODEL.SSGRL.OUTPUT_DIM": POSITIVE,
    "MODEL.SSGRL.STEPS": COUNT,
    "MODEL.TDRG.ATTENTION": OneOf(("image", "batch")),
    "MODEL.TDRG.DIM": POSITIVE,
    "MODEL.TDRG.FFN_DIM": POSITIVE,
    "MODEL.TDRG.LAYERS": COUNT,
    "MODEL.TDRG.NUM_HEADS": POSITIVE,
    "MODEL.TDRG.STRUCTURE_WEIGHT": SHARE,
    "MODEL.TDRG.TOP_SHARE": SHARE,
    "OUTPUT_DIR": Folder(),
    "SOLVER.BACKBONE_MULTIPLIER": FACTOR,
    "SOLVER.BASE_LR": FACTOR,
    "SOLVER.BIAS_LR_FACTOR": FACTOR,
    "SOLVER.CHECKPOINT_EPOCHS": COUNT,
    # A training without checkpoints could not be resumed.
    "SOLVER.CHECKPOINT_PERIOD": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": OneOf(("value", "norm", "full_model")),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ABOVE_0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ABOVE_0,
    "SOLVER.GAMMA": FACTOR,
    "SOLVER.IMS_PER_BATCH": POSITIVE,
    "SOLVER.LR_SCHEDULER_NAME": OneOf(("OneCycleLR", "WarmupMultiStepLR", "WarmupCosineLR")),
    "SOLVER.MAX_EPOCHS": COUNT,
    "SOLVER.MAX_ITER": POSITIVE,
    "SOLVER.MOMENTUM": FACTOR,
    "SOLVER.REFERENCE_WORLD_SIZE": COUNT,
    "SOLVER.STEPS": POSITIVE,
    "SOLVER.STEP_EPOCHS": POSITIVE,
    "SOLVER.WARMUP_FACTOR": FACTOR,
    "SOLVER.WARMUP_ITERS": COUNT,
    "SOLVER.WARMUP_METHOD": OneOf(("linear", "constant")),
    "SOLVER.WEIGHT_DECAY": FACTOR,
    "SOLVER.WEIGHT_DECAY_BIAS": FACTOR,
    "SOLVER.WEIGHT_DECAY_NORM": FACTOR,
    "TEST.AP": OneOf(("all_points", "envelope", "eleven_points")),
    "TEST.CF1": OneOf(("of_means", "mean_of_labels")),
    "TEST.EVAL_EPOCHS": COUNT,
    "TEST.EVAL_PERIOD": COUNT,
    "TEST.FREQUENCY_GROUPS": Whole(0, count=2),
    "TEST.IGNORED_LABELS": OneOf(("nowhere", "in_f1", "everywhere")),
    "TEST.IMS_PER_BATCH": POSITIVE,
    "TEST.KNOWN_LABELS": SHARE,
    "TEST.KNOWN_LABELS_SEED": COUNT,
    "TEST.MEMORY_LIMIT": COUNT,
    "TEST.THRESHOLD": SHARE,
    "TEST.TOP_K": COUNT,
}


def check_values(cfg: CfgNode, defaults: CfgNode) -> None:
    """Refuse values that can't be used.

    Args:
        cfg: a config.
        defaults: with detectron2's and ia_gcn's values. None is refused where they have another.
    Raises:
        InputError: naming the key, what it may be, and what it is.
    """
    for key, default, value in _pairs(defaults, cfg):
        if value is None and default is not None:
            raise InputError(f"{key} must not be None")
        allowed = VALUES.get(key)
        # Where a key has no values by default, it may have none, whatever their number else.
        if allowed is None or value is None or value == default == ():
            continue
        values = list(_flatten(value))
        if len(values) > MAX_VALUES:
            raise InputError(f"{key} must have at most {MAX_VALUES} values, not {len(values)}")
        wrong = not all(not isinstance(item, bool) and allowed.allows(item) for item in values)
        if wrong or len(values) != (allowed.count or len(values)):
            each = "each " if isinstance(default, (list, tuple)) and not allowed.count else ""
            raise InputError(f"{key} must {each}be {allowed}, not {value!r}")


def _pairs(defaults: CfgNode, cfg: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any, Any]]:
    """(dotted key, default, value) of all keys."""
    for name, default in defaults.items():
        if isinstance(default, CfgNode):
            yield from _pairs(default, cfg[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", default, cfg[name]


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    else:
        yield value
