from .defaults import setup_cfg
from .hooks import BestCheckpointer, SeedEveryStep, StopOnBadLoss
from .launch import launch
from .schedule import build_lr_scheduler, build_optimizer, epochs_to_iterations
from .trainer import Trainer, check_labels, fill_label_graphs, label_graphs

__all__ = [
    "BestCheckpointer",
    "SeedEveryStep",
    "StopOnBadLoss",
    "Trainer",
    "build_lr_scheduler",
    "build_optimizer",
    "check_labels",
    "epochs_to_iterations",
    "fill_label_graphs",
    "label_graphs",
    "launch",
    "setup_cfg",
]
