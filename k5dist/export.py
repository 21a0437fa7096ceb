"""A committed checkpoint → what diffusers loads, proved by loading it there.

LoRA: `pytorch_lora_weights.safetensors`; full fine-tune: a `transformer/` folder. The proof drives the inference
pipeline itself with the export and compares its latents with those the trained model sampled (the run's probe).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from k5dist import storage
from k5dist.config import ConfigError
from k5dist.model.attention import Rope, attend, rotate
from k5dist.model.forward import nabla_parameters
from k5dist.model.lora_files import LORA_FILE
from k5dist.model.pretrained import component_folder, component_uri
from k5dist.model.quantised import round_blocks
from k5dist.model.transformer import build_transformer
from k5dist.model.weights import stored_tensors
from k5dist.plan import RunPlan
from k5dist.train.checkpoint import committed_steps, step_folder
from k5dist.train.validate import probe_uri, read_tensors

REPORT = "export.json"
_SHARD_BYTES = 5 * 2**30
TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2}  # relative error of two guided steps; RoPE rounds q and k to bf16 in any case


class ExportMismatch(Exception):
    """The exported model does not give what the trained model gave; nothing was published."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how it compared: relative errors ‖a − b‖ / ‖b‖ of latents."""

    step: int
    uri: str
    files: tuple[str, ...]
    error: float
    tolerance: float
    difference_to_base: float
    merged_error: float | None = None  # of the transformer with the LoRA merged, where one was asked for


def export_run(plan: RunPlan) -> ExportReport:
    """Export the newest committed checkpoint to `<run>/export`, verified.

    Raises:
        ConfigError: when the run has no checkpoint yet.
        ExportMismatch: when the inference pipeline disagrees with the trained model.
    """
    steps = committed_steps(plan.checkpoints_uri, plan.run_fingerprint)
    if not steps:
        rule = "the run has no committed checkpoint to export"
        raise ConfigError("stages", list(plan.config.stages), rule, "run with train among the stages")
    target = storage.join(plan.run_uri, "export")
    done = _finished(target, steps[-1], merged=plan.config.export.merge)
    if done:
        return done
    with storage.scratch_folder("export") as folder:
        out = folder / "export"
        out.mkdir()
        checkpoint = storage.fetch_folder(
            storage.join(plan.checkpoints_uri, step_folder(steps[-1])), folder / "checkpoint"
        )
        if plan.config.adapter == "lora":
            _write_lora(plan, checkpoint, out)
            if plan.config.export.merge:
                _write_merged(plan, checkpoint, out / "transformer")
        else:
            _write_transformer(plan, checkpoint, out / "transformer")
        error, difference, merged = _verify(plan, out)
        files = tuple(sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()))
        tolerance = TOLERANCE[plan.config.train.precision]
        report = ExportReport(steps[-1], target, files, error, tolerance, difference, merged)
        error = error if merged is None else max(error, merged)
        if not error <= tolerance:
            raise ExportMismatch(
                f"the exported model's latents differ from the trained model's by {error:.2e} (allowed {tolerance:.0e})"
            )
        (out / REPORT).write_text(json.dumps(asdict(report), indent=2))
        storage.publish_folder(out, target, last=REPORT)
    return report


def _finished(target: str, step: int, *, merged: bool) -> ExportReport | None:
    uri = storage.join(target, REPORT)
    if not storage.exists(uri):
        return None
    found = json.loads(storage.read_text(uri))
    report = ExportReport(**{**found, "files": tuple(found["files"])})
    return report if report.step == step and (report.merged_error is not None or not merged) else None


def _model_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    prefix = "model."
    return {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
    }


