"""detectron2's checkpointer, safe and aware of label names."""

from __future__ import annotations

import os
from typing import Any, Dict, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import InputError
from ..io.files import write_atomically
from ..io.pth import plain_state_dict, read_pth
from ..label_names import describe_mismatch
from .matching import describe_names, match_tensors, without_dimension
from .torchvision_resnet import convert_torchvision_resnet, is_torchvision_resnet

# The file that names the checkpoint to go on from.
LAST_CHECKPOINT = "last_checkpoint"


def read_checkpoint(path: str, shown_path: str = "") -> Dict[str, Any]:
    """Read a .pth file of tensors, numbers and strings; a bare state dict becomes its `model`.

    Args:
        path: a local file.
        shown_path: what it is called in a message, where that is something else.
    Returns:
        a dict with `model`, a state dict, and of checkpoints of `MultiLabelCheckpointer` with
        label_names, label_counts and config.
    Raises:
        InputError: the file can't be read, contains pickled code, or has no state dict of plain
            tensors, see `plain_state_dict`.
    """
    shown = f"MODEL.WEIGHTS: {shown_path or path}"
    content = read_pth(path, shown)
    if not isinstance(content, dict) or "model" not in content:
        content = {"model": content}
    content["model"] = plain_state_dict(content["model"], shown)
    if isinstance(content.get("ema"), dict):
        content["ema"] = plain_state_dict(content["ema"], f"{shown}: ema")
    return content


