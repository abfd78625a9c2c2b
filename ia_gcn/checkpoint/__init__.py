from .checkpointer import MultiLabelCheckpointer, read_checkpoint
from .torchvision_resnet import convert_torchvision_resnet

__all__ = ["MultiLabelCheckpointer", "convert_torchvision_resnet", "read_checkpoint"]
