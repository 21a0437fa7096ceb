"""A committed checkpoint → what diffusers loads, proved by loading it there.

LoRA: `pytorch_lora_weights.safetensors`; full fine-tune: a `transformer/` folder. The proof drives the inference
pipeline itself with the export and compares its latents with those the trained model sampled (the run's probe).
"""

from __future__ import annotations

import dataclasses
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
from k5dist.model.lora_files import LORA_FILE
from k5dist.model.pretrained import component_folder, component_uri
from k5dist.model.transformer import build_transformer
from k5dist.model.weights import HEAD, stored_tensors
from k5dist.parity import verify
from k5dist.plan import RunPlan
from k5dist.train.adaptive import averaged
from k5dist.train.checkpoint import committed_steps, step_folder
from k5dist.train.history import LossHistory
from k5dist.train.validate import best_probe_uri, probe_uri, read_tensors

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
    weights: str = "raw"  # or ema, or average (a schedule-free optimiser's)
    merged_error: float | None = None  # of the transformer with the LoRA merged, where one was asked for


def export_run(plan: RunPlan) -> ExportReport:
    """Export the newest committed checkpoint, or with export.checkpoint=best that of the least held-out loss, to
    `<run>/export`, verified.

    Raises:
        ConfigError: when the run has no such checkpoint, or none that a training or its validation is through with.
        ExportMismatch: when the inference pipeline disagrees with the trained model.
    """
    steps = committed_steps(plan.checkpoints_uri, plan.run_fingerprint)
    if not steps:
        rule = "the run has no committed checkpoint to export"
        raise ConfigError("stages", list(plan.config.stages), rule, "run with train among the stages")
    target = storage.join(plan.run_uri, "export")
    step = steps[-1] if plan.config.export.checkpoint == "last" else _best(plan, steps)
    done = _finished(plan, target, step)
    if done:
        return done
    with storage.scratch_folder("export") as folder:
        out = folder / "export"
        out.mkdir()
        checkpoint = storage.fetch_folder(storage.join(plan.checkpoints_uri, step_folder(step)), folder / "checkpoint")
        if plan.config.adapter == "lora":
            _write_lora(plan, checkpoint, out)
            if plan.config.export.merge:
                _write_merged(plan, checkpoint, out / "transformer")
        else:
            _write_transformer(plan, checkpoint, out / "transformer")
        error, difference, merged = verify(plan, out, _probe(plan, step))
        files = tuple(sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()))
        tolerance = TOLERANCE[plan.config.train.precision]
        report = ExportReport(step, target, files, error, tolerance, difference, _source(plan), merged)
        error = error if merged is None else max(error, merged)
        if not error <= tolerance:
            raise ExportMismatch(
                f"the exported model's latents differ from the trained model's by {error:.2e} (allowed {tolerance:.0e})"
            )
        (out / REPORT).write_text(json.dumps(asdict(report), indent=2))
        storage.remove(target)  # an earlier export may have had other files
        storage.publish_folder(out, target, last=REPORT)
    return report


def _finished(plan: RunPlan, target: str, step: int) -> ExportReport | None:
    """The report of an export that is there already and is the one asked for."""
    uri = storage.join(target, REPORT)
    if not storage.exists(uri):
        return None
    found = json.loads(storage.read_text(uri))
    report = ExportReport(**{**found, "files": tuple(found["files"])})
    same = (report.step, report.weights) == (step, _source(plan))
    return report if same and (report.merged_error is not None or not plan.config.export.merge) else None


def _source(plan: RunPlan) -> str:
    """Which weights are exported: those that were validated, or the raw ones where asked for."""
    if plan.config.ema.enabled and plan.config.ema.export:
        return "ema"
    return "average" if plan.config.optimizer.kind == "adamw_schedulefree" else "raw"


def _model_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    prefix = "model."
    return {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and not key.startswith(prefix + HEAD) and isinstance(value, TensorStorageMetadata)
    }


def _read(checkpoint: Path, entries: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, by one process without a group."""
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load({"model": tensors}, checkpoint_id=str(checkpoint), no_dist=True)
    return tensors


def _weights(plan: RunPlan, checkpoint: Path, entries: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """The weights to export of those that `entries` name."""
    source = _source(plan)
    if source == "ema":
        tensors = {name: torch.empty(entry.size, dtype=torch.float32) for name, entry in entries.items()}
        dcp.load({"ema": tensors}, checkpoint_id=str(checkpoint), no_dist=True)
        return tensors
    tensors = _read(checkpoint, entries)
    if source == "average":
        z = {name: {"z": torch.empty_like(tensor)} for name, tensor in tensors.items()}
        dcp.load({"optimizer": z}, checkpoint_id=str(checkpoint), no_dist=True)
        beta1 = plan.config.optimizer.betas[0]
        tensors = {name: averaged(tensor, z[name]["z"], beta1) for name, tensor in tensors.items()}
    return tensors


def _write_lora(plan: RunPlan, checkpoint: Path, out: Path) -> None:
    from diffusers import Kandinsky5T2VPipeline
    from peft import get_peft_model_state_dict

    dtype = torch.bfloat16
    # Dropout is training's: diffusers leaves the layers that it adds in training mode, and would drop in sampling.
    lora = dataclasses.replace(plan.config.lora, dropout=0.0)
    transformer: Any = build_transformer(plan.pretrained, plan.config.model, lora=lora, dtype=dtype)
    tensors = _weights(plan, checkpoint, _model_tensors(checkpoint))
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
    _write_folder(plan, sizes, lambda names: _weights(plan, checkpoint, {name: entries[name] for name in names}), out)


def _write_merged(plan: RunPlan, checkpoint: Path, out: Path) -> None:
    """The base with its adapters added to its weights, in fp32 and from the checkpoint's own weights, quantised or not
    in training: W + s B A, with DoRA each row at its trained length."""
    adapters = _weights(plan, checkpoint, _model_tensors(checkpoint))
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


def _best(plan: RunPlan, steps: list[int]) -> int:
    best = LossHistory.read(plan).best_step
    if best is None or best not in steps:
        what = "no held-out loss is on record" if best is None else f"the checkpoint of step {best} was not kept"
        rule = f"{what} (with checkpoint.keep_best=true it is, from the next validation on)"
        raise ConfigError("export.checkpoint", "best", rule, "export.checkpoint=last")
    return best


def _probe(plan: RunPlan, step: int) -> dict[str, Tensor]:
    """What the model of a checkpoint sampled when it was trained."""
    uri = probe_uri(plan) if plan.config.export.checkpoint == "last" else best_probe_uri(plan)
    probe = read_tensors(uri) if storage.exists(uri) else {}
    if not probe or int(probe["step"]) != step:
        rule = f"the training is not through with step {step}: it has left nothing to compare its export with"
        raise ConfigError("stages", list(plan.config.stages), rule, "run with train among the stages, to its end")
    return probe
