from .checkpointer import MultiLabelCheckpointer, read_checkpoint
from .loading import build_model, load_model
from .other_labels import scored_labels
from .resuming import find_resumable, last_checkpoint, periodic_checkpoints
from .torchvision_resnet import convert_torchvision_resnet

__all__ = [
    "MultiLabelCheckpointer",
    "build_model",
    "convert_torchvision_resnet",
    "find_resumable",
    "last_checkpoint",
    "load_model",
    "periodic_checkpoints",
    "read_checkpoint",
    "scored_labels",
]
