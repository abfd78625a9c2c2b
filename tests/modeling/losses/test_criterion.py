import pytest
import torch
from detectron2.config import get_cfg

from ia_gcn import add_ia_gcn_config
from ia_gcn.errors import InputError
from ia_gcn.modeling import MultiLabelCriterion, multi_label_bce


def make_criterion(weights=()):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.LOSS.AUX_WEIGHTS = weights
    return MultiLabelCriterion(cfg)


def test_auxiliary_logits_have_losses_of_their_own_weight():
    generator = torch.Generator().manual_seed(0)
    main, first, second = torch.randn(3, 4, 5, generator=generator)
    targets = torch.randint(-1, 2, (4, 5), generator=generator).float()
    outputs = {"logits": main, "aux_logits": {"deep": first, "gcn": second}}
    losses = make_criterion(("gcn=0.25",))(outputs, targets)
    assert list(losses) == ["loss_multi_label", "loss_deep", "loss_gcn"]
    torch.testing.assert_close(losses["loss_multi_label"], multi_label_bce(main, targets))
    torch.testing.assert_close(losses["loss_deep"], multi_label_bce(first, targets))
    torch.testing.assert_close(losses["loss_gcn"], 0.25 * multi_label_bce(second, targets))
    assert list(make_criterion()({"logits": main}, targets)) == ["loss_multi_label"]


def test_weights_of_what_is_not_there_are_refused():
    outputs = {"logits": torch.zeros(1, 2), "aux_logits": {"deep": torch.zeros(1, 2)}}
    with pytest.raises(InputError, match=r"AUX_WEIGHTS: the label head has no .* 'gcn', but deep"):
        make_criterion(("gcn=1",))(outputs, torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"AUX_WEIGHTS: 'gcn' is not name=weight"):
        make_criterion(("gcn",))
