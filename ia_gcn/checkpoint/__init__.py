from .checkpointer import MultiLabelCheckpointer
from .torchvision_resnet import convert_torchvision_resnet

__all__ = ["MultiLabelCheckpointer", "convert_torchvision_resnet"]
