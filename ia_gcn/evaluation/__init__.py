from .calibration import Calibration, measure_calibration
from .frequency import FrequencyGroup, FrequencyGroups, measure_by_frequency
from .metrics import CONVENTIONS, Conventions, average_precision, multi_label_metrics
from .multi_label_evaluation import MultiLabelEvaluator
from .operating_points import (
    OperatingPoints,
    PrecisionRecallCurve,
    best_f1_points,
    interpolated_precision,
    precision_recall_curve,
)
from .predictions import Predictions, read_predictions
from .report import (
    Results,
    average_precision_table,
    frequency_table,
    labels_without_negatives,
    labels_without_positives,
    measure_predictions,
    metrics_tables,
    summarize,
    summary_line,
    summary_table,
)
from .thresholds import write_label_table, write_operating_points, write_thresholds

__all__ = [
    "CONVENTIONS",
    "Calibration",
    "Conventions",
    "FrequencyGroup",
    "FrequencyGroups",
    "MultiLabelEvaluator",
    "OperatingPoints",
    "PrecisionRecallCurve",
    "Predictions",
    "Results",
    "average_precision",
    "average_precision_table",
    "best_f1_points",
    "frequency_table",
    "interpolated_precision",
    "labels_without_negatives",
    "labels_without_positives",
    "measure_by_frequency",
    "measure_calibration",
    "measure_predictions",
    "metrics_tables",
    "multi_label_metrics",
    "precision_recall_curve",
    "read_predictions",
    "summarize",
    "summary_line",
    "summary_table",
    "write_label_table",
    "write_operating_points",
    "write_thresholds",
]
