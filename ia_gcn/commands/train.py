"""Train and evaluate a multi-label recogniser.

Examples:
  train on the demo's data set:
    tools/train_net.py --config-file configs/DigitScenes/ia_gcn_plus.yaml
  train on eight GPUs:
    tools/train_net.py --config-file configs/COCO/ia_gcn_R_101.yaml --num-gpus 8
  resume a run that was interrupted:
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
  several machines (the same on each; docs/training.md says what to set if one may be lost):
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint host1:29500 \\
        tools/train_net.py --config-file ...

`ia-gcn train` is the same as tools/train_net.py, and `ia-gcn evaluate` the same with --eval-only.
"""

from __future__ import annotations

import argparse
from typing import Sequence

from detectron2.engine import default_argument_parser

from ..engine import Trainer, evaluate_checkpoint, launch, setup_cfg, setup_run, sole_training
from .common import add_import_option, run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = default_argument_parser(epilog=__doc__)
    # A free port, where detectron2 has the same one for all jobs of a user.
    parser.set_defaults(dist_url="auto")
    add_import_option(parser)
    parser.add_argument("--verbose", action="store_true", help="print everything that log.txt gets")
    args = parser.parse_args(argv)
    machines = args.num_machines, args.machine_rank, args.dist_url
    return run(
        "train",
        lambda: launch(_work, args.num_gpus, *machines, args=(args,)),
        go_on="" if args.eval_only else "--resume continues from the last checkpoint",
    )


def _work(args: argparse.Namespace) -> int:
    """The work of each process."""
    cfg = setup_cfg(
        args.config_file,
        args.opts,
        eval_only=args.eval_only,
        resume=args.resume,
        imports=args.imports,
    )
    cfg.freeze()
    if args.eval_only:
        setup_run(cfg, args, args.verbose)
        evaluate_checkpoint(cfg, args.resume)
        return 0
    # Before anything is written there.
    with sole_training(cfg.OUTPUT_DIR):
        setup_run(cfg, args, args.verbose)
        trainer = Trainer(cfg)
        trainer.resume_or_load(args.resume)
        trainer.train()
    return 0
