"""A label prior for a model that is trained, or for anybody's predictions.

n is the number of images, C of labels.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
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
from ..modeling import LabelPrior, PairwisePrior, ThemePrior
from ..modeling.label_prior_fit import (
    FITS,
    Candidate,
    LabelSets,
    batches,
    calibrate,
    choose_prior,
)

# Probabilities are no nearer to 0 and 1.
LEAST_PROBABILITY = 1e-7


class ScoredImages(NamedTuple):
    """What a model says of images, and their labels."""

    logits: torch.Tensor
    """(n, C) float32."""
    targets: np.ndarray
    """(n, C) in {1, 0, -1 = ignored}."""

    @classmethod
    def of_predictions(cls, predictions: Predictions) -> ScoredImages:
        """Of probabilities, from LEAST_PROBABILITY to 1 less that."""
        scores = predictions.scores.astype(np.float64)
        scores = scores.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        logits = torch.from_numpy(np.log(scores) - np.log1p(-scores)).float()
        return cls(logits, predictions.targets)

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
        raise InputError(f"a share of {share} of {len(drawn)} images makes no two parts")
    return np.sort(drawn[:count]), np.sort(drawn[count:])


class FittedPrior(NamedTuple):
    """A prior that is calibrated, and what it was chosen from."""

    prior: LabelPrior
    candidates: List[Candidate]


def fit_label_prior(
    labels: LabelSets, scored: ScoredImages, kinds: Sequence[str] = tuple(FITS)
) -> FittedPrior:
    """The prior of some kinds that says most of the labels, as strong as is best for a model.

    Args:
        labels: of training images.
        scored: images that the model was not trained on, and that are not in `labels`.
        kinds: PairwisePrior, ThemePrior.
    """
    prior, candidates = choose_prior(labels, kinds)
    calibrate(prior, scored.logits, torch.from_numpy(scored.targets))
    return FittedPrior(prior.eval(), candidates)


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


def read_labels(source: str, label_names: Sequence[str], beside: str) -> LabelSets:
    """The labels of a predictions.npz, or of a registered data set.

    Args:
        source: a path that ends in .npz, or the data set's name.
        label_names: C names, in the order that the labels are to have.
        beside: what has these names, for the message.
    Raises:
        InputError: it can't be read, or has other labels.
    """
    if source.endswith(".npz"):
        predictions = read_predictions(source)
        columns = _columns(predictions.label_names, label_names, source, beside)
        return LabelSets.of_targets(predictions.targets[:, columns])
    found = get_label_names([source])
    columns = _columns(found, label_names, source, beside)
    present, known = label_matrices(load_multilabel_dicts(source), len(found))
    return LabelSets.of(present[:, columns], None if known is None else known[:, columns])


def _columns(
    found: Sequence[str], label_names: Sequence[str], source: str, beside: str
) -> List[int]:
    if sorted(found) != sorted(label_names):
        mismatch = describe_mismatch(list(found), list(label_names))
        raise InputError(f"{source} {mismatch} than {beside}")
    return [list(found).index(name) for name in label_names]


def fit_to_checkpoint(
    weights: str,
    *,
    calibrate_on: str = "",
    share: float = 0.2,
    kinds: Sequence[str] = tuple(FITS),
    ema: bool = False,
    device: str | None = None,
    opts: Sequence[Any] = (),
) -> Tuple[MultiLabelPredictor, FittedPrior, ScoredImages]:
    """Give the model of a checkpoint a label prior, from the labels of its training set.

    Args:
        weights: the checkpoint.
        calibrate_on: a registered data set with the model's labels, of images that it was not
            trained on; "": a share of the training images, whose labels are then not fitted.
        share: of the training images.
        kinds: see `fit_label_prior`.
        ema: take the EMA of the weights.
        device: see `MultiLabelPredictor`.
        opts: keys and values that come after the checkpoint's config.
    Returns:
        a predictor, whose model has the prior and whose config says so; the prior; and the images
        that it was calibrated on, without the prior.
    Raises:
        InputError: the checkpoint, its training set or the other data set can't be used.
    """
    predictor = MultiLabelPredictor(weights, opts=opts, ema=ema, device=device, optimize=False)
    model, label_names = predictor.model, predictor.label_names
    # One that is there is replaced.
    model.label_prior = None
    cfg = predictor.cfg.clone()
    cfg.defrost()
    register_custom(cfg)
    if not cfg.DATASETS.TRAIN:
        raise InputError(
            f"DATASETS.TRAIN is empty in the config of {weights}: set it to a data set"
        )
    names = [*cfg.DATASETS.TRAIN, *([calibrate_on] if calibrate_on else [])]
    if get_label_names(names) != label_names:
        mismatch = describe_mismatch(get_label_names(names), label_names)
        raise InputError(f"{', '.join(names)} {mismatch} than {weights}")
    dicts = get_multilabel_dicts(cfg.DATASETS.TRAIN)
    if calibrate_on:
        images = get_multilabel_dicts([calibrate_on])
    else:
        ids = np.array([str(record["image_id"]) for record in dicts])
        aside, others = split_images(ids, share)
        dicts, images = [dicts[i] for i in others], [dicts[i] for i in aside]
    labels = LabelSets.of(*label_matrices(dicts, len(label_names)))
    scored = score_images(cfg, model, images)
    fitted = fit_label_prior(labels, scored, kinds)
    model.label_prior = fitted.prior.to(model.device)
    keys = cfg.MODEL.LABEL_PRIOR
    keys.NAME = type(fitted.prior).__name__
    keys.TRAINED = False
    keys.update(describe_size(fitted.prior))
    cfg.freeze()
    predictor.cfg = cfg
    return predictor, fitted, scored


def describe_size(prior: LabelPrior) -> Dict[str, int]:
    """The keys of MODEL.LABEL_PRIOR that a prior's tensors have their shapes from."""
    if isinstance(prior, ThemePrior):
        return {"NUM_THEMES": len(prior.theme_logits)}
    assert isinstance(prior, PairwisePrior)
    return {"NUM_NEIGHBORS": 0 if prior.neighbors is None else prior.neighbors.shape[1]}


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
    cfg.MODEL.WEIGHTS = path
    content = {
        "model": predictor.model.state_dict(),
        "label_names": predictor.label_names,
        "config": cfg.dump(),
    }
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with write_atomically(path) as file:
        torch.save(content, file)
    config_path = f"{os.path.splitext(path)[0]}.yaml"
    with write_text_atomically(config_path) as file:
        file.write(content["config"])
    return config_path


@torch.no_grad()
def label_opinions(targets: np.ndarray) -> np.ndarray:
    """What the other labels of its image say of each entry: its probability, (n, C) float32.

    Args:
        targets: (n, C) in {1, 0, -1 = unknown}, from which the prior is chosen, too.
    """
    prior, _ = choose_prior(LabelSets.of_targets(targets))
    states = torch.from_numpy(targets.astype(np.int8))
    parts = []
    for part in batches(prior, len(states)):
        nothing_seen = prior.log_odds.expand(states[part].shape)
        parts.append(prior.posterior(nothing_seen, states[part]))
    return torch.cat(parts).sigmoid().numpy()


@torch.no_grad()
def with_prior(prior: LabelPrior, predictions: Predictions) -> Predictions:
    """Predictions whose scores are those with the prior, float32."""
    logits = ScoredImages.of_predictions(predictions).logits
    parts = [prior(logits[part]) for part in batches(prior, len(logits))]
    return predictions._replace(scores=torch.cat(parts).sigmoid().numpy())
