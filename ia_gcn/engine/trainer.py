"""The trainer: detectron2's, on multi-label data, resumable to the bit."""

from __future__ import annotations

import inspect
import logging
import os
import socket
import weakref
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from timm.utils import ModelEmaV3
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import MultiLabelCheckpointer, build_model, find_resumable, last_checkpoint
from ..data import (
    build_multilabel_test_loader,
    build_multilabel_train_loader,
    cached_label_statistics,
    count_states,
    get_label_names,
    get_test_dicts,
    label_embeddings,
    label_matrices,
)
from ..data.test_time_views import DatasetMapperTTA
from ..errors import InputError, TrainingDiverged
from ..evaluation import MultiLabelEvaluator, summary_line
from ..evaluation.label_blocks import label_blocks
from ..evaluation.predictions import read_predictions
from ..inference.test_time_augmentation import MultiLabelTTA
from ..label_names import describe_mismatch
from ..modeling.label_prior_fit import LabelSets, fit_like
from .accumulation import AccumulatingTrainer, choose_amp_dtype
from .held_out import write_split
from .hooks import (
    BestCheckpointer,
    BestModelCheckpointer,
    CountUnreadable,
    EvalHook,
    FollowLoss,
    PeriodicCheckpointer,
    SeedEveryStep,
    StopOnBadLoss,
    UpdateEma,
)
from .metrics_log import KeepMetrics, MetricsWriter
from .output_lock import sole_training
from .progress import SHORTEST, ProgressBar, ProgressWriter
from .schedule import (
    build_lr_scheduler,
    build_optimizer,
    epochs_to_iterations,
    iterations_per_epoch,
)
from .signals import StopOnSignal
from .summary import files_summary, results_summary, training_summary

logger = logging.getLogger(__name__)

