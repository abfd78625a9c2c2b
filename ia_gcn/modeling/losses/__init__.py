"""Multi-label losses: logits (B, C) and targets (B, C) to a scalar; the criterion over them."""

from .asymmetric import (
    AsymmetricAngularLoss,
    AsymmetricLoss,
    SelectiveLoss,
    asymmetric_angular_loss,
    asymmetric_loss,
    selective_loss,
)
from .base import (
    MULTI_LABEL_LOSS_REGISTRY,
    NOT_COUNTED,
    UNKNOWN,
    MultiLabelLoss,
    build_multi_label_loss,
)
from .criterion import MultiLabelCriterion
from .cross_entropy import (
    AssumeNegativeLoss,
    ExpectedPositiveLoss,
    MultiLabelBCE,
    assume_negative_loss,
    expected_positive_loss,
    multi_label_bce,
)
from .distribution_balanced import (
    DistributionBalancedLoss,
    distribution_balanced_loss,
    rebalanced_weights,
)
from .focal_margin import HillLoss, SPLCLoss, hill_loss, splc_loss
from .large_loss import LabelCorrections, LargeLoss, large_losses

__all__ = [
    "MULTI_LABEL_LOSS_REGISTRY",
    "NOT_COUNTED",
    "UNKNOWN",
    "AssumeNegativeLoss",
    "AsymmetricAngularLoss",
    "AsymmetricLoss",
    "DistributionBalancedLoss",
    "ExpectedPositiveLoss",
    "HillLoss",
    "LabelCorrections",
    "LargeLoss",
    "MultiLabelBCE",
    "MultiLabelCriterion",
    "MultiLabelLoss",
    "SPLCLoss",
    "SelectiveLoss",
    "assume_negative_loss",
    "asymmetric_angular_loss",
    "asymmetric_loss",
    "build_multi_label_loss",
    "distribution_balanced_loss",
    "expected_positive_loss",
    "hill_loss",
    "large_losses",
    "multi_label_bce",
    "rebalanced_weights",
    "selective_loss",
    "splc_loss",
]
