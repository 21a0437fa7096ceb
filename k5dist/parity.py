"""An export held against the trained model: the inference pipeline's own latents with it, and the run's probe.

The pipeline is diffusers', loaded as a user would load it; nothing of the training's forward stands in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k5dist.model.attention import Rope, attend, rotate
from k5dist.model.forward import nabla_parameters
from k5dist.model.lora_files import LORA_FILE
from k5dist.model.pretrained import component_folder
from k5dist.model.quantised import round_blocks
from k5dist.plan import RunPlan


def verify(plan: RunPlan, out: Path, probe: dict[str, Tensor]) -> tuple[float, float, float | None]:
    """Relative errors of the pipeline's latents against the trained model's: with the export in the folder `out`, with
    the base alone, and with the merged transformer where there is one.

    Adapters that were trained on a quantised base are proved on such a base. Merged they belong to the true one, on
    which the trained model never was: there the merged transformer is held against base and adapter.
    """
    config = plan.config
    lora = config.lora if config.adapter == "lora" else None
    raw = config.ema.enabled and not config.ema.export
    trained = probe["latents.raw" if raw else "latents"].float()
    base_folder = component_folder(plan.pretrained, "transformer")
    base = _pipeline(plan, base_folder, lora.base_dtype if lora else None)
    if "first_frame" in probe:  # the pipeline evens out the first frames after sampling
        trained = base.normalize_first_frame(trained[None])[0]
    difference = _relative_error(_sample(plan, base, probe), trained)
    if lora is not None:
        base.load_lora_weights(str(out), weight_name=LORA_FILE)
    exported = base if lora is not None else None
    del base  # one at a time: each may fill a GPU
    exported = exported or _pipeline(plan, out / "transformer")
    error = _relative_error(_sample(plan, exported, probe), trained)
    if lora is None or not plan.config.export.merge:
        return error, difference, None
    if lora.base_dtype:
        del exported
        exported = _pipeline(plan, base_folder)
        exported.load_lora_weights(str(out), weight_name=LORA_FILE)
        trained = _sample(plan, exported, probe)
    del exported
    merged = _sample(plan, _pipeline(plan, out / "transformer"), probe)
    return error, difference, _relative_error(merged, trained)


def _pipeline(plan: RunPlan, transformer_folder: Path, rounded_to: str | None = None) -> Any:
    from diffusers import Kandinsky5I2VPipeline, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    from k5dist.model.sample import load_scheduler

    dtype = torch.bfloat16 if plan.config.train.precision == "bf16" else torch.float32
    transformer = Kandinsky5Transformer3DModel.from_pretrained(str(transformer_folder), torch_dtype=dtype)
    if rounded_to:
        round_blocks(transformer, rounded_to)
    nothing: Any = None
    image_to_video = plan.config.flavour.task == "i2v"
    pipeline = (Kandinsky5I2VPipeline if image_to_video else Kandinsky5T2VPipeline)(
        transformer=transformer,
        vae=nothing,
        text_encoder=nothing,
        tokenizer=nothing,
        text_encoder_2=nothing,
        tokenizer_2=nothing,
        scheduler=load_scheduler(plan.pretrained),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _sample(plan: RunPlan, pipeline: Any, probe: dict[str, Tensor]) -> Tensor:
    """The pipeline's own sampling from the probe's noise and text: latents [T, H, W, C], fp32 on CPU."""
    noise = probe["noise"][None].float()
    channels = plan.config.model.in_visual_dim
    mask = torch.zeros(*noise.shape[:-1], 1)
    latents = noise.clone()
    image: dict[str, Any] = {}
    if "first_frame" in probe:
        latents[:, :1] = probe["first_frame"]
        mask[:, :1] = 1
        image = {
            "image": torch.zeros(1, 3, 8, 8)
        }  # the latents say it already; the pipeline only asks for its presence
    if plan.config.model.visual_cond:
        latents = torch.cat([latents, torch.zeros(*noise.shape[:-1], channels), mask], dim=-1)
    if plan.config.model.is_sparse:
        _use_own_attention(plan, pipeline)
    out = pipeline(
        **image,
        prompt_embeds_qwen=probe["text.qwen"].to(pipeline.device),
        prompt_embeds_clip=probe["text.clip"].to(pipeline.device),
        prompt_cu_seqlens=torch.tensor([0, probe["text.qwen"].shape[1]]),
        negative_prompt_embeds_qwen=probe["negative.qwen"].to(pipeline.device),
        negative_prompt_embeds_clip=probe["negative.clip"].to(pipeline.device),
        negative_prompt_cu_seqlens=torch.tensor([0, probe["negative.qwen"].shape[1]]),
        latents=latents,
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        num_frames=(noise.shape[1] - 1) * 4 + 1,
        num_inference_steps=2,
        guidance_scale=float(probe["guidance"]),
        output_type="latent",
        return_dict=False,
    )[0]
    return out[0].float().cpu()


def _use_own_attention(plan: RunPlan, pipeline: Any) -> None:
    """NABLA through our kernels: the stock attention is dense on CPU without a word."""
    model = plan.config.model

    def sparse_params(sample: Tensor, device: torch.device) -> dict[str, Any]:
        _, frames, height, width, _ = sample.shape
        return {"to_fractal": True, "nabla": nabla_parameters(model, (frames, height // 2, width // 2), device)}

    pipeline.get_sparse_params = sparse_params
    pipeline.transformer.set_attn_processor(_NablaProcessor())


class _NablaProcessor:
    """What diffusers' `Kandinsky5Attention` calls, with the blocks that `sparse_params` names really left out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_query(hidden_states).unflatten(-1, (attn.num_heads, -1))
        key, value = (project(source).unflatten(-1, (attn.num_heads, -1)) for project in (attn.to_key, attn.to_value))
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            rope = Rope(rotary_emb[0, :, 0, :, 0, 0], rotary_emb[0, :, 0, :, 1, 0])
            query, key = rotate(query, rope), rotate(key, rope)
        out = attend(query, key, value, None if sparse_params is None else sparse_params["nabla"])
        return attn.out_layer(out.flatten(-2))


def _relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())