# Of the periodic checkpoints; 120 of a ResNet-101 with its optimizer would take 40 GB.
CHECKPOINTS_KEPT = 3


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer with multi-label data, label graph, optimizer and schedules.

    It reads the training set first: its size turns epochs into iterations, and its labels fill in
    the model's label graph and, for some losses, label counts. Everything random is a function of
    the seed and the iteration, so a resumed run ends where an uncut one does.

    Attributes:
        ema: the EMA of the weights, `module` a model; None if SOLVER.EMA_DECAY is 0.
        amp_dtype: of mixed precision; None without it.
        seed: SEED, or one drawn at random where that is negative; kept in checkpoints.
        label_names: of the model's outputs, in order.
        label_counts: how many training images have each of them.
        iterations_per_epoch: how many it takes to see all of them.
        test_sizes: the number of images of each of DATASETS.TEST.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own constructor builds the model before it knows the data, and a
        # DistributedDataParallel that needs GPUs.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        self.seed = cfg.SEED = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        label_names = self.label_names = check_labels(cfg)
        data_loader = self.build_train_loader(cfg)
        num_images = len(data_loader.dataset)
        present, absent, _ = count_states(data_loader.dataset, len(label_names))
        self.label_counts = present.tolist()
        epochs_to_iterations(cfg, num_images)
        cfg.freeze()
        # Errors of a test set are raised now, and not at the first evaluation.
        self.test_sizes = {name: len(get_test_dicts(cfg, name)) for name in cfg.DATASETS.TEST}

        if comm.is_main_process():
            write_split(cfg)

        seed_all_rng(self.seed)
        model = self.build_model(cfg)
        fill_label_graph(cfg, model, data_loader.dataset, label_names)
        fill_label_prior(cfg, model, data_loader.dataset)
        optimizer = self.build_optimizer(cfg, model)
        decay = cfg.SOLVER.EMA_DECAY
        if not 0 <= decay < 1:
            raise InputError(f"SOLVER.EMA_DECAY must be at least 0 and less than 1, not {decay}")
        self.ema = ModelEmaV3(model, decay) if decay else None
        # After the EMA's copy of the model, which needs none of it.
        fill_loss(cfg, model, num_images, present, absent, label_names)
        self.iterations_per_epoch = iterations_per_epoch(cfg, num_images)
        self._follow_loss = FollowLoss(
            model.criterion.loss,
            self.iterations_per_epoch,
            (record["image_id"] for record in data_loader.dataset),
        )
        logger.debug(f"Model:\n{model}")
        amp = cfg.SOLVER.AMP
        self.amp_dtype = choose_amp_dtype(amp.DTYPE, model) if amp.ENABLED else None
        model = wrap_in_ddp(model)
        self._trainer = AccumulatingTrainer(
            model,
            data_loader,
            optimizer,
            steps=cfg.SOLVER.ACCUMULATE_STEPS,
            amp_dtype=self.amp_dtype,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        extras = {"ema": self.ema} if self.ema else {}
        self.checkpointer = MultiLabelCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            label_names=label_names,
            label_counts=self.label_counts,
            config=cfg.dump(),
            transfer=cfg.MODEL.TRANSFER,
            trainer=weakref.proxy(self),
            **extras,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._weights_loaded = False
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; the stream of images goes on where the checkpoint was written.

        Raises:
            InputError: no checkpoint can be read, or one that is resumed from is of a later
                iteration than the last one, or not there on all machines.
        """
        resumed = resume and self._agree_on_checkpoint()
        if resumed:
            self.checkpointer.transfer = False
        elif resume and comm.is_main_process():
            self._metrics.start_anew()
        super().resume_or_load(resumed)
        self._weights_loaded = True
        if self.start_iter > self.max_iter:
            raise InputError(
                f"SOLVER.MAX_ITER: the training ends after {self.max_iter} iterations, and "
                f"{self.checkpointer.get_checkpoint_file()} is of {self.start_iter}"
            )
        for part in self.checkpointer.model.parts_to_load:
            self.checkpointer.check_loaded(part)
        self.data_loader.start_at(self.start_iter * self.cfg.SOLVER.IMS_PER_BATCH, self.seed)

    def _agree_on_checkpoint(self) -> bool:
        """Have `last_checkpoint` name one that can be read; whether there is any.

        Raises:
            InputError: in all processes, see `find_resumable`; or another machine has none, or
                another one.
        """
        folder = self.cfg.OUTPUT_DIR
        path, problem = "", ""
        if comm.is_main_process():
            try:
                path = find_resumable(folder)
            except InputError as error:
                problem = str(error)
            if path:
                self.checkpointer.tag_last_checkpoint(os.path.basename(path))
        path, problem = comm.all_gather((path, problem))[0]
        if problem:
            raise InputError(problem)
        found = comm.all_gather((last_checkpoint(folder) or "none", socket.gethostname()))
        others = [place for place in found if place[0] != found[0][0]]
        if others:
            seen = " and ".join(f"{name} on {machine}" for name, machine in (found[0], others[0]))
            raise InputError(
                f"OUTPUT_DIR: the last checkpoint in {folder} is {seen}: let it be a folder that "
                "the machines share"
            )
        return bool(path)

    def train(self) -> Dict:
        """Train from the start, from MODEL.WEIGHTS, or from where `resume_or_load` resumed.

        A training that is resumed after its last iteration is evaluated again.

        Returns:
            the last evaluation's results, see `evaluate`; empty on all but the main process.
        Raises:
            InputError: another training is running in OUTPUT_DIR.
            Stopped: see `StopOnSignal`.
        """
        with sole_training(self.cfg.OUTPUT_DIR):
            if not self._weights_loaded:
                self.resume_or_load(resume=False)
            if comm.is_main_process():
                logger.info(training_summary(self))
            with self._stop_on_signal.listening():
                super().train()
            if comm.is_main_process():
                if self.cfg.DATASETS.TEST:
                    logger.info(results_summary(self.cfg, with_ema=self.ema is not None))
                logger.info(files_summary(self.cfg, self._checkpoints()))
        return self._last_eval_results

    def before_train(self) -> None:
        """As DefaultTrainer's; an evaluation that the last run owes comes first."""
        super().before_train()
        if self._eval_hook.is_missing():
            self.iter = self.storage.iter = self.start_iter - 1
            for hook in self._hooks_from_evaluation:
                hook.after_step()

    def after_train(self) -> None:
        # Without an iteration left, TrainerBase counts one that was not done.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def run_step(self) -> None:
        """As DefaultTrainer's.

        Raises:
            TrainingDiverged: see `StopOnBadLoss`.
        """
        try:
            super().run_step()
        except TrainingDiverged:
            raise
        except FloatingPointError as error:
            raise self._stop_on_bad_loss.explain(error) from error

    def _checkpoints(self) -> List[str]:
        """The paths of those that a finished training leaves to its user."""
        found = [self.checkpointer.get_checkpoint_file()]
        for hook in self._hooks:
            if isinstance(hook, BestCheckpointer) and hook.best_iter is not None:
                path = os.path.join(self.cfg.OUTPUT_DIR, "model_best.pth")
                # The hook counts the evaluation after the training as one iteration more.
                iteration = min(hook.best_iter + 1, self.max_iter)
                found.append(f"{path} (mAP {hook.best_metric:.2f}, iteration {iteration})")
        return found

    def build_hooks(self):
        """DefaultTrainer's and more, in another order: what an iteration brought is evaluated and
        written before it is in a checkpoint."""
        period = self.cfg.TEST.EVAL_PERIOD
        self._stop_on_bad_loss = StopOnBadLoss()
        self._eval_hook = EvalHook(period, self._evaluate_in_training)
        if comm.is_main_process():
            PathManager.mkdirs(self.cfg.OUTPUT_DIR)
            self._metrics_writer = MetricsWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
            self._metrics = KeepMetrics(self._metrics_writer)
        moved = hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter
        default = super().build_hooks()
        ret = [hook for hook in default if not isinstance(hook, moved)]
        count_unreadable = CountUnreadable(self.data_loader.unreadable)
        ret = [self._stop_on_bad_loss, SeedEveryStep(), self._follow_loss, count_unreadable, *ret]
        if self.ema:
            ret.insert(0, UpdateEma())
        last = [self._eval_hook]
        if comm.is_main_process():
            if period > 0:
                last.append(self._build_best_checkpointer())
            last += [hook for hook in default if isinstance(hook, hooks.PeriodicWriter)]
            progress = ProgressWriter(self.max_iter, self.iterations_per_epoch)
            last.append(hooks.PeriodicWriter([progress], period=1))
            last.append(self._metrics)
            every = self.cfg.SOLVER.CHECKPOINT_PERIOD
            periodic = PeriodicCheckpointer(self.checkpointer, every, max_to_keep=CHECKPOINTS_KEPT)
            last.append(periodic)
        self._hooks_from_evaluation = last
        self._stop_on_signal = StopOnSignal(periodic if comm.is_main_process() else None)
        return [*ret, *last, self._stop_on_signal]

    def _build_best_checkpointer(self) -> BestCheckpointer:
        model, metric = self.model, "multi_label/mAP"
        if self.ema:
            model, metric = self.ema.module, f"ema/{metric}"
        best = BestModelCheckpointer(
            model,
            self.cfg.OUTPUT_DIR,
            label_names=self.label_names,
            label_counts=self.label_counts,
            config=self.checkpointer.config,
        )
        return BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, best, metric)

    def build_writers(self):
        """DefaultTrainer's; metrics.json goes on after a resume as if the run had not been cut."""
        return [
            CommonMetricPrinter(self.max_iter),
            self._metrics_writer,
            TensorboardXWriter(self.cfg.OUTPUT_DIR),
        ]

    def _evaluate_in_training(self) -> Dict:
        with self._stop_on_signal.evaluation():
            return self.evaluate()

    def evaluate(self) -> Dict:
        """Evaluate the weights; and their EMA, as `ema`, into the folder ema."""
        cfg = self.cfg.clone()
        cfg.defrost()
        # Only final figures need it; during training it would take time.
        cfg.TEST.AUG.ENABLED = False
        cfg.TEST.EMA = False
        cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
        # Of the last evaluation alone, whose weights are kept under that name.
        cfg.TEST.REPORT = cfg.TEST.REPORT and self.iter + 1 >= self.max_iter
        use_buffers_of_main_process(self.model)
        results = self.test(cfg, self.model, self.build_evaluators(cfg, self.label_counts))
        self._log_progress("", results)
        if self.ema:
            cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
            cfg.TEST.EMA = True
            use_buffers_of_main_process(self.ema.module)
            evaluators = self.build_evaluators(cfg, self.label_counts)
            results = {**results, "ema": self.test(cfg, self.ema.module, evaluators)}
            self._log_progress("EMA on ", results["ema"])
        self._last_eval_results = results
        return results

    def _log_progress(self, weights: str, results: Dict) -> None:
        """A line on each test set; not after the last iteration, which the tables are of."""
        names = self.cfg.DATASETS.TEST
        if not comm.is_main_process() or self.iter >= self.max_iter:
            return
        for name in names:
            summary = (results if len(names) == 1 else results[name])["multi_label"]
            line = summary_line(summary)
            logger.info(f"iteration {self.iter + 1}: {line} ({weights}{name})")

    def state_dict(self):
        # detectron2 0.6 leaves out the optimizer; today's main has it under the same key.
        state = {**super().state_dict(), "_trainer": self._trainer.state_dict()}
        # After the last iteration it is one more.
        state["iteration"] = min(self.iter, self.max_iter - 1)
        return {**state, "seed": self.seed}

    def load_state_dict(self, state_dict):
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        self.seed = state_dict["seed"]

    @classmethod
    def build_model(cls, cfg):
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_multilabel_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = DatasetMapperTTA(cfg) if cfg.TEST.AUG.ENABLED else None
        loader = build_multilabel_test_loader(cfg, dataset_name, mapper)
        return ProgressBar(
            loader,
            f"evaluation on {dataset_name}: batch",
            unit="it",
            leave=False,
            # A short evaluation shows no bar.
            delay=SHORTEST,
            disable=not comm.is_main_process(),
        )

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """As DefaultTrainer's; with TEST.AUG.ENABLED, on several views of each image."""
        if cfg.TEST.AUG.ENABLED:
            model = MultiLabelTTA(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluators(cls, cfg, label_counts=None) -> List[DatasetEvaluator]:
        """Those of DATASETS.TEST, for `test`; see `MultiLabelEvaluator` for label_counts."""
        return [cls.build_evaluator(cfg, name, label_counts) for name in cfg.DATASETS.TEST]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, label_counts=None):
        return MultiLabelEvaluator(
            dataset_name,
            os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
            threshold=cfg.TEST.THRESHOLD,
            top_k=cfg.TEST.TOP_K or None,
            conventions=MultiLabelEvaluator.conventions_of(cfg),
            label_counts=label_counts,
            frequency_groups=cfg.TEST.FREQUENCY_GROUPS,
            report=describe_model(cfg) if cfg.TEST.REPORT else None,
            memory_limit=cfg.TEST.MEMORY_LIMIT,
        )


