"""Multi-label evaluation as a detectron2 DatasetEvaluator."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from datetime import datetime
from typing import Dict, List, Mapping, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..data import get_label_names
from ..io.files import write_atomically, write_text_atomically
from .frequency import FrequencyGroups, measure_by_frequency
from .metrics import DEFAULT_CONVENTIONS, Conventions
from .predictions import Predictions, write_predictions
from .report import (
    average_precision_table,
    frequency_table,
    labels_without_negatives,
    labels_without_positives,
    summarize,
    summary_table,
)

logger = logging.getLogger(__name__)


class MultiLabelEvaluator(DatasetEvaluator):
    """Collects scores and targets from all processes, each image once, and measures them.

    In `output_dir` it leaves
        metrics.json: mAP, CP, CR, CF1, OP, OR, OF1 and the same for the top k, the AP of every
            label by name (null without positives), the mAP of frequent, middle and rare labels,
            the number of images and the settings;
        predictions.npz: image_ids (n,), sorted; scores (n, C) float32; targets (n, C) int8 in
            {1, 0, -1 = ignored}; label_names (C,); where they are known, label_counts (C,), the
            training images that have each label;
        report.html, where it is asked for: see `render_report`.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        threshold: float = 0.5,
        top_k: int | None = 3,
        conventions: Conventions = DEFAULT_CONVENTIONS,
        label_counts: Sequence[int] | None = None,
        frequency_groups: Sequence[int] = (),
        report: Mapping[str, str] | None = None,
    ):
        """
        Args:
            dataset_name: registered; `get_label_names` names its labels.
            output_dir: None writes no files.
            threshold, conventions: see `multi_label_metrics`.
            top_k: k of the further six figures; None leaves them out.
            label_counts: (C,) training images that have each label; None where that is not known.
            frequency_groups: the `bounds` of `measure_by_frequency`.
            report: facts about the model for report.html, such as {"Checkpoint": path}; None writes
                no report.
        """
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._threshold = threshold
        self._top_k = top_k
        self._conventions = conventions
        self._label_counts = None if label_counts is None else np.asarray(label_counts, np.int64)
        self._frequency_groups = frequency_groups
        self._facts = report
        self.reset()

    @staticmethod
    def conventions_of(cfg: CfgNode) -> Conventions:
        """What TEST's keys ask for."""
        test = cfg.TEST
        old = test.ELEVEN_POINT_AP and test.AP == "all_points"
        ap = "eleven_points" if old else test.AP
        return Conventions(
            ap, test.CF1, test.FORCED_TOP_K, test.IGNORED_LABELS, test.KNOWN_LABELS_IN_F1
        )

    def reset(self):
        self._image_ids: List = []
        self._file_names: List[str | None] = []
        self._scores: List[np.ndarray] = []
        self._targets: List[np.ndarray] = []
        self._known: List[np.ndarray] = []

    def process(self, inputs: List[Dict], outputs: List[Dict]) -> None:
        """Keep `scores` of the outputs, and `labels`, `image_id` and `file_name` of the inputs.

        Without `file_name`, which not all inputs have, the report shows no image. With the
        convention known_in_f1, `label_states` are kept, too.
        """
        for image, output in zip(inputs, outputs):
            self._image_ids.append(image["image_id"])
            self._file_names.append(image.get("file_name"))
            self._scores.append(output["scores"].float().cpu().numpy())
            self._targets.append(image["labels"].numpy().astype(np.int8))
            if self._conventions.known_in_f1:
                unknown = np.full(len(self._targets[-1]), -1)
                self._known.append(np.asarray(image.get("label_states", unknown), np.int8))

    def evaluate(self) -> Dict[str, Dict[str, float]] | None:
        """
        Returns:
            {"multi_label": {name: percent}} on the main process, None on the others.
        """
        # Stacked before they travel: one array per process instead of one per image.
        label_names = get_label_names([self._dataset_name])
        shape = (len(self._image_ids), len(label_names))
        scores = np.array(self._scores, dtype=np.float32).reshape(shape)
        targets = np.array(self._targets, dtype=np.int8).reshape(shape)
        known = targets[:0]
        if self._conventions.known_in_f1:
            known = np.array(self._known, dtype=np.int8).reshape(shape)
        gathered = comm.gather((self._image_ids, self._file_names, scores, targets, known))
        if not comm.is_main_process():
            return None
        image_ids = np.array([image_id for ids, *_ in gathered for image_id in ids])
        file_names = [name for _, names, *_ in gathered for name in names]
        scores, targets, known = (np.concatenate(x) for x in list(zip(*gathered))[2:])
        # Sorted, so that neither the processes nor the order of the files make a difference.
        image_ids, first = np.unique(image_ids, return_index=True)
        file_names = [file_names[i] for i in first]
        scores, targets = scores[first], targets[first]

        settings = {"threshold": self._threshold, "conventions": self._conventions}
        if self._conventions.known_in_f1:
            settings["known"] = known[first]
        summary, ap = summarize(scores, targets, self._top_k, **settings)
        frequency = measure_by_frequency(ap, targets, self._label_counts, self._frequency_groups)
        summary.update(frequency.summary())
        per_label = dict(zip(label_names, ap.tolist()))
        predictions = Predictions(image_ids, scores, targets, label_names, self._label_counts)
        self._report(summary, frequency, per_label, len(image_ids))
        without_negatives = labels_without_negatives(targets, label_names)
        if without_negatives and self._conventions.ignored != "everywhere":
            logger.warning(f"{self._dataset_name}: {without_negatives}")
        if self._output_dir:
            self._write(summary, frequency, per_label, predictions)
        if self._output_dir and self._facts is not None:
            self._write_html(predictions, settings, file_names)
        return OrderedDict(multi_label=summary)

    def _report(
        self,
        summary: Dict,
        frequency: FrequencyGroups,
        per_label: Dict[str, float],
        num_images: int,
    ) -> None:
        # For the log; the screen gets the tables when the run is over.
        table = summary_table(summary, self._top_k)
        logger.debug(f"{self._dataset_name}, {num_images} images, in percent:\n{table}")
        logger.debug(f"mAP by how frequent a label is:\n{frequency_table(frequency)}")
        logger.debug(f"AP of each label:\n{average_precision_table(per_label)}")
        if any(map(math.isnan, per_label.values())):
            logger.debug(labels_without_positives(per_label))

    def _write(self, summary, frequency, per_label, predictions: Predictions) -> None:
        PathManager.mkdirs(self._output_dir)
        results = {
            "dataset": self._dataset_name,
            "images": len(predictions.image_ids),
            "threshold": self._threshold,
            "conventions": self._conventions._asdict(),
            **summary,
            "frequency": {
                "counted": frequency.counted,
                "groups": {name: group._asdict() for name, group in frequency.groups.items()},
            },
            "AP": per_label,
        }
        with write_text_atomically(os.path.join(self._output_dir, "metrics.json")) as file:
            json.dump(_nan_to_none(results), file, indent=1)
        write_predictions(os.path.join(self._output_dir, "predictions.npz"), predictions)

    def _write_html(self, predictions: Predictions, settings, file_names) -> None:
        # It takes matplotlib, which nothing else in an evaluation does.
        from .html_report import render_report

        facts = {
            **self._facts,
            "Date": datetime.now().astimezone().isoformat(" ", "minutes"),
        }
        files = dict(zip(predictions.image_ids.tolist(), file_names))
        page = render_report(
            predictions,
            self._dataset_name,
            facts,
            top_k=self._top_k,
            frequency_groups=self._frequency_groups,
            find_file=files.get,
            **settings,
        )
        path = os.path.join(self._output_dir, "report.html")
        with write_atomically(path) as file:
            file.write(page.encode("utf-8", "replace"))
        logger.debug(f"Report: {path}")


def _nan_to_none(value):
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
