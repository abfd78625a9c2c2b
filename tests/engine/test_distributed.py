"""Two processes on the CPU do what one does."""

import json

import numpy as np
import pytest
import torch

from tests.helpers.commands import run_process, run_script

HEADS = [
    *("ml_gcn", "ml_agcn", "aam", "csra", "srn", "rnn_attention", "cnn_rnn", "add_gcn", "tdrg"),
    *("salgl", "ssgrl", "kggr", "c_tran", "query2label", "ml_decoder"),
]

# One step of training of each head on a global batch of 4, by however many processes torchrun
# starts; the main process saves the gradients, and what the model counts. A process draws its own
# dropout, a batch norm sees its own images, and so does SALGL's loss of their scenes.
STEP = """
import sys
import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from ia_gcn.engine import Trainer, launch, setup_cfg

def main(output, names, opts):
    found = {}
    for name in names.split(","):
        cfg = setup_cfg(f"configs/DigitScenes/{name}.yaml", opts)
        cfg.freeze()
        trainer = Trainer(cfg)
        trainer.resume_or_load(False)
        model = getattr(trainer.model, "module", trainer.model)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        batch = next(iter(trainer.data_loader))
        assert len(batch) * comm.get_world_size() == 4
        losses = trainer.model(batch)
        sum(loss for name, loss in losses.items() if "balance" not in name).backward()
        tensors = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        tensors.update((n, b) for n, b in model.named_buffers() if n.endswith("counts"))
        found[name] = tensors
    if comm.is_main_process():
        torch.save(found, output)
    return 0

if __name__ == "__main__":
    sys.exit(launch(main, 1, args=(sys.argv[1], sys.argv[2], sys.argv[3:])))
"""


# A training on labels of which those that are absent are unknown; every process saves those that
# LL-Cp has corrected.
CORRECTING = """
import sys
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from ia_gcn.data import get_multilabel_dicts
from ia_gcn.engine import Trainer, launch, setup_cfg

def main(output, opts):
    cfg = setup_cfg("configs/DigitScenes/ml_gcn.yaml", opts)
    dicts = get_multilabel_dicts(["custom_train"])
    for record in dicts:
        record["ignored_labels"] = [c for c in range(3) if c not in record["labels"]]
    DatasetCatalog.remove("custom_train")
    DatasetCatalog.register("custom_train", lambda: dicts)
    trainer = Trainer(cfg)
    trainer.train()
    loss = getattr(trainer.model, "module", trainer.model).criterion.loss
    np.save(f"{output}/{comm.get_rank()}.npy", loss.corrections.bits)
    return 0

if __name__ == "__main__":
    sys.exit(launch(main, 1, args=(sys.argv[1], sys.argv[2:])))
"""


@pytest.fixture
def opts(tiny_coco):
    data = tiny_coco(13)
    options = {
        "DATASETS.CUSTOM.TRAIN": data.json_file,
        "DATASETS.CUSTOM.TEST": data.json_file,
        "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.IMAGE_SIZE": "(32, 32)",
        "SOLVER.IMS_PER_BATCH": 4,
        "TEST.IMS_PER_BATCH": 3,
    }
    return [str(item) for pair in options.items() for item in pair]


@pytest.mark.slow
def test_the_gradients_of_a_global_batch_are_the_same(tmp_path, opts):
    script = tmp_path / "step.py"
    script.write_text(STEP)
    # Of 32×32 pixels, SSGRL would see a single cell.
    opts = [*opts, "INPUT.IMAGE_SIZE", "(96, 96)", "MODEL.RESNETS.NORM", "FrozenBN"]
    opts += ["MODEL.LABEL_EMBEDDINGS.SOURCE", "names", "OUTPUT_DIR", tmp_path]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    args = [(tmp_path / name, ",".join(HEADS), *opts) for name in ("one", "two")]
    result = run_process(script, *args[0])
    assert result.returncode == 0, result.stderr[-3000:]
    result = run_process(*torchrun, script, *args[1])
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for head in HEADS:
        assert one[head].keys() == two[head].keys()
        assert len(one[head]) > 10
        largest = max(float(tensor.abs().max()) for tensor in one[head].values())
        for name, tensor in one[head].items():
            scale = max(float(tensor.abs().max()), 1e-3 * largest)
            error = float((tensor - two[head][name]).abs().max())
            assert error < 1e-4 * scale, f"{head}: {name}"


@pytest.mark.slow
def test_two_processes_correct_the_same_labels(tmp_path, opts):
    script = tmp_path / "correct.py"
    script.write_text(CORRECTING)
    keys = ["NAME", "LargeLoss", "LARGE_LOSS.SCHEME", "LL-Cp", "LARGE_LOSS.RATE", 0.1]
    keys[::2] = [f"MODEL.LOSS.{key}" for key in keys[::2]]
    short = ["SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 10, "OUTPUT_DIR", tmp_path / "run"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    result = run_process(*torchrun, script, tmp_path, *opts, *keys, *short)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    assert np.array_equal(first, second)
    # Each process corrects one label or more in each of the six iterations after the first epoch.
    assert np.unpackbits(first).sum() > 6
    checkpoint = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    saved = checkpoint["trainer"]["hooks"]["FollowLoss"]["label_corrections"]
    assert np.array_equal(saved.numpy(), first)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(tmp_path, opts):
    train_net = ["tools/train_net.py", "--config-file", "configs/DigitScenes/ml_gcn.yaml"]
    short = ["SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path / "run"]
    result = run_process(*train_net, "--num-gpus", 2, *opts, *short)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = ["--eval-only", "MODEL.WEIGHTS", tmp_path / "run/model_final.pth"]
    results = []
    for processes in (1, 2):
        folder = tmp_path / f"eval{processes}"
        output = ["OUTPUT_DIR", folder]
        run = run_script if processes == 1 else run_process
        result = run(*train_net, "--num-gpus", processes, *weights, *opts, *output)
        assert result.returncode == 0, result.stderr[-3000:]
        results.append(folder / "inference" / "custom_test")
    one, two = [json.loads((folder / "metrics.json").read_text()) for folder in results]
    assert one["images"] == two["images"] == 13
    with np.load(results[0] / "predictions.npz") as a, np.load(results[1] / "predictions.npz") as b:
        assert np.array_equal(a["image_ids"], b["image_ids"])
        assert np.array_equal(a["targets"], b["targets"])
        np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-6)
        # The training's own evaluation was of the weights that it saved. The norms of the second
        # process, which evaluates half of the images, have seen other images.
        with np.load(tmp_path / "run/inference/custom_test/predictions.npz") as trained:
            np.testing.assert_allclose(a["scores"], trained["scores"], atol=1e-6)
    assert one["mAP"] == pytest.approx(two["mAP"], abs=1e-6)
