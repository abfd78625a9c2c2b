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
from ..io.files import write_text_atomically
from .collected import Collected, Gathered
from .metrics import DEFAULT_CONVENTIONS, Conventions
from .predictions import Predictions, store_matrix, store_predictions, write_predictions
from .report import (
    Results,
    average_precision_table,
    frequency_table,
    labels_without_negatives,
    labels_without_positives,
    measure_predictions,
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
        report.html and per_label.csv, where they are asked for: see `write_report`.

    Above a limit, scores and targets are in temporary files from batch to batch, and in the end in
    predictions.npz, not compressed, and all is measured from there, a few labels at a time. The
    figures are the same.
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
        memory_limit: int = 1024,
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
            memory_limit: of the scores and targets of all processes, in MiB. The temporary files
                are in `output_dir`, which then all machines have to share.
        """
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._threshold = threshold
        self._top_k = top_k
        self._conventions = conventions
        self._label_counts = None if label_counts is None else np.asarray(label_counts, np.int64)
        self._frequency_groups = frequency_groups
        self._facts = report
        self._limit = memory_limit * 2**20
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
        self._collected = Collected(self._limit // comm.get_world_size(), self._output_dir)

    def process(self, inputs: List[Dict], outputs: List[Dict]) -> None:
        """Keep `scores` of the outputs, and `labels`, `image_id` and `file_name` of the inputs.

        Without `file_name`, which not all inputs have, the report shows no image. With the
        convention known_in_f1, `label_states` are kept, too.
        """
        for image, output in zip(inputs, outputs):
            rows = {
                "scores": output["scores"].float().cpu().numpy(),
                "targets": image["labels"].numpy().astype(np.int8),
            }
            if self._conventions.known_in_f1:
                unknown = np.full(len(rows["targets"]), -1)
                rows["known"] = np.asarray(image.get("label_states", unknown), np.int8)
            self._collected.add(image["image_id"], image.get("file_name"), **rows)

    def evaluate(self) -> Dict[str, Dict[str, float]] | None:
        """
        Returns:
            {"multi_label": {name: percent}} on the main process, None on the others.
        """
        parts = comm.gather(self._collected.parts())
        self._collected.leave_files()
        if not comm.is_main_process():
            return None
        label_names = get_label_names([self._dataset_name])
        gathered = Gathered([part for of_process in parts for part in of_process], len(label_names))
        try:
            return self._measure(gathered, label_names)
        finally:
            gathered.remove_files()

    def _measure(self, gathered: Gathered, label_names: List[str]) -> Dict[str, Dict[str, float]]:
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
        spilled = gathered.folder is not None
        of = gathered.columns if spilled else gathered.matrix
        matrices = of("scores"), of("targets")
        predictions = Predictions(gathered.image_ids, *matrices, label_names, self._label_counts)
        if spilled:
            path = os.path.join(self._output_dir or gathered.folder, "predictions.npz")
            predictions = store_predictions(path, predictions)
        known = None
        if self._conventions.known_in_f1:
            known = of("known")
            if spilled:
                known = store_matrix(os.path.join(gathered.folder, "known.npz"), known)
        results = measure_predictions(
            predictions,
            threshold=self._threshold,
            top_k=self._top_k,
            conventions=self._conventions,
            known=known,
            frequency_groups=self._frequency_groups,
        )
        per_label = dict(zip(label_names, results.ap.tolist()))
        self._report(results, per_label, len(gathered.image_ids))
        without_negatives = labels_without_negatives(predictions.targets, label_names)
        if without_negatives and self._conventions.ignored != "everywhere":
            logger.warning(f"{self._dataset_name}: {without_negatives}")
        if self._output_dir:
            self._write(results, per_label, len(gathered.image_ids))
            if not spilled:
                write_predictions(os.path.join(self._output_dir, "predictions.npz"), predictions)
        if self._output_dir and self._facts is not None:
            self._write_html(predictions, results, gathered.file_names)
        return OrderedDict(multi_label=results.summary)

    def _report(self, results: Results, per_label: Dict[str, float], num_images: int) -> None:
        # For the log; the screen gets the tables when the run is over.
        table = summary_table(results.summary, self._top_k)
        logger.debug(f"{self._dataset_name}, {num_images} images, in percent:\n{table}")
        logger.debug(f"mAP by how frequent a label is:\n{frequency_table(results.frequency)}")
        logger.debug(f"AP of each label:\n{average_precision_table(per_label, 'metrics.json')}")
        if any(map(math.isnan, per_label.values())):
            logger.debug(labels_without_positives(per_label))

    def _write(self, results: Results, per_label: Dict[str, float], num_images: int) -> None:
        frequency = results.frequency
        content = {
            "dataset": self._dataset_name,
            "images": num_images,
            "threshold": self._threshold,
            "conventions": self._conventions._asdict(),
            **results.summary,
            "frequency": {
                "counted": frequency.counted,
                "groups": {name: group._asdict() for name, group in frequency.groups.items()},
            },
            "AP": per_label,
        }
        with write_text_atomically(os.path.join(self._output_dir, "metrics.json")) as file:
            json.dump(_nan_to_none(content), file, indent=1)

    def _write_html(self, predictions: Predictions, results: Results, file_names) -> None:
        # It takes matplotlib, which nothing else in an evaluation does.
        from .html_report import write_report

        facts = {
            **self._facts,
            "Date": datetime.now().astimezone().isoformat(" ", "minutes"),
        }
        files = dict(zip(predictions.image_ids.tolist(), file_names))
        write_report(self._output_dir, predictions, results, self._dataset_name, facts, files.get)
        logger.debug(f"Report: {os.path.join(self._output_dir, 'report.html')}")


def _nan_to_none(value):
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