def describe_model(cfg: CfgNode) -> Dict[str, str]:
    """The report's lines on the model that is evaluated: MODEL.WEIGHTS is its checkpoint."""
    backbone = cfg.MODEL.BACKBONE.NAME
    if backbone == "build_timm_backbone":
        backbone = cfg.MODEL.TIMM.NAME
    ema = " (EMA of the weights)" if cfg.TEST.EMA else ""
    views = len(cfg.TEST.AUG.SCALES) * (1 + cfg.TEST.AUG.FLIP) if cfg.TEST.AUG.ENABLED else 1
    share = cfg.TEST.KNOWN_LABELS
    measured = "" if cfg.TEST.KNOWN_LABELS_IN_F1 else ", not measured"
    known = {"Labels that were known": f"{share:.0%} of each image's{measured}"}
    return {
        "Model": f"{cfg.MODEL.META_ARCHITECTURE} with {cfg.MODEL.LABEL_HEAD.NAME}",
        "Backbone": backbone,
        "Checkpoint": f"{cfg.MODEL.WEIGHTS}{ema}",
        "Image size": " × ".join(map(str, cfg.INPUT.IMAGE_SIZE)),
        "Views of an image": str(views),
        **(known if share else {}),
    }


def check_labels(cfg: CfgNode) -> List[str]:
    """The label names of all of the config's data sets.

    Raises:
        InputError: there is no data set, their labels differ, or MODEL.LABEL_HEAD.NUM_LABELS is
            another number.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    label_names = get_label_names(names)
    if len(label_names) != cfg.MODEL.LABEL_HEAD.NUM_LABELS:
        raise InputError(
            f"MODEL.LABEL_HEAD.NUM_LABELS is {cfg.MODEL.LABEL_HEAD.NUM_LABELS}, and {names[0]} has "
            f"{len(label_names)} labels"
        )
    return label_names


def fill_label_graph(
    cfg: CfgNode, model: nn.Module, dataset: Sequence[Dict], label_names: Sequence[str]
) -> None:
    """Fill a recogniser's label graph, if it has one, from the training set.

    It gets the label embeddings and, if a head needs them, the label statistics, which are kept as
    label_statistics.npz in OUTPUT_DIR.
    """
    graph = model.label_graph
    if graph is None:
        return
    statistics = None, None
    if graph.has_statistics:
        path = os.path.join(cfg.OUTPUT_DIR, "label_statistics.npz")
        statistics = cached_label_statistics(dataset, label_names, path)
    source = cfg.MODEL.LABEL_EMBEDDINGS
    embeddings = label_embeddings(
        label_names, source.SOURCE, source.DIM, source.ALIASES, source.NORM
    )
    graph.fill(*statistics, embeddings)


def fill_label_prior(cfg: CfgNode, model: nn.Module, dataset: Sequence[Dict]) -> None:
    """Fit a recogniser's label prior, if it has one, to the labels of the training set.

    Raises:
        InputError: it is not to be trained.
    """
    prior = model.label_prior
    if prior is None:
        return
    if not cfg.MODEL.LABEL_PRIOR.TRAINED:
        raise InputError(
            f"MODEL.LABEL_PRIOR.NAME is {cfg.MODEL.LABEL_PRIOR.NAME}: a training needs "
            "MODEL.LABEL_PRIOR.TRAINED True; tools/fit_label_prior.py adds a prior to a model that "
            "is trained"
        )
    labels = LabelSets.of(*label_matrices(dataset, cfg.MODEL.LABEL_HEAD.NUM_LABELS))
    prior.load_state_dict(fit_like(prior, labels).state_dict())


def fill_loss(
    cfg: CfgNode,
    model: nn.Module,
    num_images: int,
    present: Sequence[int],
    absent: Sequence[int],
    label_names: Sequence[str],
) -> None:
    """Give a recogniser's loss the label counts, if it needs them.

    Args:
        num_images: of the training set.
        present, absent: (C,), in how many of them each label is known to be there, or not.
        label_names: C names.
    Raises:
        InputError: MODEL.LOSS.LABEL_COUNTS is no predictions.npz, or has other labels.
    """
    if "label_counts" not in model.criterion.needs:
        return
    counts = present, absent
    if cfg.MODEL.LOSS.LABEL_COUNTS:
        counts = expected_counts(cfg.MODEL.LOSS.LABEL_COUNTS, label_names)
    counts = (torch.as_tensor(count, dtype=torch.float64) for count in counts)
    model.criterion.loss.fill(num_images, *counts)


def expected_counts(path: str, label_names: Sequence[str]) -> Tuple[torch.Tensor, torch.Tensor]:
    """How many images have each label, and how many have not, as a model sees it.

    Args:
        path: of a predictions.npz.
        label_names: C names.
    Returns:
        (C,) float64 each, sums of the scores and of 1 - scores.
    """
    predictions = read_predictions(path)
    if predictions.label_names != list(label_names):
        mismatch = describe_mismatch(predictions.label_names, list(label_names))
        raise InputError(f"MODEL.LOSS.LABEL_COUNTS: {path} {mismatch} than the training set")
    present = np.zeros(len(label_names))
    for labels, (scores,) in label_blocks(predictions.scores):
        present[labels] = scores.sum(axis=1, dtype=np.float64)
    return torch.from_numpy(present), torch.from_numpy(len(predictions.scores) - present)


def use_buffers_of_main_process(model: nn.Module) -> None:
    """Give all processes the buffers that are saved.

    In training, the statistics of batch norms are each process's own.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrap_in_ddp(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, on GPUs or not, where there are several processes."""
    if comm.get_world_size() == 1:
        return model
    device_ids = [comm.get_local_rank()] if model.device.type == "cuda" else None
    # Its name in newer versions of torch.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
        find_unused_parameters=model.has_unused_parameters,
    )
