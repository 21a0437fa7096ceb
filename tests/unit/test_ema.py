"""The moving average: its formula, its steps, and weights that come back to the bit."""

import dataclasses

import pytest
import torch
from torch import nn

from k5dist.config import EmaConfig
from k5dist.train.ema import Ema, replaced

CONFIG = EmaConfig(enabled=True, decay=0.9, update_after=0, every=1, device="device", export=True)


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(4, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def move(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("device", ["device", "host"])
@pytest.mark.parametrize(("after", "every"), [(0, 1), (3, 1), (0, 2), (2, 3)])
def test_the_average_follows_its_formula(after: int, every: int, device: str) -> None:
    module = layer()
    ema = Ema(module, dataclasses.replace(CONFIG, update_after=after, every=every, device=device))
    expected = module.weight.detach().double()
    for step in range(1, 10):
        move(module, step)
        ema.update(step)
        weight = module.weight.detach().double()
        if step == after or (step < after and (after - step) % every == 0):
            expected = weight
        elif step > after and (step - after) % every == 0:
            expected = 0.9**every * expected + (1 - 0.9**every) * weight
        torch.testing.assert_close(ema.tensors["weight"].double(), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(ema.tensors["weight"], module.weight)


def test_bf16_weights_have_an_fp32_average() -> None:
    module = layer(torch.bfloat16)
    ema = Ema(module, dataclasses.replace(CONFIG, decay=0.9999))
    before = ema.tensors["weight"].clone()
    move(module, 1)
    ema.update(1)
    assert ema.tensors["weight"].dtype == torch.float32
    assert not torch.equal(ema.tensors["weight"], before), "an update below a bf16 digit is not lost"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_weights_are_the_averages_and_go_again(dtype: torch.dtype) -> None:
    module = layer(dtype)
    ema = Ema(module, CONFIG)
    move(module, 1)
    weights, averages = module.weight.detach().clone(), ema.tensors["weight"].clone()
    with ema.applied(module):
        assert torch.equal(module.weight, averages.to(dtype))
        assert not torch.equal(module.weight, weights)
    assert torch.equal(module.weight, weights)
    assert torch.equal(ema.tensors["weight"], averages)


def test_weights_come_back_after_an_error() -> None:
    module = layer()
    weights = module.weight.detach().clone()

    def fail() -> None:
        with replaced(module, {module.get_parameter("weight"): torch.zeros(3, 4)}):
            assert not module.weight.any()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert torch.equal(module.weight, weights)


def test_frozen_weights_have_no_average() -> None:
    module = layer()
    module.bias.requires_grad_(False)
    assert set(Ema(module, CONFIG).tensors) == {"weight"}