def _read(checkpoint: Path, entries: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, by one process without a group."""
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load({"model": tensors}, checkpoint_id=str(checkpoint), no_dist=True)
    return tensors


def _write_lora(plan: RunPlan, checkpoint: Path, out: Path) -> None:
    from diffusers import Kandinsky5T2VPipeline
    from peft import get_peft_model_state_dict

    dtype = torch.bfloat16
    transformer: Any = build_transformer(plan.pretrained, plan.config.model, lora=plan.config.lora, dtype=dtype)
    tensors = _read(checkpoint, _model_tensors(checkpoint))
    layers: Any = get_peft_model_state_dict(transformer, state_dict=tensors)
    assert len(layers) == len(tensors), "every adapter tensor has a place in PEFT's format"
    Kandinsky5T2VPipeline.save_lora_weights(
        str(out),
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        weight_name=LORA_FILE,
    )


def _write_transformer(plan: RunPlan, checkpoint: Path, out: Path) -> None:
    entries = _model_tensors(checkpoint)
    sizes = {name: entry.size.numel() for name, entry in entries.items()}
    _write_folder(plan, sizes, lambda names: _read(checkpoint, {name: entries[name] for name in names}), out)


def _write_merged(plan: RunPlan, checkpoint: Path, out: Path) -> None:
    """The base with its adapters added to its weights, in fp32 and from the checkpoint's own weights, quantised or not
    in training: W + s B A, with DoRA each row at its trained length."""
    adapters = _read(checkpoint, _model_tensors(checkpoint))
    base = stored_tensors(component_uri(plan.pretrained, "transformer"))

    def merged(name: str) -> Tensor:
        weight = base[name].read_rows(0, base[name].shape[0])
        path = name.removesuffix(".weight")
        parts = {p: adapters.get(f"{path}.{p}.default.weight") for p in ("lora_A", "lora_B", "lora_magnitude_vector")}
        first, second, lengths = parts.values()
        if first is None or second is None:
            return weight
        whole = weight.float() + plan.config.lora.scale * second.float() @ first.float()
        return whole if lengths is None else whole * (lengths.float() / whole.norm(dim=1))[:, None]

    sizes = {name: math.prod(tensor.shape) for name, tensor in base.items()}
    _write_folder(plan, sizes, lambda names: {name: merged(name) for name in names}, out)


def _write_folder(
    plan: RunPlan, sizes: dict[str, int], read: Callable[[list[str]], dict[str, Tensor]], out: Path
) -> None:
    """A diffusers folder, written a few GiB at a time, in the types the model computed with."""
    from diffusers import Kandinsky5Transformer3DModel

    out.mkdir(parents=True)
    keep_fp32 = tuple(Kandinsky5Transformer3DModel._keep_in_fp32_modules)
    compute = torch.bfloat16 if plan.config.train.precision == "bf16" else torch.float32
    groups = list(_groups(sizes))
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        file = f"diffusion_pytorch_model{suffix}.safetensors"
        tensors = {
            name: tensor.to(torch.float32 if any(p in keep_fp32 for p in name.split(".")) else compute)
            for name, tensor in read(group).items()
        }
        safetensors.torch.save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = component_folder(plan.pretrained, "transformer") / "config.json"
    (out / "config.json").write_bytes(config.read_bytes())


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, numbers in sorted(sizes.items()):
        size += numbers * 4
        group.append(name)
        if size >= _SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _verify(plan: RunPlan, out: Path) -> tuple[float, float, float | None]:
    """Relative errors of the pipeline's latents against the trained model's: with the export, with the base alone, and
    with the merged transformer.

    Adapters that were trained on a quantised base are proved on such a base. Merged they belong to the true one, on
    which the trained model never was: there the merged transformer is held against base and adapter.
    """
    lora = plan.config.lora if plan.config.adapter == "lora" else None
    probe = read_tensors(probe_uri(plan))
    trained = probe["latents"].float()
    base_folder = component_folder(plan.pretrained, "transformer")
    base = _pipeline(plan, base_folder, lora.base_dtype if lora else None)
    if "first_frame" in probe:  # the pipeline evens out the first frames after sampling
        trained = base.normalize_first_frame(trained[None])[0]
    difference = _relative_error(_sample(plan, base, probe), trained)
    if lora is not None:
        base.load_lora_weights(str(out), weight_name=LORA_FILE)
        exported = base
    else:
        del base
        exported = _pipeline(plan, out / "transformer")
    error = _relative_error(_sample(plan, exported, probe), trained)
    if lora is None or not plan.config.export.merge:
        return error, difference, None
    if lora.base_dtype:
        exported = _pipeline(plan, base_folder)
        exported.load_lora_weights(str(out), weight_name=LORA_FILE)
        trained = _sample(plan, exported, probe)
    del base, exported
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
