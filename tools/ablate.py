#!/usr/bin/env python3
"""Compare configs over several seeds: a process per run, paired differences, tables and plots.

A file of tables (configs/ablations/) says what is compared. One network is trained first; all rows
start from it, and are trained on images that it has not seen, in one of two ways:
  heads  on its frozen features, computed once: seconds a run, so as many seeds as it takes
  train  everything, on images: what the heads do to the network is part of what is compared
Results go to OUTPUT/results.jsonl, a line per run. What is there is not run again: a run that was
cut, or more seeds and tables, is the same command once more.

Examples:
  what there is to run:
    tools/ablate.py list
  IA-GCN's tables, five seeds each, on frozen features:
    tools/ablate.py run --tables parts,branches --seeds 1-5
  the same with everything trained:
    tools/ablate.py run --tables parts,branches --seeds 1-3 --mode train
  tables and plots of what was run:
    tools/ablate.py report
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import yaml
from benchmarks.arguments import positive
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from tqdm import tqdm

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.data import (
    MultiLabelDatasetMapper,
    build_multilabel_test_loader,
    get_label_names,
    get_multilabel_dicts,
)
from ia_gcn.engine import Trainer, fill_label_graph, setup_cfg
from ia_gcn.engine.frozen_features import (
    FrozenFeatures,
    HeadsOnFeatures,
    extract_features,
    train_heads,
)
from ia_gcn.engine.schedule import epochs_to_iterations
from ia_gcn.errors import InputError
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.evaluation.comparison import (
    draw_curve,
    draw_rows,
    mean_and_deviation,
    paired_difference,
)

TOOLS = Path(__file__).parent
MODES = ("heads", "train")
SPEC = "configs/ablations/digit_scenes.yaml"
MEASURES = ("mAP", "CF1", "OF1")

# ------------------------------------------------------------------------------ what is to be run


class Run(NamedTuple):
    """One training. Two with the same settings are the same, in whichever table they stand."""

    mode: str
    config: str
    opts: Dict
    seed: int

    @property
    def key(self) -> str:
        return json.dumps(self, sort_keys=True)


class Row(NamedTuple):
    name: str
    config: str
    opts: Dict


class Table(NamedTuple):
    title: str
    rows: List[Row]
    compare: str
    """above or first: which row each is compared with."""
    x: str
    """What the rows' names are if they are numbers, else empty."""
    published: Dict[str, Dict[str, float]]
    """The paper's mAP in percent, by data set and by row."""


class Spec(NamedTuple):
    """A file of tables, see configs/ablations/digit_scenes.yaml."""

    opts: Dict
    network: Dict
    train: str
    test: str
    modes: Dict[str, Dict]
    tables: Dict[str, Table]

    def run(self, mode: str, row: Row, seed: int) -> Run:
        return Run(mode, row.config, {**self.opts, **self.modes[mode], **row.opts}, seed)


