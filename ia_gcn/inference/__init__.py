"""Using a trained model: on images, from a checkpoint or from an exported file.

Where torch or detectron2 is missing, there is `OnnxPredictor` in place of `MultiLabelPredictor`.
"""

from importlib.util import find_spec

from .distributed import predict_dataset
from .files import FilePrediction, find_images, predict_files
from .loading import load_predictor
from .onnx_predictor import OnnxPredictor
from .prediction import PredictedRegions, Prediction

__all__ = [
    "FilePrediction",
    "OnnxPredictor",
    "PredictedRegions",
    "Prediction",
    "find_images",
    "load_predictor",
    "predict_dataset",
    "predict_files",
]

if find_spec("torch") and find_spec("detectron2"):
    from .image_embeddings import embed_labels
    from .label_selection import SelectLabels
    from .optimize import optimize_for_inference
    from .precision import set_precision
    from .predictor import EvaluationView, MultiLabelPredictor
    from .test_time_augmentation import MultiLabelTTA

    __all__ += [
        "EvaluationView",
        "MultiLabelPredictor",
        "MultiLabelTTA",
        "SelectLabels",
        "embed_labels",
        "optimize_for_inference",
        "set_precision",
    ]
