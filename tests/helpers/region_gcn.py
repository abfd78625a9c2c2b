"""The region GCN's formulas with the matrices written out."""

import torch.nn.functional as F

from tests.helpers.label_graphs import dense_fused


def dense_region_logits(gcn, scores, presence, lcm):
    """ŷ_r of one image from the scores (n, C) of the regions it has, by Eq. 10 as read."""
    if not len(scores):
        return gcn.classifier.bias
    weights = [layer.weight for layer in gcn.layers]
    graph = dense_fused(lcm, presence)
    if gcn.reading == "labels":
        nodes, weights[0] = scores.T, weights[0][: len(scores)]
    else:
        nodes, graph = scores, dense_fused(scores @ graph @ scores.T, None)
    for weight in weights:
        nodes = F.relu(graph @ nodes @ weight)
    logits = nodes @ gcn.classifier.weight.T + gcn.classifier.bias
    return logits.diagonal() if gcn.reading == "labels" else logits.max(dim=0).values
