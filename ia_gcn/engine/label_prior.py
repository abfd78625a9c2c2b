"""A label prior for a model that is trained, or for anybody's predictions.

n is the number of images, C of labels.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from tqdm import tqdm

from ..data import (
    MultiLabelDatasetMapper,
    build_multilabel_test_loader,
    get_label_names,
    label_matrices,
    register_custom,
)
from ..data.build import get_multilabel_dicts, load_multilabel_dicts
from ..errors import InputError
from ..evaluation.predictions import Predictions, read_predictions
from ..inference import MultiLabelPredictor
from ..io.files import write_atomically, write_text_atomically
from ..label_names import describe_mismatch
from ..memory import check_memory
from ..modeling import LabelPrior, ThemePrior
from ..modeling.label_prior_fit import (
    FEWEST_IMAGES,
    FITS,
    Candidate,
    LabelSets,
    batches,
    calibrate,
    choose_prior,
    posterior_logits,
)
from .label_matching import training_counts

# Probabilities are no nearer to 0 and 1.
LEAST_PROBABILITY = 1e-7
# What a score takes on the way to a logit.
BYTES_OF_A_SCORE = 32
# The strength of a prior is chosen on no more training images.
MOST_SCORED = 4000


class ScoredImages(NamedTuple):
    """What a model says of images, and their labels."""

    logits: torch.Tensor
    """(n, C) float32, on the CPU."""
    targets: np.ndarray
    """(n, C) in {1, 0, -1 = ignored}."""

    @classmethod
    def of_predictions(cls, predictions: Predictions) -> ScoredImages:
        """Of probabilities, from LEAST_PROBABILITY to 1 less that.

        Raises:
            InputError: there are too many for the memory.
        """
        num_images, num_labels = predictions.scores.shape
        check_memory(
            BYTES_OF_A_SCORE * predictions.scores.size,
            f"a label prior, with all scores of {num_images} images × {num_labels} labels,",
        )
        scores = predictions.scores.astype(np.float64)
        scores = scores.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        logits = torch.from_numpy(np.log(scores) - np.log1p(-scores)).float()
        # A copy, as what is mapped from a file can't be written to, which PyTorch warns of.
        return cls(logits, np.array(predictions.targets))

    def split(self, image_ids: np.ndarray, share: float) -> Tuple[ScoredImages, ScoredImages]:
        """See `split_images`."""
        parts = split_images(image_ids, share)
        return tuple(ScoredImages(self.logits[part], self.targets[part]) for part in parts)


def split_images(image_ids: np.ndarray, share: float) -> Tuple[np.ndarray, np.ndarray]:
    """Indices of a share of the images, drawn by their ids whatever their order, and of the others.

    Raises:
        InputError: one part would be empty.
    """
    drawn = np.random.RandomState(0).permutation(np.argsort(image_ids.astype(str)))
    count = round(share * len(drawn))
    if not 0 < count < len(drawn):
        raise InputError(f"a share of {share:g} of {len(drawn)} images makes no two parts")
    return np.sort(drawn[:count]), np.sort(drawn[count:])


class FittedPrior(NamedTuple):
    """A prior, what it was chosen from, and what it was calibrated on."""

    prior: LabelPrior
    """On the CPU, in evaluation."""
    candidates: List[Candidate]
    scored: ScoredImages


def fit_label_prior(
    labels: LabelSets, scored: ScoredImages, kinds: Sequence[str] = tuple(FITS)
) -> FittedPrior:
    """The prior of some kinds that says most of the labels, as strong as is best for a model.

    Args:
        labels: of training images.
        scored: images that the model was not trained on, and that are not in `labels`.
        kinds: PairwisePrior, ThemePrior.
    Raises:
        InputError: there are too few images or labels.
    """
    prior, candidates = choose_prior(labels, kinds)
    calibrate(prior, scored.logits, torch.from_numpy(scored.targets))
    return FittedPrior(prior.eval(), candidates, scored)


def fit_to_predictions(
    predictions: Predictions, kinds: Sequence[str] = tuple(FITS), share: float = 0.2
) -> FittedPrior:
    """`fit_label_prior` where predictions are all there is.

    Args:
        predictions: of images that the model was not trained on.
        kinds: see there.
        share: of the images, which the strength is chosen on; the labels of the others are fitted.
    """
    scored = ScoredImages.of_predictions(predictions)
    aside, others = scored.split(predictions.image_ids, share)
    return fit_label_prior(LabelSets.of_targets(others.targets), aside, kinds)


def read_labels(source: str, measured: Predictions, path: str) -> LabelSets:
    """The labels of a predictions.npz, or of a registered data set, for a prior of predictions.

    Args:
        source: a path that ends in .npz, or the data set's name.
        measured: what gets the prior; the labels come in the order of its labels.
        path: of `measured`, for messages.
    Raises:
        InputError: it can't be read, has other labels, or see `check_other_images`.
    """
    if source.endswith(".npz"):
        predictions = read_predictions(source)
        targets = predictions.targets[:, label_order(predictions.label_names, measured, source)]
        present, known = targets == 1, targets >= 0
        ids, matrices = predictions.image_ids, LabelSets.of_targets(targets)
    else:
        found = get_label_names([source])
        order = label_order(found, measured, source)
        dicts = load_multilabel_dicts(source)
        present, known = label_matrices(dicts, len(found))
        present, known = present[:, order], None if known is None else known[:, order]
        ids, matrices = [d["image_id"] for d in dicts], LabelSets.of(present, known)
    check_other_images(ids, present, measured, source, path)
    return matrices


def label_order(label_names: Sequence[str], measured: Predictions, source: str) -> List[int]:
    """Where each label of `measured` is among others.

    Raises:
        InputError: they are not the same.
    """
    if sorted(label_names) != sorted(measured.label_names):
        mismatch = describe_mismatch(list(label_names), measured.label_names)
        raise InputError(f"{source} {mismatch} than the predictions")
    places = {name: i for i, name in enumerate(label_names)}
    return [places[name] for name in measured.label_names]


def check_other_images(
    image_ids: Sequence, present, measured: Predictions, source: str, path: str
) -> None:
    """Refuse to choose anything on images that are measured.

    Many data sets number their images from 1: the same ids alone don't make them the same images.

    Args:
        image_ids: n.
        present: (n, C) booleans, or a sparse matrix, in the order of the labels of `measured`.
        measured: the predictions that are measured.
        source, path: names of both, for the message.
    Raises:
        InputError: all images whose ids are among the measured ones have the same labels there.
    """
    rows = {image_id: i for i, image_id in enumerate(measured.image_ids.astype(str))}
    shared = [(i, rows[str(name)]) for i, name in enumerate(image_ids) if str(name) in rows]
    for i, row in shared:
        labels = present[i].toarray()[0] > 0 if hasattr(present, "toarray") else present[i]
        if (labels != (measured.targets[row] == 1)).any():
            return
    if shared:
        raise InputError(
            f"{source} has {len(shared)} of the images of {path}: nothing may be chosen on images "
            "that are measured"
        )


def fit_to_checkpoint(
    weights: str,
    *,
    calibrate_on: str = "",
    share: float = 0.2,
    kinds: Sequence[str] = tuple(FITS),
    ema: bool = False,
    device: str | None = None,
    opts: Sequence[Any] = (),
) -> Tuple[MultiLabelPredictor, FittedPrior]:
    """Give the model of a checkpoint a label prior, from the labels of its training set.

    Args:
        weights: the checkpoint.
        calibrate_on: a registered data set with the model's labels, of images that it was not
            trained on; "": a share of the training images, whose labels are then not fitted.
        share: of the training images, of which MOST_SCORED at most are taken.
        kinds: see `fit_label_prior`.
        ema: take the EMA of the weights.
        device: see `MultiLabelPredictor`.
        opts: keys and values that come after the checkpoint's config.
    Returns:
        a predictor, whose model has the prior and whose config says so; and the prior.
    Raises:
        InputError: the checkpoint, its training set or the other data set can't be used.
    """
    predictor = MultiLabelPredictor(weights, opts=opts, ema=ema, device=device, optimize=False)
    model, label_names = predictor.model, predictor.label_names
    # One that is there is replaced.
    model.label_prior = None
    cfg = predictor.cfg.clone()
    cfg.defrost()
    # The weights are those of the EMA now; and nothing is known of the images.
    cfg.TEST.EMA, cfg.TEST.KNOWN_LABELS = False, 0.0
    register_custom(cfg)
    if not cfg.DATASETS.TRAIN:
        raise InputError(f"DATASETS.TRAIN is empty in the config of {weights}: set it")
    names = [*cfg.DATASETS.TRAIN, *([calibrate_on] if calibrate_on else [])]
    if get_label_names(names) != label_names:
        mismatch = describe_mismatch(get_label_names(names), label_names)
        raise InputError(f"{', '.join(names)} {mismatch} than {weights}")
    dicts = get_multilabel_dicts(cfg.DATASETS.TRAIN)
    if calibrate_on:
        images = get_multilabel_dicts([calibrate_on])
    else:
        ids = np.array([str(record["image_id"]) for record in dicts])
        aside, others = split_images(ids, min(share, MOST_SCORED / len(ids)))
        dicts, images = [dicts[i] for i in others], [dicts[i] for i in aside]
    labels = LabelSets.of(*label_matrices(dicts, len(label_names)))
    fitted = fit_label_prior(labels, score_images(cfg, model, images), kinds)
    model.label_prior = copy.deepcopy(fitted.prior).to(model.device)
    cfg.MODEL.LABEL_PRIOR.update(describe_prior(fitted.prior))
    cfg.freeze()
    predictor.cfg = cfg
    return predictor, fitted


def describe_prior(prior: LabelPrior) -> Dict[str, Any]:
    """The keys of MODEL.LABEL_PRIOR of a prior that was fitted to a model."""
    keys = {"NAME": type(prior).__name__, "TRAINED": False}
    if isinstance(prior, ThemePrior):
        return {**keys, "NUM_THEMES": len(prior.theme_logits)}
    return {**keys, "NUM_NEIGHBORS": 0 if prior.neighbors is None else prior.neighbors.shape[1]}


@torch.no_grad()
def score_images(cfg: CfgNode, model: torch.nn.Module, dicts: Sequence[Dict]) -> ScoredImages:
    """The model's logits of a data set's dicts, in its test view, with a progress bar."""
    loader = build_multilabel_test_loader(
        dicts,
        mapper=MultiLabelDatasetMapper(cfg, is_train=False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_unreadable=cfg.DATASETS.MAX_UNREADABLE,
    )
    logits, targets = [], []
    for batch in tqdm(loader, "images", unit=" batches", leave=False, disable=None):
        logits += [result["logits"].float().cpu() for result in model(batch)]
        targets += [sample["labels"] for sample in batch]
    return ScoredImages(torch.stack(logits), torch.stack(targets).numpy().astype(np.int8))


def save_with_prior(predictor: MultiLabelPredictor, path: str) -> str:
    """Write a model with its prior as a checkpoint, and its config beside it.

    Args:
        predictor: of `fit_to_checkpoint`.
        path: of the checkpoint, which ends in .pth.
    Returns:
        the path of the config, for --config-file.
    """
    cfg = predictor.cfg.clone()
    cfg.defrost()
    counts = training_counts(cfg.MODEL.WEIGHTS, predictor.label_names)
    # Not of this machine: a config says cuda, which is cpu where there is none.
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = path, get_cfg().MODEL.DEVICE
    content = {
        "model": predictor.model.state_dict(),
        "label_names": predictor.label_names,
        "label_counts": counts or [],
        "config": cfg.dump(),
    }
    with write_atomically(path) as file:
        torch.save(content, file)
    config_path = f"{os.path.splitext(path)[0]}.yaml"
    with write_text_atomically(config_path) as file:
        file.write(content["config"])
    return config_path


@torch.no_grad()
def label_opinions(targets: np.ndarray) -> np.ndarray | None:
    """What the other labels of its image say of each entry: its probability, (n, C) float32.

    Args:
        targets: (n, C) in {1, 0, -1 = unknown}, from which the prior is chosen, too.
    Returns:
        None where there are too few images to fit a prior.
    """
    if len(targets) < FEWEST_IMAGES or targets.shape[1] < 2:
        return None
    prior, _ = choose_prior(LabelSets.of_targets(targets))
    states = torch.from_numpy(targets.astype(np.int8))
    parts = []
    for part in batches(prior, len(states)):
        nothing_seen = prior.log_odds.expand(states[part].shape)
        parts.append(prior.posterior(nothing_seen, states[part]))
    return torch.cat(parts).sigmoid().numpy()


def with_prior(prior: LabelPrior, predictions: Predictions) -> Predictions:
    """Predictions whose scores are those with the prior, float32."""
    logits = ScoredImages.of_predictions(predictions).logits
    return predictions._replace(scores=posterior_logits(prior, logits).sigmoid().numpy())
