"""Multi-label image recognition on detectron2: IA-GCN, ML-AGCN and their baselines.

Importing the package registers its parts with detectron2; `add_ia_gcn_config` adds its keys to a
detectron2 config, and `MultiLabelPredictor` says what is in a picture.
"""

from . import data, modeling
from .config import add_ia_gcn_config
from .predictor import MultiLabelPredictor

__version__ = "0.1.0"
__all__ = ["MultiLabelPredictor", "add_ia_gcn_config", "data", "modeling"]
