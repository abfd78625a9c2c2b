"""The command `ia-gcn`: each of its subcommands is the `main` of a module in ia_gcn.commands.

It is no part of the package, whose import takes seconds: `ia-gcn --help` imports nothing else.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple, Sequence


class Command(NamedTuple):
    module: str
    """In ia_gcn.commands."""
    description: str
    """One line."""


COMMANDS = {
    "train": Command("train", "train a model, and evaluate it"),
    "evaluate": Command("evaluate", "evaluate a checkpoint on a data set"),
    "predict": Command("predict", "write the labels of images, as JSON or CSV"),
    "predict-distributed": Command("predict_distributed", "the same of millions, on Ray"),
    "demo": Command("demo", "open a page that shows the labels of images dropped on it"),
    "export": Command("export", "write a checkpoint as ONNX, or for torch.export"),
    "convert": Command("convert", "make a checkpoint of other projects' weights"),
    "inspect": Command("inspect", "check a data set, and show what is in it"),
    "make-shards": Command("make_shards", "write a data set as tar shards"),
    "find-label-errors": Command("find_label_errors", "find labels that are probably wrong"),
    "embeddings": Command("build_label_embeddings", "compute label embeddings from images"),
    "analyze": Command("analyze", "parameters, operations and time of a model"),
    "ablate": Command("ablate", "compare label heads on frozen features"),
    "evaluate-predictions": Command("evaluate_predictions", "measure written predictions again"),
    "label-headroom": Command("label_headroom", "say how much a label graph could add"),
    "fit-label-prior": Command("fit_label_prior", "add what labels say of each other to a model"),
    "visualize-attention": Command("visualize_attention", "draw what a model looks at"),
    "visualize-regions": Command("visualize_regions", "draw the regions that a model looks at"),
    "visualize-results": Command("visualize_results", "draw training curve and predictions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 where there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"ia-gcn: no command {name!r}; ia-gcn --help lists them", file=sys.stderr)
        return 2
    # What argparse calls the program.
    sys.argv[0] = f"ia-gcn {name}"
    return importlib.import_module(f"ia_gcn.commands.{COMMANDS[name].module}").main(rest)


def usage() -> str:
    """The help: a line per command."""
    lines = [f"  {name:<22}{command.description}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ia-gcn COMMAND ...",
            "",
            "Multi-label image recognition on detectron2.",
            "",
            "commands:",
            *lines,
            "",
            "ia-gcn COMMAND --help says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
