"""SSGRL, with random word vectors and a random graph in files, as it reads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, imagenet, import_authors

REPOSITORY = "https://github.com/HCPLab-SYSU/SSGRL"
REPLACED = "Python 2's xrange; `.cuda()`"


def cases(folder: Path) -> Iterator[Case]:
    """On COCO's labels; the size is one whose cells can be halved."""
    torch.Tensor.cuda = lambda self: self
    published = import_authors(folder, "models")
    import_authors(folder, "ggnn").xrange = range

    class Network(published.SSGRL):
        def _apply(self, fn, *args):
            # Tensors that are no buffers, which double() would leave in float32.
            self._word_features = fn(self._word_features)
            self.graph_net._in_matrix = fn(self.graph_net._in_matrix)
            self.graph_net._out_matrix = fn(self.graph_net._out_matrix)
            return super()._apply(fn, *args)

    rng = np.random.default_rng(0)
    graph = np.where(np.eye(80), 0, rng.random((80, 80)) ** 6)
    with tempfile.TemporaryDirectory() as files:
        words_file, graph_file = f"{files}/vectors.npy", f"{files}/prob_train.npy"
        np.save(words_file, rng.standard_normal((80, 300)))
        np.save(graph_file, graph)
        network = Network(2048, 2048, 3, graph_file, words_file, num_classes=80)
        yield Case(
            name="ResNet-101, 256",
            network=network,
            labels=COCO_LABELS,
            prepare=imagenet,
            checkpoint=lambda state: {"epoch": 9, "state_dict": state, "best_mAP": 0.0},
            arguments={"embeddings": words_file, "graph": graph_file},
            size=256,
        )
