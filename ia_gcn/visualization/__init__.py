from .attention import AttendedImage, attend, describe_attention, draw_attention_sheet
from .label_bars import draw_label_bars
from .label_graph import plot_label_graph
from .label_headroom import plot_headroom
from .measures import (
    draw_confusions,
    draw_precision_recall,
    draw_reliability,
    plot_precision_recall,
    plot_reliability,
)
from .prediction_sheet import draw_prediction_sheet
from .recognition import describe_recognition, recognize
from .regions import (
    Recognition,
    draw_recognition,
    draw_region_sheet,
    labels_to_show,
    region_light,
    thumbnail,
)
from .style import sample_items, to_svg
from .training_curve import plot_training_curve, read_training_log

__all__ = [
    "AttendedImage",
    "Recognition",
    "attend",
    "describe_attention",
    "describe_recognition",
    "draw_attention_sheet",
    "draw_confusions",
    "draw_label_bars",
    "draw_precision_recall",
    "draw_prediction_sheet",
    "draw_recognition",
    "draw_region_sheet",
    "draw_reliability",
    "labels_to_show",
    "plot_headroom",
    "plot_label_graph",
    "plot_precision_recall",
    "plot_reliability",
    "plot_training_curve",
    "read_training_log",
    "recognize",
    "region_light",
    "sample_items",
    "thumbnail",
    "to_svg",
]
