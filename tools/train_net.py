#!/usr/bin/env python3
"""Train and evaluate a multi-label recogniser.

Examples:
  train on the demo's data set:
    tools/train_net.py --config-file configs/DigitScenes/ia_gcn_plus.yaml
  train on eight GPUs:
    tools/train_net.py --config-file configs/COCO/ia_gcn_R_101.yaml --num-gpus 8
  go on with a run that was cut:
    tools/train_net.py --config-file ... --resume
  evaluate a checkpoint:
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_best.pth
  the same on data with some of its labels, or with its labels in another order:
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_best.pth \\
        DATASETS.MATCH_LABELS_BY_NAME True DATASETS.CUSTOM.TEST other.json \\
        DATASETS.CUSTOM.IMAGE_ROOT photos
  the same as the mean over mirrored and larger views of each image:
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_best.pth \\
        TEST.AUG.ENABLED True TEST.AUG.SCALES "(1.0, 1.25)"
  your own data (COCO-format JSON, or CSV with file,label;label):
    tools/train_net.py --config-file ... DATASETS.CUSTOM.TRAIN train.csv \\
        DATASETS.CUSTOM.TEST test.csv DATASETS.CUSTOM.IMAGE_ROOT photos
  several machines:
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/train_net.py --config-file ...
"""

import sys

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ia_gcn.checkpoint import load_model
from ia_gcn.data import get_label_names
from ia_gcn.engine import (
    Trainer,
    checkpoint_labels,
    launch,
    match_labels,
    setup_cfg,
    weights_path,
)
from ia_gcn.errors import InputError
from ia_gcn.inference import SelectLabels, optimize_for_inference


def train(cfg, resume: bool) -> None:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()


def evaluate(cfg, resume: bool) -> None:
    if not cfg.DATASETS.TEST:
        raise InputError("--eval-only: DATASETS.TEST is empty")
    path = weights_path(cfg, resume)
    label_names = get_label_names(cfg.DATASETS.TEST)
    trained = checkpoint_labels(path)
    chosen = match_labels(label_names, trained, cfg.DATASETS.MATCH_LABELS_BY_NAME, path)
    trained = trained or label_names
    model_cfg = with_num_labels(cfg, len(trained))
    model = load_model(model_cfg, trained, path=path, ema=cfg.TEST.EMA)
    if cfg.TEST.OPTIMIZE_MODEL:
        model = optimize_for_inference(model)
    if label_names != trained:
        model = SelectLabels(model, chosen)
    cfg = with_num_labels(cfg, len(label_names))
    cfg.defrost()
    # Of the last checkpoint, --resume knows the path.
    cfg.MODEL.WEIGHTS = path
    cfg.freeze()
    Trainer.test(cfg, model)


def with_num_labels(cfg, num_labels: int):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = num_labels
    cfg.freeze()
    return cfg


def main(args) -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    try:
        cfg = setup_cfg(args.config_file, args.opts, eval_only=args.eval_only, resume=args.resume)
        cfg.freeze()
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ia_gcn")
        (evaluate if args.eval_only else train)(cfg, args.resume)
    except (InputError, FloatingPointError) as error:
        print(f"train_net: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    sys.exit(
        launch(
            main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,)
        )
    )
