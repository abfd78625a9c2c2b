"""C-Tran's checkpoints: a network of the published layout, and the same logits."""

import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ia_gcn.checkpoint import MultiLabelCheckpointer, read_checkpoint
from ia_gcn.checkpoint.conversion import convert_checkpoint
from ia_gcn.config import add_ia_gcn_config
from ia_gcn.data.datasets import VOC_LABELS
from ia_gcn.errors import InputError

LABELS = VOC_LABELS[::-1]


class PublishedCTran(nn.Module):
    """The names of the published state dict, and the paper's equations on them."""

    def __init__(self, num_labels, dim=512, layers=2, heads=4):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.base_network = torchvision.models.resnet18()
        self.label_lt = nn.Embedding(num_labels, dim)
        self.known_label_lt = nn.Embedding(3, dim)
        self.self_attn_layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.transformer_layer = nn.TransformerEncoderLayer(dim, heads, dim, batch_first=True)
            self.self_attn_layers.append(layer)
        self.output_linear = nn.Linear(dim, num_labels)
        self.LayerNorm = nn.LayerNorm(dim)

    def forward(self, images, states):
        resnet = nn.Sequential(*list(self.backbone.base_network.children())[:-2])
        cells = resnet(images).flatten(2).mT
        labels = self.label_lt.weight + self.known_label_lt(states + 1)
        tokens = self.LayerNorm(torch.cat([cells, labels], dim=1))
        for layer in self.self_attn_layers:
            tokens = layer.transformer_layer(tokens)
        outputs = self.output_linear(tokens[:, -len(self.label_lt.weight) :])
        return outputs.diagonal(dim1=1, dim2=2)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = PublishedCTran(len(LABELS)).eval()
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.0)
        if name == "label_lt.weight":
            tensor.mul_(2)
    return network


@pytest.fixture
def source(tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return tmp_path / "best_model.pt"


def load(path):
    """The model of a checkpoint that has all of it, by the config in it."""
    content = read_checkpoint(str(path))
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(content["config"]))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    checkpointer = MultiLabelCheckpointer(model, label_names=content["label_names"])
    checkpointer.load(str(path))
    checkpointer.check_complete()
    return model, content["label_names"]


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_it_gives_the_same_logits_by_label(tmp_path, network, source, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 7, "state_dict": state, "valid_mAP": 0.5}, source)
    reports = []
    convert_checkpoint(
        source,
        "c_tran",
        tmp_path / "model.pth",
        labels=str(tmp_path / "labels.txt"),
        report=reports.append,
    )
    assert "left in the file: 2 tensors" in "".join(reports)
    model, label_names = load(tmp_path / "model.pth")
    assert label_names == VOC_LABELS
    assert "CENTER_CROP: 0.9" in read_checkpoint(str(tmp_path / "model.pth"))["config"]

    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=generator)
    states = torch.randint(-1, 2, (1, len(LABELS)), generator=generator)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = network(normalize(image / 255)[None], states)[0].flip(0)
    assert expected.std() > 0.01
    (output,) = model([{"image": image, "label_states": states[0].flip(0)}])
    torch.testing.assert_close(output["logits"], expected, rtol=1e-4, atol=1e-4)
    (output,) = model([{"image": image}])
    assert not torch.allclose(output["logits"], expected, atol=1e-2)


def test_another_file_is_refused(tmp_path, network, source):
    state = network.state_dict()
    del state["known_label_lt.weight"]
    torch.save(state, source)
    with pytest.raises(InputError, match=r"best_model\.pt.*it has no known_label_lt\.weight"):
        convert_checkpoint(source, "c_tran", tmp_path / "model.pth")
