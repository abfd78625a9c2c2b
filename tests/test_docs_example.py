"""The head of docs/extension.md can be imported, built, evaluated and trained as it is printed."""

import re
import sys

import pytest
import torch

from ia_gcn.checkpoint import build_model
from ia_gcn.config import read_config
from ia_gcn.modeling import LABEL_HEAD_REGISTRY
from tests.helpers.commands import ROOT

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.LABEL_HEAD.NAME": "AttentionHead",
    "MODEL.LABEL_HEAD.NUM_LABELS": 3,
    "MODEL.LABEL_HEAD.IN_FEATURES": ["res4"],
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.LOSS.AUX_WEIGHTS": ["mean=0.5"],
    "INPUT.IMAGE_SIZE": [32, 32],
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A recogniser with the page's head."""
    page = (ROOT / "docs/extension.md").read_text(encoding="utf-8")
    section = re.search(r"<!-- BEGIN example of a head -->(.*?)<!-- END", page, re.DOTALL)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(code.splitlines()) < 40
    (tmp_path / "my_heads.py").write_text(code)
    # Other tests have a module of this name, too.
    monkeypatch.delitem(sys.modules, "my_heads", raising=False)
    opts = [item for pair in SMALL.items() for item in pair]
    cfg = read_config("DigitScenes/ml_gcn.yaml", opts, imports=[str(tmp_path / "my_heads.py")])
    torch.manual_seed(0)
    yield build_model(cfg)
    LABEL_HEAD_REGISTRY._obj_map.pop("AttentionHead")
    sys.modules.pop("my_heads", None)


def make_inputs():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([[1.0, 0, -1], [0, 1, 1]])
    return [{"image": image, "labels": known} for image, known in zip(images, labels)]


def test_it_is_evaluated_and_makes_use_of_known_labels(model):
    inputs = make_inputs()
    with torch.no_grad():
        without = [output["logits"] for output in model.eval()(inputs)]
        inputs[0]["label_states"] = torch.tensor([-1.0, 1, -1])
        with_known = [output["logits"] for output in model(inputs)]
    assert without[0].shape == (3,)
    assert all(logits.isfinite().all() for logits in without)
    assert (without[0] != with_known[0]).tolist() == [False, True, False]
    assert without[1].equal(with_known[1])


def test_it_is_trained_with_its_auxiliary_logits(model):
    losses = model.train()(make_inputs())
    assert set(losses) == {"loss_multi_label", "loss_mean"}
    sum(losses.values()).backward()
    for parameter in model.label_head.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
