"""What tests of the model share: small models and inputs, the pipelines' own calls, how near two tensors are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from k5dist.compose import compose, to_run_config
from k5dist.config import LoraConfig, ModelConfig
from k5dist.model.forward import Text, predict_velocity
from k5dist.model.transformer import build_transformer, materialise
from k5dist.model.weights import base_parameters

CPU = torch.device("cpu")
SCALE = 0.476986


def model_config(folder: Path) -> ModelConfig:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    values = {field.name: config.get(field.name) for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{**values, "axes_dims": tuple(config["axes_dims"])})


def our_model(folder: Path, lora: LoraConfig | None = None, seed: int = 0) -> nn.Module:
    transformer = build_transformer(str(folder), model_config(folder), lora=lora, dtype=torch.float32)
    materialise(transformer, str(folder), device=CPU, seed=seed, lora=lora)
    return transformer


def lora_config(rank: int, alpha: float, targets: str | tuple[str, ...], **changes: Any) -> LoraConfig:
    """Adapters with everything else as conf/ has it."""
    lora = to_run_config(compose(["+flavour=t2v-tiny"])).lora
    return dataclasses.replace(lora, rank=rank, alpha=alpha, targets=targets, **changes)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_text(length: int, seed: int = 0) -> Text:
    return Text(random(1, length, 64, seed=seed), random(1, 32, seed=seed + 1))


def random_frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 96, 3), dtype=np.uint8)


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm().clamp_min(1e-12))


def pipeline_calls(pipeline: Any, shape: tuple[int, int, int], lengths: tuple[int, int], **options: Any) -> list[Any]:
    """What the inference pipeline gives its transformer in one guided step, with the transformer's answers."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(({**kwargs, "hidden_states": kwargs["hidden_states"].clone()}, output.sample.clone()))

    frames, height, width = shape
    text, negative = random_text(lengths[0], seed=10), random_text(lengths[1], seed=20)
    pipeline.set_progress_bar_config(disable=True)
    hook = pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    pipeline(
        **{"prompt_embeds_qwen": text.qwen_1LD, "prompt_embeds_clip": text.clip_1D},
        **{"negative_prompt_embeds_qwen": negative.qwen_1LD, "negative_prompt_embeds_clip": negative.clip_1D},
        prompt_cu_seqlens=torch.tensor([0, lengths[0]]),
        negative_prompt_cu_seqlens=torch.tensor([0, lengths[1]]),
        **{"num_frames": frames, "height": height, "width": width, "num_inference_steps": 1, "guidance_scale": 5.0},
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    )
    hook.remove()
    assert len(calls) == 2, "with and without the prompt"
    return calls


def our_velocity(transformer: nn.Module, model: ModelConfig, call: dict[str, Any], first_frame: bool) -> Tensor:
    """Ours for a recorded call, from nothing but its noise channels, time and text."""
    text = Text(call["encoder_hidden_states"], call["pooled_projections"])
    latents = call["hidden_states"][..., : model.in_visual_dim]
    return predict_velocity(transformer, model, latents, first_frame, call["timestep"], text)


def load_pipeline(cls: Any, folder: Path) -> Any:
    pipeline = cls.from_pretrained(folder, local_files_only=True)
    for parameter in pipeline.transformer.parameters():
        # Loaded weights lie unaligned in the file's map, where matrix products round otherwise; RoPE's rounding to bf16
        # would make 2e-5 of it.
        parameter.data = parameter.data.clone()
    return pipeline


def check_parity(folder: Path, pipeline: Any, calls: list[Any], first_frame: bool) -> None:
    """Velocities within 1e-5 and the gradient of every weight within a relative 1e-4."""
    transformer, model = our_model(folder), model_config(folder)
    for call, expected in calls:
        with torch.no_grad():
            velocity = our_velocity(transformer, model, call, first_frame)
        torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)
        pipeline.transformer.zero_grad()
        transformer.zero_grad()
        direction = random(*expected.shape, seed=5)
        (our_velocity(transformer, model, call, first_frame) * direction).sum().backward()
        (pipeline.transformer(**call).sample * direction).sum().backward()
        expected_grads = {name: parameter.grad for name, parameter in pipeline.transformer.named_parameters()}
        for name, parameter in base_parameters(transformer):
            reference = expected_grads[name]
            assert parameter.grad is not None and reference is not None, name
            # A shift of all keys changes no attention, so the gradient of their bias is the small rest of a sum that
            # RoPE's rounding to bf16 runs through.
            assert relative(parameter.grad, reference) <= (1e-3 if name.endswith("to_key.bias") else 1e-4), name


def set_adapters(transformer: nn.Module, size: float = 0.2) -> None:
    with torch.no_grad():
        adapters = [(name, each) for name, each in transformer.named_parameters() if ".lora_" in name]
        for at, (name, parameter) in enumerate(adapters):
            if ".lora_B." in name:
                parameter.copy_(size * random(*parameter.shape, seed=at))
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.3 * random(*parameter.shape, seed=at).tanh())
