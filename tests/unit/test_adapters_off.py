"""The untrained model beside the trained one: adapters switched off for a while."""

from pathlib import Path

import torch

from k5dist.compose import compose, to_run_config
from k5dist.model.transformer import adapters_off
from tests.unit.models import model_config, our_model, our_velocity, random


def test_without_adapters_the_model_is_the_checkpoint(tiny_t2v: Path) -> None:
    lora = to_run_config(compose(["+flavour=t2v-tiny"])).lora
    transformer, base = our_model(tiny_t2v, lora), our_model(tiny_t2v)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.1)
    trained = {name: parameter.requires_grad for name, parameter in transformer.named_parameters()}
    assert any(trained.values()) and not all(trained.values())
    call = {
        "encoder_hidden_states": random(1, 6, 64),
        "pooled_projections": random(1, 32),
        "hidden_states": random(1, 3, 8, 12, 16),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        expected = our_velocity(base, model_config(tiny_t2v), call, False)
        before = our_velocity(transformer, model_config(tiny_t2v), call, False)
        with adapters_off(transformer):
            off = our_velocity(transformer, model_config(tiny_t2v), call, False)
            assert {name: parameter.requires_grad for name, parameter in transformer.named_parameters()} == trained
        after = our_velocity(transformer, model_config(tiny_t2v), call, False)
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)
    assert torch.equal(before, after)
    assert (before - off).abs().max() > 1e-3
