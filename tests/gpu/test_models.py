"""Every model of configs/DigitScenes on the GPU against the CPU, in each precision."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from tests.helpers.models import CONFIGS, build_model, make_samples

pytestmark = pytest.mark.usefixtures("same_random_numbers")
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# Values of loss functions of 8 and 10 bits' precision, of networks of a dozen layers.
TOLERANCE = 0.1


def train_step(model, dtype=None):
    """The losses of a batch and the gradients of their sum, by name, on the CPU."""
    device = next(model.parameters()).device.type
    model.train().zero_grad()
    with EventStorage(), torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(make_samples(4))
    sum(losses.values()).backward()
    gradients = {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: loss.item() for name, loss in losses.items()}, gradients


@torch.no_grad()
def evaluate(model, dtype=None):
    """Logits (4, C) in float32, on the CPU."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is not None):
        results = model.eval()(make_samples(4))
    return torch.stack([result["logits"].float().cpu() for result in results])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_step_is_that_of_the_cpu(config, on_both):
    model, other = on_both(build_model(config)[1])
    (losses, gradients), (found, found_gradients) = train_step(model), train_step(other)
    assert found == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (found_gradients[name] - gradient).norm()
        assert difference <= 0.01 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("config", CONFIGS)
def test_an_evaluation_is_that_of_the_cpu(config, on_both):
    model, other = on_both(build_model(config)[1])
    expected = evaluate(model)
    assert expected.std() > 0
    torch.testing.assert_close(evaluate(other), expected, rtol=1e-3, atol=1e-3)


@LOW
@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_step_in_mixed_precision(config, dtype, on_both):
    model, other = on_both(build_model(config)[1])
    losses, _ = train_step(model)
    found, gradients = train_step(other, dtype)
    assert found == pytest.approx(losses, rel=TOLERANCE, abs=TOLERANCE)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


@LOW
@pytest.mark.parametrize("config", CONFIGS)
def test_an_evaluation_in_mixed_precision(config, dtype, on_both):
    model, other = on_both(build_model(config)[1])
    difference = evaluate(other, dtype).sigmoid() - evaluate(model).sigmoid()
    # A region more or less, which rounding decides, moves a single score further.
    assert difference.abs().mean() < TOLERANCE