def read_spec(path: str) -> Spec:
    """
    Raises:
        InputError: there is no such file, or it is not as it must be.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        tables = {
            name: Table(
                table["title"],
                [
                    Row(str(row_name), row["config"], row.get("opts", {}))
                    for row_name, row in table["rows"].items()
                ],
                table.get("compare", "above"),
                table.get("x", ""),
                table.get("published", {}),
            )
            for name, table in content["tables"].items()
        }
        keys = ("opts", "network", "train", "test", "modes")
        if set(content["modes"]) != set(MODES):
            raise KeyError(f"modes must be {' and '.join(MODES)}")
        return Spec(*(content[key] for key in keys), tables)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--spec {path}: {' '.join(str(error).split())}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"--spec {path}: not a file of tables: {error!r}") from error


def as_list(opts: Dict, output: Path) -> List:
    """Keys and values as a config takes them; {output} in a text becomes the folder."""
    return [
        item.format(output=output) if isinstance(item, str) else item
        for pair in opts.items()
        for item in pair
    ]


# --------------------------------------------------------------------- what all rows start from


class Start(NamedTuple):
    """The files of OUTPUT that are made once."""

    output: Path

    @property
    def checkpoint(self) -> Path:
        return self.output / "network" / "model_final.pth"

    @property
    def network(self) -> Path:
        """Of the checkpoint, what does not belong to the heads."""
        return self.output / "network" / "network.pth"

    @property
    def label_embeddings(self) -> Path:
        return self.output / "network" / "label_embeddings.npz"

    def features(self, dataset: str) -> Path:
        return self.output / "network" / f"{dataset}.safetensors"


def prepare(spec: Spec, start: Start) -> None:
    """Train the network, and make label embeddings and features with it, as far as they lack."""
    config = ["--config-file", spec.network["config"]]
    opts = {**spec.opts, **spec.network["opts"]}
    opts = [str(item) for item in as_list(opts, start.output)]
    folder = ["OUTPUT_DIR", str(start.checkpoint.parent)]
    if not start.checkpoint.exists():
        call("train_net.py", *config, "--resume", *opts, *folder)
    if not start.label_embeddings.exists():
        weights = ["--weights", str(start.checkpoint), "--kind", "scores"]
        weights += ["--output", str(start.label_embeddings)]
        call("build_label_embeddings.py", *config, *weights, *opts, "DATASETS.TRAIN", [spec.train])
    # Written after the features: where it is, they are whole.
    if not start.network.exists():
        write_features(spec, start, [*opts, *folder])


def call(tool: str, *args) -> None:
    """Run another of these tools.

    Raises:
        InputError: it failed; it has said why.
    """
    command = [sys.executable, str(TOOLS / tool), *map(str, args)]
    if subprocess.call(command):
        raise InputError(f"failed: {shlex.join(command)}")


def write_features(spec: Spec, start: Start, opts: Sequence) -> None:
    """Features of the training and test images, and the network without its heads."""
    cfg = setup_cfg(spec.network["config"], [*opts, "MODEL.WEIGHTS", str(start.checkpoint)])
    model = Trainer.build_model(cfg)
    names = get_label_names([spec.train, spec.test])
    MultiLabelCheckpointer(model, label_names=names).load(cfg.MODEL.WEIGHTS)
    for dataset in (spec.train, spec.test):
        loader = build_multilabel_test_loader(
            dataset=get_multilabel_dicts([dataset]),
            mapper=MultiLabelDatasetMapper(cfg, is_train=False),
            batch_size=cfg.TEST.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            max_unreadable=0,
        )
        progress = tqdm(loader, f"features of {dataset}", disable=None)
        extract_features(model, progress).save(str(start.features(dataset)))
    state = model.state_dict()
    kept = {name: state[name] for name in state if name.startswith(model.network)}
    torch.save({"model": kept, "label_names": names}, start.network)


# ----------------------------------------------------------------------------------------- a run


def run_one(run: Run, spec: Spec, start: Start, threads: int) -> Dict:
    """Train and measure, in a process of its own; what it says goes to the run's log.txt.

    Returns:
        the figures in percent, for `results.jsonl`.
    """
    torch.set_num_threads(threads)
    folder = run_folder(run, start.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        begin = time.perf_counter()
        cfg = run_cfg(run, spec, start, folder)
        figures = {"heads": run_heads, "train": run_training}[run.mode](cfg, spec, start)
        seconds = time.perf_counter() - begin
    return {**run._asdict(), **figures, "seconds": round(seconds, 1), "torch": torch.__version__}


def run_folder(run: Run, output: Path) -> Path:
    return output / "runs" / hashlib.sha256(run.key.encode()).hexdigest()[:12]


def run_cfg(run: Run, spec: Spec, start: Start, folder: Path) -> CfgNode:
    opts = as_list(run.opts, start.output)
    opts += ["SEED", run.seed, "OUTPUT_DIR", str(folder), "MODEL.WEIGHTS", str(start.network)]
    opts += ["DATASETS.TRAIN", [spec.train], "DATASETS.TEST", [spec.test, spec.train]]
    # One evaluation, at the end.
    opts += ["TEST.EVAL_EPOCHS", 0, "SOLVER.CHECKPOINT_EPOCHS", 1]
    return setup_cfg(run.config, opts)


def run_heads(cfg: CfgNode, spec: Spec, start: Start) -> Dict:
    train, test = (
        FrozenFeatures.load(str(start.features(name))) for name in (spec.train, spec.test)
    )
    epochs_to_iterations(cfg, len(train.targets))
    seed_all_rng(cfg.SEED)
    model = Trainer.build_model(cfg)
    label_names = get_label_names(cfg.DATASETS.TRAIN)
    fill_label_graph(cfg, model, get_multilabel_dicts(cfg.DATASETS.TRAIN), label_names)
    heads, storage = train_heads(cfg, model, train)
    return {
        **measure_heads(heads, test, cfg),
        "train": measure_heads(heads, train, cfg),
        "regions": region_figures(storage),
    }


def measure_heads(heads: HeadsOnFeatures, features: FrozenFeatures, cfg: CfgNode) -> Dict:
    scores = heads.predict(features).sigmoid().numpy()
    targets = features.targets.numpy().astype(int)
    found = multi_label_metrics(scores, targets, threshold=cfg.TEST.THRESHOLD)
    return {name: found[name] for name in MEASURES}


def run_training(cfg: CfgNode, spec: Spec, start: Start) -> Dict:
    setup_logger(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="ia_gcn")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    # Of a run that had been cut after its last iteration, there is no result yet.
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


# ------------------------------------------------------------------------------------- many runs


def run_all(args) -> int:
    """Run what lacks of the tables asked for; returns the exit status."""
    spec, start = read_spec(args.spec), Start(args.output)
    tables = choose(spec, args.tables)
    args.output.mkdir(parents=True, exist_ok=True)
    done = {key for key, _ in read_results(args.output)}
    wanted = {
        run.key: (run, f"{name}: {row.name}, seed {seed}")
        # Seed by seed: what is cut short has all rows of some seeds.
        for seed in args.seeds
        for name, table in tables.items()
        for row in table.rows
        for run in [spec.run(args.mode, row, seed)]
    }
    todo = [wanted[key] for key in wanted if key not in done]
    if not todo:
        print(f"{args.output}: all {len(wanted)} runs are there; tools/ablate.py report shows them")
        return 0
    prepare(spec, start)
    failed = 0
    with (
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=len(todo), unit=" runs", smoothing=0.05) as progress,
    ):
        futures = {
            pool.submit(in_new_process, run_one, run, spec, start, args.threads): (run, what)
            for run, what in todo
        }
        for future in as_completed(futures):
            run, what = futures[future]
            try:
                append_result(args.output, future.result())
                progress.set_postfix_str(what)
            except (InputError, FloatingPointError, BrokenProcessPool) as error:
                failed += 1
                log = run_folder(run, args.output) / "log.txt"
                progress.write(f"ablate: {what} failed, see {log}: {error}", sys.stderr)
            progress.update()
    print(f"{len(todo) - failed} of {len(todo)} runs are in {results_file(args.output)}")
    return 1 if failed else 0


def in_new_process(function: Callable, *args):
    """function(*args) in a process that has imported this file and done nothing else."""
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def choose(spec: Spec, names: str) -> Dict[str, Table]:
    chosen = names.split(",") if names else list(spec.tables)
    unknown = [name for name in chosen if name not in spec.tables]
    if unknown:
        raise InputError(f"--tables {unknown[0]}: must be of {', '.join(spec.tables)}")
    return {name: spec.tables[name] for name in chosen}


def results_file(output: Path) -> Path:
    return output / "results.jsonl"


def append_result(output: Path, result: Dict) -> None:
    with open(results_file(output), "a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


def read_results(output: Path) -> List[Tuple[str, Dict]]:
    """The results that are there, each with the key of its run."""
    path = results_file(output)
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            result = json.loads(line)
            results.append((Run(*(result[field] for field in Run._fields)).key, result))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: not a result: {error!r}") from None
    return results


# --------------------------------------------------------------------------------------- report

# A table's rows, each with its results by seed.
Rows = List[Tuple[Row, Dict[int, Dict]]]


def report(args) -> int:
    """Print the tables of what was run, and draw them into OUTPUT/plots/."""
    spec = read_spec(args.spec)
    results = dict(read_results(args.output))
    plots = args.output / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    shown = 0
    for name, table in choose(spec, args.tables).items():
        for mode in spec.modes:
            rows = [(row, row_results(results, spec.run(mode, row, seed=0))) for row in table.rows]
            rows = [(row, found) for row, found in rows if found]
            # One alone compares nothing; it may stand in many tables.
            if len(rows) > 1:
                shown += 1
                print(f"### {table.title} ({mode})\n\n{markdown(rows, table)}\n")
                draw(rows, table, str(plots / f"{name}_{mode}.png"))
    if not shown:
        raise InputError(f"{args.output}: no two rows of a table were run")
    return 0


def row_results(results: Dict[str, Dict], run: Run) -> Dict[int, Dict]:
    """A row's results by seed."""
    seeds = sorted({result["seed"] for result in results.values()})
    keys = {seed: run._replace(seed=seed).key for seed in seeds}
    return {seed: results[key] for seed, key in keys.items() if key in results}


