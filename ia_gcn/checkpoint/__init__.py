from .checkpointer import MultiLabelCheckpointer, read_checkpoint
from .loading import build_model, load_model
from .torchvision_resnet import convert_torchvision_resnet

__all__ = [
    "MultiLabelCheckpointer",
    "build_model",
    "convert_torchvision_resnet",
    "load_model",
    "read_checkpoint",
]
