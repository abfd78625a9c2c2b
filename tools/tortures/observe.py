"""For --import: each process of a training writes down what it sees in every iteration.

The lines of JSON are in files of the folder that the environment variable OBSERVED names. With
OBSERVED_PAUSE, an iteration takes so many seconds more.
"""

from __future__ import annotations

import json
import os
import time
import uuid

from detectron2.engine import HookBase
from detectron2.utils import comm

from ia_gcn.engine import Trainer


class Observe(HookBase):
    """A line: the start of the job (the same in all processes), its number of processes, the
    iteration, the ids of the images in this process's batch, and the sum of its losses."""

    def before_train(self):
        start = comm.all_gather(uuid.uuid4().hex)[0]
        path = os.path.join(os.environ["OBSERVED"], f"{start}-{comm.get_rank()}.jsonl")
        pause = float(os.environ.get("OBSERVED_PAUSE", 0))

        def note(model, args, losses):
            if model.training:
                images = [sample["image_id"] for sample in args[0]]
                loss = sum(loss.item() for loss in losses.values())
                line = start, comm.get_world_size(), self.trainer.iter, images, loss
                with open(path, "a") as file:
                    file.write(json.dumps(line) + "\n")
                time.sleep(pause)

        self.trainer.model.register_forward_hook(note)


_build_hooks = Trainer.build_hooks
Trainer.build_hooks = lambda self: [Observe(), *_build_hooks(self)]
