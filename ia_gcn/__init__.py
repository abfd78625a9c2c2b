"""Multi-label image recognition on detectron2: IA-GCN, ML-AGCN and their baselines.

Importing the package registers its parts with detectron2; `add_ia_gcn_config` adds its keys to a
detectron2 config, and `MultiLabelPredictor` finds the labels of an image. If torch or detectron2
is missing, only `ia_gcn.inference.OnnxPredictor` can be used.
"""

from importlib.util import find_spec

from . import quiet  # noqa: F401, before what it is about

__version__ = "0.1.0"
__all__ = ["MultiLabelPredictor", "add_ia_gcn_config", "data", "modeling"]

_missing = [name for name in ("torch", "detectron2") if find_spec(name) is None]

if not _missing:
    from . import data, modeling
    from .config import add_ia_gcn_config
    from .inference import MultiLabelPredictor


def __getattr__(name: str):
    if name in __all__:
        raise ModuleNotFoundError(f"ia_gcn.{name} needs {' and '.join(_missing)}", name=_missing[0])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
