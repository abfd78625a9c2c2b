from .metrics import average_precision, multi_label_metrics
from .multi_label_evaluation import MultiLabelEvaluator

__all__ = ["MultiLabelEvaluator", "average_precision", "multi_label_metrics"]
