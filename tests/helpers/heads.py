"""Label heads on vectors, for tests of what a head does behind its pooling."""

from torch import nn

from ia_gcn.modeling import GlobalPooling


class HeadOnVectors(nn.Module):
    """A pooled head of x (B, D) instead of a feature map, with a label graph of its own."""

    def __init__(self, head, label_graph=None):
        super().__init__()
        self.head = head
        self.label_graph = label_graph

    def forward(self, x, presence=None):
        context = {} if self.label_graph is None else {"label_graph": self.label_graph}
        if presence is not None:
            context["presence"] = presence
        (name,) = self.head.in_features
        return self.head({name: x[:, :, None, None]}, {name: None}, **context)["logits"]

    def classifiers(self, presence=None):
        return self.head.classifiers(self.label_graph, presence)

    def fix_classifiers(self):
        self.head.fix_classifiers(self.label_graph)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)


def on_vectors(head_class, label_graph=None, **options):
    """A `HeadOnVectors` of a class with these options, and those that follow from the graph."""
    if label_graph is not None:
        options["num_labels"], options["embedding_dim"] = label_graph.embeddings.shape
    head = head_class(in_feature="map", pooling=GlobalPooling("max"), **options)
    return HeadOnVectors(head, label_graph)
