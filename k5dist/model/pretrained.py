"""Checkpoints by name: a hub id, a local folder or an object-store URI, all in diffusers' layout.

No weights are loaded here, and torch is not imported: the driver asks this module who a checkpoint is before anything
is allocated.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from k5dist import storage
from k5dist.config import ConfigError, ModelConfig, RunConfig

GENERATED_VERSION = 2  # raise when `k5dist.model.tiny` makes other weights
VISION_FOLDER = "dinov2"  # of a generated checkpoint: CREPA's encoder
ENCODER_COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_SMALL_FILE = 4 * 2**20
_SAMPLES = 8
_SAMPLE_BYTES = 64 * 2**10


def is_hub_id(pretrained: str) -> bool:
    looks_like = re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained) is not None and not pretrained.startswith(".")
    return looks_like and not Path(pretrained).exists()


def check(config: RunConfig) -> None:
    """Raises ConfigError when `pretrained` is a folder or URI without a diffusers checkpoint. Hub ids pass."""
    if config.flavour.generated or is_hub_id(config.pretrained):
        return
    storage.check_readable("pretrained", config.pretrained)
    for needed in ("model_index.json", "transformer/config.json"):
        if not storage.exists(storage.join(config.pretrained, needed)):
            rule = f"a diffusers checkpoint folder has {needed}"
            raise ConfigError("pretrained", config.pretrained, rule, "name the folder that holds model_index.json")


def check_clip(config: RunConfig) -> None:
    """Raises ConfigError when `validation.clip_model` is a folder or URI without both towers. Hub ids pass."""
    name = config.validation.clip_model
    if name is None or is_hub_id(name):
        return
    fix = "name the folder of a whole CLIP checkpoint, or validation.clip_model=null"
    file = storage.join(storage.normalise(name), "config.json")
    if not storage.exists(file):
        raise ConfigError("validation.clip_model", name, "a CLIP checkpoint's folder has config.json", fix)
    found = json.loads(storage.read_text(file)).get("model_type")
    if found != "clip":
        rule = f"it takes CLIP's text and image towers, model_type clip, and this is {found}"
        raise ConfigError("validation.clip_model", name, rule, fix)


def identity(config: RunConfig) -> str:
    """What stands for the checkpoint's content in fingerprints, from few and small reads.

    A hub id stands for itself, a generated checkpoint for its recipe; a folder for a digest of its file names, sizes,
    its small files and samples of its large ones, so a fine-tuned encoder is never taken for its parent.
    """
    if config.flavour.generated:
        recipe = json.dumps([config.flavour.task, GENERATED_VERSION, config.to_mapping()["model"]], sort_keys=True)
        return f"generated:{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if is_hub_id(config.pretrained):
        return f"hub:{config.pretrained}"
    digest = hashlib.sha256()
    for name, size in sorted(storage.sizes(config.pretrained).items()):
        if name.split("/")[0] not in ("transformer", "scheduler", *ENCODER_COMPONENTS):
            continue
        digest.update(f"{name}\0{size}\0".encode())
        uri = storage.join(config.pretrained, name)
        if size <= _SMALL_FILE:
            digest.update(storage.read_bytes(uri))
            continue
        for i in range(_SAMPLES):
            start = int(i * (size - _SAMPLE_BYTES) / (_SAMPLES - 1))
            digest.update(storage.read_bytes(uri, start, start + _SAMPLE_BYTES))
    return f"folder:{digest.hexdigest()[:16]}"


def encoder_identity(config: RunConfig) -> str:
    """What stands for CREPA's vision encoder: as for a checkpoint, and of a generated one its own."""
    name = config.crepa.encoder
    if config.flavour.generated and storage.normalise(name).startswith(storage.normalise(config.pretrained)):
        return f"{identity(config)}:vision"
    if is_hub_id(name):
        return f"hub:{name}"
    if not storage.exists(storage.join(name, "config.json")):
        rule = "a folder of transformers' DINOv2 has config.json and model.safetensors"
        raise ConfigError("crepa.encoder", name, rule, "crepa.encoder=facebook/dinov2-giant")
    digest = hashlib.sha256()
    for file, size in sorted(storage.sizes(name).items()):
        end = min(size, _SMALL_FILE)
        digest.update(f"{file}\0{size}\0".encode() + storage.read_bytes(storage.join(name, file), 0, end))
    return f"folder:{digest.hexdigest()[:16]}"


def encoder_folder(name: str) -> Path:
    """A local folder with a vision encoder of that name."""
    if not is_hub_id(name):
        folder, _, last = storage.normalise(name).rstrip("/").rpartition("/")
        return component_folder(folder, last)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        rule = f"the hub must hold it and be reachable ({type(error).__name__})"
        fix = "check the name, network and login, or name a local folder"
        raise ConfigError("crepa.encoder", name, rule, fix) from error


def component_uri(pretrained: str, component: str) -> str:
    """Folder or URI of one component; a hub id's is downloaded to the hub's own cache on this machine."""
    if is_hub_id(pretrained):
        from huggingface_hub import snapshot_download

        try:
            patterns = [f"{component}/*", "model_index.json"]
            return str(Path(snapshot_download(pretrained, allow_patterns=patterns)) / component)
        except Exception as error:
            rule = f"the hub must hold it and be reachable ({type(error).__name__})"
            fix = "check the name, network and login, or name a local folder"
            raise ConfigError("pretrained", pretrained, rule, fix) from error
    return storage.join(storage.normalise(pretrained), component)


def component_folder(pretrained: str, component: str) -> Path:
    """A local folder with one component; object storage is copied to this machine's scratch cache, each state once."""
    uri = component_uri(pretrained, component)
    if storage.is_local(uri):
        return storage.fetch_folder(uri, Path())
    facts = [[n, i["size"], str(i.get("ETag") or i.get("LastModified"))] for n, i in sorted(storage.find(uri).items())]
    place = hashlib.sha256(json.dumps([uri, facts]).encode()).hexdigest()[:16]
    return storage.fetch_folder(uri, Path.home() / ".cache" / "k5dist" / "pretrained" / place)


def read_config(pretrained: str, component: str, file: str = "config.json") -> dict[str, Any]:
    return json.loads(storage.read_text(storage.join(component_uri(pretrained, component), file)))


def scheduler_shift(pretrained: str) -> float:
    """The shift of σ that the checkpoint's own scheduler samples with."""
    return float(read_config(pretrained, "scheduler", "scheduler_config.json").get("shift", 1.0))


def check_architecture(model: ModelConfig, config: dict[str, Any]) -> None:
    """Raises ConfigError when the checkpoint's `transformer/config.json` is not the planned model."""
    for key in ModelConfig.__dataclass_fields__:
        planned, found = getattr(model, key), config.get(key)
        found = tuple(found) if isinstance(found, list) else found
        sparse_only = key.startswith("attention_") and key != "attention_type"
        if planned != found and not (sparse_only and not model.is_sparse):
            rule = f"the checkpoint says {key}={found!r}"
            raise ConfigError(f"model.{key}", planned, rule, "choose the flavour of this checkpoint, or set the key")
