"""Linear layers in float8: near the exact product, with exact weight gradients, only where they gain."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.model.float8 import LARGEST, Float8Linear, quantise, use_float8
from k5dist.model.forward import predict_velocity
from tests.unit.models import lora_config, model_config, our_model, random, random_text, relative

MODEL_DIM, FF_DIM = 64, 128


def float8(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Float8Linear
    return linear


def gradients(linear: nn.Linear, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    out = linear(x)
    linear.zero_grad()
    (out * direction).sum().backward()
    assert x.grad is not None and linear.weight.grad is not None
    return out.detach(), x.grad, linear.weight.grad


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_value_is_the_formats_largest(dtype: torch.dtype) -> None:
    x = random(40, 48) * 1e-3
    values, scale = quantise(x, dtype)
    assert float(values.float().abs().max()) == LARGEST[dtype]
    digits = 3 if dtype == torch.float8_e4m3fn else 2
    normal = x.abs() > x.abs().max() * 2.0**-6
    error = (values.float() * scale - x).abs() / x.abs()
    assert float(error[normal].max()) <= 2.0 ** -(digits + 1) + 1e-6
    assert torch.equal(quantise(torch.zeros(3, 16), dtype)[0].float(), torch.zeros(3, 16)), "no division by zero"


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_near_and_the_weights_gradient_is_exact(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(MODEL_DIM, FF_DIM, bias=bias)
    x, direction = random(2, 50, MODEL_DIM), random(2, 50, FF_DIM, seed=1)
    exact = gradients(linear, x, direction)
    ours = gradients(float8(linear), x, direction)
    errors = [relative(a, b) for a, b in zip(ours, exact, strict=True)]
    assert 1e-3 < errors[0] < 5e-2
    assert 1e-3 < errors[1] < 8e-2, "e5m2 has a digit less"
    assert errors[2] < 1e-6


def test_a_frozen_weight_has_no_gradient() -> None:
    linear = float8(nn.Linear(MODEL_DIM, FF_DIM)).requires_grad_(False)
    x = random(8, MODEL_DIM).requires_grad_(True)
    linear(x).sum().backward()
    assert x.grad is not None and linear.weight.grad is None


@pytest.mark.parametrize("adapted", [True, False])
def test_only_the_large_layers_of_visual_blocks_change(tiny_t2v: Path, adapted: bool) -> None:
    transformer = our_model(tiny_t2v, lora_config(4, 4.0, "attention+ffn") if adapted else None)
    use_float8(transformer.visual_transformer_blocks, "cpu")  # type: ignore[arg-type]
    changed = {name for name, module in transformer.named_modules() if isinstance(module, Float8Linear)}
    suffix = ".base_layer" if adapted else ""
    own = [f"self_attention.{name}" for name in ("to_query", "to_key", "to_value", "out_layer")]
    large = [*own, "cross_attention.to_query", "cross_attention.out_layer", *("feed_forward.in_layer",)]
    large.append("feed_forward.out_layer")
    blocks = model_config(tiny_t2v).num_visual_blocks
    assert changed == {f"visual_transformer_blocks.{i}.{name}{suffix}" for i in range(blocks) for name in large}


def test_a_model_in_float8_is_near_the_exact_one_compiled_too(tiny_t2v: Path) -> None:
    model, time = model_config(tiny_t2v), torch.tensor([500.0])
    arguments = (model, random(1, 2, 8, 12, 16), False, time, random_text(5))
    exact, ours = our_model(tiny_t2v), our_model(tiny_t2v)
    use_float8(ours.visual_transformer_blocks, "cpu")  # type: ignore[arg-type]
    reference, out = predict_velocity(exact, *arguments), predict_velocity(ours, *arguments)
    assert 1e-4 < relative(out, reference) < 0.05
    torch._dynamo.reset()
    for block in ours.visual_transformer_blocks:  # type: ignore[union-attr]
        block.recompute = "full"
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    compiled = predict_velocity(ours, *arguments)
    torch.testing.assert_close(compiled, out, rtol=0, atol=1e-5)
    compiled.square().sum().backward()
    reference.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
    name = "visual_transformer_blocks.1.feed_forward.in_layer.weight"
    ours_grad, exact_grad = dict(ours.named_parameters())[name].grad, gradients[name]
    assert ours_grad is not None and exact_grad is not None
    assert 1e-3 < relative(ours_grad, exact_grad) < 0.15


def test_float8_belongs_to_bf16() -> None:
    with pytest.raises(ConfigError, match="float8 products belong to a bf16 model"):
        to_run_config(compose(["+flavour=t2v-tiny", "train.float8=true"]))