def rename_old_tensors(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """A state dict of version 0.1 under today's names; any other as it is.

    The label graph and the pooling were elsewhere then.
    """
    renamed = {}
    for name, value in state_dict.items():
        prefix, name = ("module.", name[7:]) if name.startswith("module.") else ("", name)
        name = name.replace("label_head.label_graph.", "label_graph.", 1)
        if name.startswith("pooling."):
            name = f"label_head.{name}"
        renamed[prefix + name] = value
    return renamed


class MultiLabelCheckpointer(DetectionCheckpointer):
    """Saves label names, counts and config with the model, and checks the names when it loads.

    It reads .pth files with `weights_only=True`, so that pickled code is never executed: its own
    checkpoints, bare state dicts, and torchvision's ResNet weights, which become the backbone's.

    Attributes:
        missing: after `load`, the model's tensors that the file lacked.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        label_names: Sequence[str],
        label_counts: Sequence[int] = (),
        config: str = "",
        load_ema: bool = False,
        transfer: bool = False,
        other_labels: bool = False,
        **checkpointables,
    ):
        """
        Args:
            model: may be wrapped in DistributedDataParallel.
            save_dir: folder for `save`.
            label_names: what the model's outputs stand for, in order.
            label_counts: how many training images have each of them, for `save`; (): not known.
            config: of the model, as YAML, for `save`; with it, no other file is needed to use the
                checkpoint.
            load_ema: load the EMA of a checkpoint's weights in place of the weights.
            transfer: take what fits by name and shape of a checkpoint with other labels or of
                another model, and leave the rest as it is.
            other_labels: the checkpoint may have other labels: the model keeps the label embeddings
                that it has, on which nothing else of it depends.
            checkpointables: as detectron2's, for example trainer. `ema`, a timm ModelEmaV3, starts
                from the weights that are loaded if the file has no EMA.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.label_names = list(label_names)
        self.label_counts = list(label_counts)
        self.config = config
        self.load_ema = load_ema
        self.transfer = transfer
        self.other_labels = other_labels
        self.missing = []
        self._path = None

    def save(self, name: str, **kwargs: Any) -> None:
        """As fvcore's; in place of an older file once it is complete.

        Raises:
            OSError: it can't be written; the older file is what it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {
            "model": self.model.state_dict(),
            **states,
            "label_names": self.label_names,
            "label_counts": self.label_counts,
            "config": self.config,
            **kwargs,
        }
        file_name = f"{name}.pth"
        path = os.path.join(self.save_dir, file_name)
        self.logger.info(f"Saving checkpoint to {path}")
        with write_atomically(path) as file:
            torch.save(content, file)
        self.tag_last_checkpoint(file_name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_atomically(os.path.join(self.save_dir, LAST_CHECKPOINT)) as file:
            file.write(last_filename_basename.encode())

    def check_complete(self) -> None:
        """Refuse a model if the last `load` left some of its tensors random, or not finite.

        Raises:
            InputError: nothing was loaded, the file lacked some of the model's tensors, a tensor
                has NaN or infinite values, or the label graph is bare.
        """
        self.check_loaded("")
        for name, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                raise InputError(
                    f"MODEL.WEIGHTS: {self._path}: {name} has values that are not finite"
                )
        if self.model.label_graph is not None and self.model.label_graph.is_bare:
            raise InputError(f"MODEL.WEIGHTS: the label graph in {self._path} is bare")

    def check_loaded(self, prefix: str) -> None:
        """Refuse a model if the last `load` left tensors of a part random.

        Args:
            prefix: what their names start with, for example proposal_generator.
        Raises:
            InputError: nothing was loaded, or the file lacked some of them.
        """
        if self._path is None:
            raise InputError("MODEL.WEIGHTS is empty: set it to a checkpoint")
        missing = [name for name in self.missing if name.startswith(prefix)]
        if missing:
            raise InputError(
                f"MODEL.WEIGHTS: {self._path} lacks {len(missing)} of the model's tensors "
                f"({', '.join(missing[:5])} ...); was it trained with this config?"
            )

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """As detectron2's; without a path nothing is loaded.

        Raises:
            InputError: there is no such file, it isn't a checkpoint, or its label names are not
                the model's.
        """
        self._path = path or None
        if not path:
            # fvcore would say that the model starts from scratch: the backbone may have weights.
            return {}
        try:
            return super().load(path, *args, **kwargs)
        except InputError:
            raise
        except (OSError, AssertionError, ValueError) as error:
            hint = '; without a network, set a file, or "" for random weights' * ("://" in path)
            raise InputError(f"MODEL.WEIGHTS: {path}: {error}{hint}") from error

    def _load_file(self, filename: str) -> Dict[str, Any]:
        content = read_checkpoint(filename, self._path)
        if self.load_ema:
            content["model"] = self._running_mean(content)
        for part in ("model", "ema"):
            if isinstance(content.get(part), dict):
                content[part] = rename_old_tensors(content[part])
        if is_torchvision_resnet(content["model"]):
            content["model"] = convert_torchvision_resnet(content["model"])
        if all(str(name).startswith("backbone.") for name in content["model"]):
            self._copy_res5_to_regions(content["model"])
        return content

    def _running_mean(self, content: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        if not isinstance(content.get("ema"), dict):
            raise InputError(
                f"TEST.EMA: {self._path} has no EMA of the weights (in model_best.pth of a "
                "training with SOLVER.EMA_DECAY, the model itself is the EMA)"
            )
        return {name.replace("module.", "", 1): value for name, value in content["ema"].items()}

    def _copy_res5_to_regions(self, state_dict: Dict[str, torch.Tensor]) -> None:
        """Where regions have a res5 stage of their own, it starts as the backbone's."""
        if any(name.startswith("roi_heads.res5.") for name, _ in self.model.named_parameters()):
            for name in [name for name in state_dict if name.startswith("backbone.res5.")]:
                state_dict[name.replace("backbone", "roi_heads", 1)] = state_dict[name]

    def _fitting(
        self, state_dict: Dict[str, torch.Tensor], label_names: Sequence[str]
    ) -> Dict[str, torch.Tensor]:
        """The tensors that MODEL.TRANSFER loads; the log lists them, and those that start anew."""
        expected = self.model.state_dict()
        same_number = len(label_names) == len(self.label_names)
        if same_number and label_names != self.label_names:
            state_dict = without_dimension(state_dict, len(label_names))
        taken = match_tensors(state_dict, expected).taken
        if not taken:
            raise InputError(f"MODEL.TRANSFER: nothing in MODEL.WEIGHTS {self._path} fits")
        anew = [name for name in expected if name not in taken]
        self.logger.info(describe_names(f"MODEL.TRANSFER: taken from {self._path}", list(taken)))
        self.logger.info(describe_names("MODEL.TRANSFER: starting anew", anew))
        return taken

    def _load_model(self, checkpoint: Dict[str, Any]):
        label_names = checkpoint.get("label_names", self.label_names)
        if self.transfer:
            checkpoint["model"] = self._fitting(checkpoint["model"], label_names)
        elif self.other_labels:
            checkpoint["model"].update(self.model.label_graph.state_dict(prefix="label_graph."))
        elif label_names != self.label_names:
            mismatch = describe_mismatch(self.label_names, label_names)
            # Only a training can start from a part of it.
            in_training = "trainer" in self.checkpointables
            hint = "; MODEL.TRANSFER True loads the tensors that fit" if in_training else ""
            raise InputError(f"the data set {mismatch} than MODEL.WEIGHTS {self._path}{hint}")
        has_prior = any(name.startswith("label_prior.") for name in checkpoint["model"])
        if has_prior and self.model.label_prior is None and "trainer" not in self.checkpointables:
            raise InputError(
                f"MODEL.WEIGHTS: {self._path} has a label prior: use the config that "
                "tools/fit_label_prior.py wrote beside it, or set MODEL.LABEL_PRIOR as in there"
            )
        incompatible = super()._load_model(checkpoint)
        self.missing = list(incompatible.missing_keys)
        if "ema" in self.checkpointables:
            self.checkpointables["ema"].module.load_state_dict(self.model.state_dict())
        return incompatible