def markdown(rows: Rows, table: Table) -> str:
    """Means and deviations of each row, and the paired difference of its mAP to another row."""
    maps = [{seed: result["mAP"] for seed, result in found.items()} for _, found in rows]
    shown = [key for key in REGION_FIGURES if any(mean_of(found, key) for _, found in rows)]
    grid = []
    for place, (row, found) in enumerate(rows):
        others = maps[max(place - 1, 0) if table.compare == "above" else 0]
        difference = paired_difference(others, maps[place]) if place else "–"
        values = list(found.values())
        grid.append(
            [
                row.name,
                *(figures.get(row.name, "–") for figures in table.published.values()),
                *(mean_and_deviation([value[measure] for value in values]) for measure in MEASURES),
                difference,
                mean_and_deviation([value["train"]["mAP"] for value in values]),
                *(mean_of(found, key) or "–" for key in shown),
                len(values),
            ]
        )
    to = "the row above" if table.compare == "above" else rows[0][0].name
    headers = ["", *(f"published {name}" for name in table.published), *MEASURES]
    headers += [f"mAP against {to}", "mAP in training"]
    headers += [*(REGION_FIGURES[key] for key in shown), "seeds"]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(grid, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


# A bar of its own would end a cell.
REGION_FIGURES = {"mean_abs_mu": r"\|µ\|", "mean_sigma": "σ", "kl": "KL", "mean_presence": "mean a"}


def mean_of(found: Dict[int, Dict], key: str) -> str:
    """Of one of REGION_FIGURES; empty where there is none."""
    values = [result["regions"][key] for result in found.values() if key in result["regions"]]
    return f"{np.mean(values):.3g}" if values else ""


def draw(rows: Rows, table: Table, path: str) -> None:
    values = {row.name: [result["mAP"] for result in found.values()] for row, found in rows}
    if table.x:
        numbers = {float(name): points for name, points in values.items()}
        draw_curve(numbers, table.title, table.x, path)
    else:
        draw_rows(values, table.title, path)


def list_tables(args) -> int:
    """Print the tables and their rows."""
    for name, table in choose(read_spec(args.spec), args.tables).items():
        print(f"{name}: {table.title}")
        for row in table.rows:
            opts = shlex.join(map(str, as_list(row.opts, args.output)))
            print(f"  {row.name}: {row.config} {opts}".rstrip())
    return 0


# ----------------------------------------------------------------------------------- command line


def seeds(text: str) -> List[int]:
    """An argparse type: 1,2,3 or 1-3."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: no seed")
    return found


def parse_arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--spec", default=SPEC, help="the file of tables (default %(default)s)")
    common.add_argument("--tables", default="", metavar="NAME,...", help="default: all of them")
    common.add_argument(
        "--output", type=Path, default=Path("output/ablation"), help="default %(default)s"
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    for name, function in (("list", list_tables), ("run", run_all), ("report", report)):
        text = inspect.getdoc(function).partition(";")[0]
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(function=function)
        if function is run_all:
            command.add_argument("--mode", choices=MODES, default="heads", help="default heads")
            command.add_argument("--seeds", type=seeds, default="1-3", help="default 1-3")
            command.add_argument(
                "--jobs", type=positive, default=2, help="runs at once (default 2)"
            )
            command.add_argument(
                "--threads", type=positive, default=1, help="of torch, in each run (default 1)"
            )
    return parser.parse_args()


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    args = parse_arguments()
    try:
        return args.function(args)
    except (InputError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ablate: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
