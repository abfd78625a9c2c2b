from .defaults import setup_cfg
from .hooks import BestCheckpointer, SeedEveryStep, StopOnBadLoss
from .label_matching import checkpoint_labels, match_labels, weights_path
from .launch import launch
from .schedule import build_lr_scheduler, build_optimizer, epochs_to_iterations
from .trainer import Trainer, check_labels, fill_label_graph

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
    "fill_label_graph",
    "launch",
    "match_labels",
    "setup_cfg",
    "weights_path",
]
