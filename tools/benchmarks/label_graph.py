"""IA-GCN's label graph alone, as it is computed here and as its paper writes it."""

from __future__ import annotations

from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F

from ia_gcn.modeling import GCNHead, LabelGraph

from .measuring import Table, measure, measure_memory, timed_rows

GRAPH_BATCH = 8
EMBEDDING_DIM = 300
HIDDEN_DIMS = (512, 1024)
FEATURE_DIM = 2048


class GraphProblem(NamedTuple):
    head: GCNHead
    graph: LabelGraph
    x: torch.Tensor
    """(B, D)"""
    presence: torch.Tensor
    """a, (B, C) in (0, 1)"""


def compare_label_graph(args) -> Iterator[Table]:
    """IA-GCN's global branch without its network, for each number of labels."""
    for num_labels in args.labels:
        yield time_label_graph(num_labels, args)


def time_label_graph(num_labels: int, args) -> Table:
    """Forward and backward pass of FORMS: their times here, their memory in a process each."""
    memory = {
        form: measure_memory(args.threads, prepare_graph_step, form, num_labels) for form in FORMS
    }
    forms = [form for form in FORMS if "not_run" not in memory[form]]
    note, seconds = "", {}
    if forms:
        problem = make_graph_problem(num_labels)
        calls = {form: partial(graph_step, form, problem) for form in forms}
        seconds = measure(calls, args.rounds, f"label graph, {num_labels} labels")
    if len(forms) == len(FORMS):
        note = compare_logits(problem)
    title = f"Label graph alone, forward and backward: {num_labels} labels, {GRAPH_BATCH} images"
    return Table(title, timed_rows(seconds, memory), note)


def prepare_graph_step(form: str, num_labels: int) -> Callable:
    # What libraries take once, whatever the size, is none of the step's.
    graph_step(form, make_graph_problem(8))
    return partial(graph_step, form, make_graph_problem(num_labels))


def make_graph_problem(num_labels: int) -> GraphProblem:
    torch.manual_seed(0)
    graph = LabelGraph(num_labels, EMBEDDING_DIM, threshold=0.4, reweight=0.25)
    fill_sparsely(graph)
    head = GCNHead(
        in_feature="res5",
        pooling=torch.nn.Identity(),
        feature_dim=FEATURE_DIM,
        num_labels=num_labels,
        embedding_dim=EMBEDDING_DIM,
        hidden_dims=HIDDEN_DIMS,
        negative_slope=0.0,
    )
    # Both have a gradient, as they come from the backbone and from the region branch.
    x = torch.randn(GRAPH_BATCH, FEATURE_DIM, requires_grad=True)
    presence = torch.rand(GRAPH_BATCH, num_labels, requires_grad=True)
    return GraphProblem(head, graph, x, presence)


@torch.no_grad()
def fill_sparsely(graph: LabelGraph, partners: int = 3) -> None:
    """Give a graph statistics of labels that go with a few others each, about 2 × `partners`."""
    num_labels = len(graph.label_counts)
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(num_labels).repeat_interleave(partners)
    j = torch.randint(num_labels, i.shape, generator=generator)
    pair_counts = torch.ones_like(graph.pair_counts)
    pair_counts[i, j] = pair_counts[j, i] = 50
    pair_counts.fill_diagonal_(100)
    graph.fill(torch.full((num_labels,), 100), pair_counts, graph.embeddings)


def rank_one_logits(problem: GraphProblem) -> torch.Tensor:
    """(B, C), as GCNHead has it: nothing of B×C×C, and no classifiers."""
    return problem.head.image_dependent_logits(problem.x, problem.graph, problem.presence)


def dense_logits(problem: GraphProblem) -> torch.Tensor:
    """(B, C), as IA-GCN Eq. 1-6 are written: an LCM per image, and its classifiers M."""
    head, graph, x, presence = problem
    individual = presence[:, :, None] * presence[:, None, :]
    fused = graph.lcm * individual
    scale = fused.sum(dim=2).rsqrt()
    normalized = scale[:, :, None] * fused.mT * scale[:, None, :]
    nodes = graph.embeddings
    for layer in head.layers[:-1]:
        nodes = F.leaky_relu(normalized @ (nodes @ layer.weight), head.negative_slope)
    classifiers = normalized @ (nodes @ head.layers[-1].weight)
    return (classifiers @ x[:, :, None])[:, :, 0]


FORMS = {
    "rank one (GCNHead)": rank_one_logits,
    "dense, an LCM per image": dense_logits,
}


def graph_step(form: str, problem: GraphProblem) -> None:
    FORMS[form](problem).sum().backward()
    problem.head.zero_grad()
    problem.x.grad = problem.presence.grad = None


@torch.no_grad()
def compare_logits(problem: GraphProblem) -> str:
    expected, found = (logits(problem) for logits in FORMS.values())
    difference = (expected - found).abs().max()
    return f"Largest logit {expected.abs().max():.2g}, largest difference {difference:.1e}."
