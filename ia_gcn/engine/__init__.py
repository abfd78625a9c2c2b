from .defaults import make_config, setup_cfg
from .evaluation import evaluate_checkpoint
from .hooks import BestCheckpointer, SeedEveryStep, StopOnBadLoss
from .label_matching import checkpoint_labels, match_labels, weights_path
from .launch import launch
from .logs import setup_logging, setup_run
from .output_lock import sole_training
from .schedule import build_lr_scheduler, build_optimizer, epochs_to_iterations
from .trainer import Trainer, check_labels, fill_label_graph, fill_label_prior, fill_loss

__all__ = [
    "BestCheckpointer",
    "SeedEveryStep",
    "StopOnBadLoss",
    "Trainer",
    "build_lr_scheduler",
    "build_optimizer",
    "check_labels",
    "checkpoint_labels",
    "epochs_to_iterations",
    "evaluate_checkpoint",
    "fill_label_graph",
    "fill_label_prior",
    "fill_loss",
    "launch",
    "make_config",
    "match_labels",
    "setup_cfg",
    "setup_logging",
    "setup_run",
    "sole_training",
    "weights_path",
]
