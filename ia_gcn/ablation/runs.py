"""The runs of an ablation: each in a process of its own, one line of results each."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Dict, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ..checkpoint import build_model
from ..data import get_label_names, get_multilabel_dicts
from ..data.dataset_mapper import target_vector
from ..engine import Trainer, fill_label_graph, fill_label_prior, fill_loss
from ..engine.frozen_features import FrozenFeatures, HeadsOnFeatures, train_heads
from ..engine.schedule import epochs_to_iterations
from ..errors import InputError
from ..evaluation import MultiLabelEvaluator, multi_label_metrics
from ..io.files import append_line, read_lines
from .spec import Run, Spec
from .start import Start, check_runs, prepare, run_cfg

MEASURES = ("mAP", "CF1", "OF1")


def run_ablation(
    spec: Spec,
    output: Path,
    runs: Dict[str, Run],
    *,
    jobs: int = 2,
    threads: int = 1,
    imports: Sequence[str] = (),
) -> int:
    """Run the runs that have no result in the folder; returns how many failed.

    Args:
        runs: by their names in messages, as `Spec.runs` returns them.
        jobs: runs at once, each in a process of its own.
        threads: of torch, in each run.
        imports: modules of the user's own, for each process.
    Raises:
        InputError: a row can't be run; nothing was trained then.
    """
    start = Start(output)
    output.mkdir(parents=True, exist_ok=True)
    done = read_results(output)
    todo = {name: run for name, run in runs.items() if run.key not in done}
    if not todo:
        return 0
    needs = check_runs(spec, todo, start, imports)
    in_new_process(prepare, spec, todo, start, needs, imports)
    failed = 0
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(todo), unit=" runs", smoothing=0.05) as progress,
    ):
        futures = {
            pool.submit(in_new_process, run_one, run, spec, start, threads, imports): name
            for name, run in todo.items()
        }
        for future in as_completed(futures):
            name = futures[future]
            try:
                append_result(output, future.result())
                progress.set_postfix_str(name)
            except (InputError, FloatingPointError, BrokenProcessPool) as error:
                failed += 1
                log = run_folder(todo[name], output) / "log.txt"
                progress.write(f"ablate: {name} failed, see {log}: {error}", sys.stderr)
            progress.update()
    return failed


def in_new_process(function: Callable, *args):
    """function(*args) in a new process."""
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def run_one(run: Run, spec: Spec, start: Start, threads: int, imports: Sequence[str]) -> Dict:
    """Train and measure; all output goes to the run's log.txt.

    Returns:
        the figures in percent, for results.jsonl.
    """
    torch.set_num_threads(threads)
    folder = run_folder(run, start.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        begin = time.perf_counter()
        cfg = run_cfg(run, spec, start, folder, imports)
        figures = {"heads": run_heads, "train": run_training}[run.mode](cfg, spec, start)
        seconds = time.perf_counter() - begin
    return {**run._asdict(), **figures, "seconds": round(seconds, 1), "torch": torch.__version__}


def run_folder(run: Run, output: Path) -> Path:
    return output / "runs" / run.key


def run_heads(cfg: CfgNode, spec: Spec, start: Start) -> Dict:
    """Train the heads on frozen features, and measure them on the test images."""
    train, test = (
        FrozenFeatures.load(str(start.features(name))) for name in (spec.train, spec.test)
    )
    heads, storage = train_on_features(cfg, settle_targets(cfg, train))
    return {
        **measure_heads(heads, test, cfg),
        "train": measure_heads(heads, train, cfg),
        "regions": region_figures(storage),
    }


def train_on_features(cfg: CfgNode, train: FrozenFeatures, dicts: Sequence[Dict] | None = None):
    """What `train_heads` returns, of a new model of a run's config.

    Args:
        train: features of training images.
        dicts: the images whose labels the label graph is made of; None: those of DATASETS.TRAIN.
    """
    epochs_to_iterations(cfg, len(train.targets))
    seed_all_rng(cfg.SEED)
    # Its network is not used.
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    model = build_model(cfg)
    label_names = get_label_names(cfg.DATASETS.TRAIN)
    if dicts is None:
        dicts = get_multilabel_dicts(cfg.DATASETS.TRAIN, ignored=cfg.DATASETS.IGNORED_LABELS)
    fill_label_graph(cfg, model, dicts, label_names)
    fill_label_prior(cfg, model, dicts)
    present, absent = ((train.targets == state).sum(dim=0) for state in (1, 0))
    fill_loss(cfg, model, len(train.targets), present, absent, label_names)
    return train_heads(cfg, model, train)


def settle_targets(cfg: CfgNode, train: FrozenFeatures) -> FrozenFeatures:
    """The features of DATASETS.TRAIN with targets as DATASETS.IGNORED_LABELS has them."""
    if cfg.DATASETS.IGNORED_LABELS == "nowhere":
        return train
    dicts = get_multilabel_dicts(cfg.DATASETS.TRAIN, ignored=cfg.DATASETS.IGNORED_LABELS)
    targets = [target_vector(record, train.targets.shape[1]) for record in dicts]
    return train._replace(targets=torch.stack(targets))


def measure_heads(heads: HeadsOnFeatures, features: FrozenFeatures, cfg: CfgNode) -> Dict:
    scores = heads.predict(features).sigmoid().numpy()
    targets = features.targets.numpy().astype(int)
    conventions = MultiLabelEvaluator.conventions_of(cfg)
    found = multi_label_metrics(scores, targets, cfg.TEST.THRESHOLD, conventions=conventions)
    return {name: found[name] for name in MEASURES}


def run_training(cfg: CfgNode, spec: Spec, start: Start) -> Dict:
    """Train everything, and measure it on the test and on the training images."""
    setup_logger(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="ia_gcn")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    # A run that was interrupted after its last iteration has no result yet.
    results = getattr(trainer, "_last_eval_results", None) or trainer.evaluate()
    found, train = (
        {name: results[dataset]["multi_label"][name] for name in MEASURES}
        for dataset in cfg.DATASETS.TEST
    )
    return {**found, "train": train, "regions": region_figures(trainer.storage)}


def region_figures(storage: EventStorage) -> Dict:
    """|µ|, σ, the KL and the mean of a at the end of the training, where there is a region branch.

    They are means over its last 50 iterations.
    """
    histories = storage.histories()
    return {
        key.partition("/")[2]: histories[key].avg(50)
        for key in histories
        if key.startswith("regions/")
    }


def results_file(output: Path) -> Path:
    return output / "results.jsonl"


def append_result(output: Path, result: Dict) -> None:
    append_line(results_file(output), json.dumps(result, ensure_ascii=False))


def read_results(output: Path) -> Dict[str, Dict]:
    """The results that are there, by the keys of their runs; a torn last line is left out.

    Raises:
        InputError: a line is no result, or is of version 0.1, whose results lack the config.
    """
    path = results_file(output)
    if not path.exists():
        return {}
    results = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            result = json.loads(line)
            results[result["key"]] = result
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: not a result: {error!r}") from None
    return results
