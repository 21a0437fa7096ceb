"""The run's configuration as frozen dataclasses, with every rule that needs nothing but the configuration itself.

Pure Python on purpose: composing and refusing a configuration must take milliseconds. Defaults, units and meanings of
the keys stand in one place, `conf/`; this module holds none, so a key that is missing there is an error here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from k5dist.datasets import DataConfig, DatasetConfig
from k5dist.schema import ConfigError, build, nearest, one_of, positive
from k5dist.shapes import (
    NABLA_BLOCK,
    NABLA_SIDE_UNIT,
    PATCH,
    SIDE_UNIT,
    VAE_SPACE_COMPRESSION,
    VAE_TIME_COMPRESSION,
    check_nabla_sides,
    check_num_frames,
    check_sides,
    default_resolution,
    parse_resolution,
)

__all__ = [  # with those constants of shapes that the model reads from here
    "NABLA_BLOCK",
    "PATCH",
    "VAE_SPACE_COMPRESSION",
    "VAE_TIME_COMPRESSION",
    "ConfigError",
    "RunConfig",
    "nearest",
]

STAGES = ("plan", "verify", "precache", "train", "validate", "export", "prune")
_LIGHT_STAGES = frozenset(("plan", "verify", "prune"))  # what needs no GPU
CHECKPOINTING = ("auto", "linear", "attention", "full")  # from `linear` on, each needs less memory than the one before
RECOMMENDED_GUIDANCE = (2.0, 6.0)


@dataclasses.dataclass(frozen=True)
class FlavourConfig:
    name: str
    task: str
    generated: bool

    def __post_init__(self) -> None:
        one_of("flavour.task", self.task, ("t2v", "i2v"))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The checkpoint's `transformer/config.json`, as far as planning needs it. Names are diffusers'."""

    model_dim: int
    ff_dim: int
    time_dim: int
    num_text_blocks: int
    num_visual_blocks: int
    axes_dims: tuple[int, ...]
    in_text_dim: int
    in_text_dim2: int
    in_visual_dim: int
    out_visual_dim: int
    visual_cond: bool
    attention_type: str
    attention_P: float | None
    attention_wT: int | None
    attention_wW: int | None
    attention_wH: int | None
    attention_add_sta: bool | None

    def __post_init__(self) -> None:
        one_of("model.attention_type", self.attention_type, ("regular", "nabla"))

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def is_sparse(self) -> bool:
        return self.attention_type == "nabla"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: str

    def __post_init__(self) -> None:
        positive("lora.rank", self.rank)
        positive("lora.alpha", self.alpha)
        one_of("lora.targets", self.targets, ("attention", "attention+ffn"))


@dataclasses.dataclass(frozen=True)
class PrecacheConfig:
    shard_size_mib: float
    max_failure_ratio: float
    text_batch_size: int
    repair: bool
    vae_enable_patch_conv: bool
    vae_enable_tiling: bool
    vae_workers: int | None
    decode_workers: int | None
    max_text_tokens: int
    prompt_template: str | None
    prompt_template_start: int | None
    latents: str

    def __post_init__(self) -> None:
        for name in ("shard_size_mib", "text_batch_size", "max_text_tokens"):
            positive(f"precache.{name}", getattr(self, name))
        if not 0 <= self.max_failure_ratio <= 1:
            fix = "precache.max_failure_ratio=0.1"
            raise ConfigError("precache.max_failure_ratio", self.max_failure_ratio, "a share, 0 ≤ share ≤ 1", fix)
        one_of("precache.latents", self.latents, ("sample", "mode"))
        if (self.prompt_template is None) != (self.prompt_template_start is None):
            rule = "a template and the number of its tokens to cut off belong together"
            raise ConfigError("precache.prompt_template_start", self.prompt_template_start, rule, "set both or neither")
        if self.prompt_template is not None and "{}" not in self.prompt_template:
            rule = "the prompt goes where the template says {}"
            raise ConfigError("precache.prompt_template", self.prompt_template, rule, "put {} into the template")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch_size: int | None
    seed: int
    precision: str
    activation_checkpointing: str
    offload_gib: float
    compile: bool
    float8: bool
    attention: str
    timestep_mean: float
    timestep_std: float
    timestep_shift: float | None
    caption_dropout: float

    def __post_init__(self) -> None:
        positive("train.steps", self.steps)
        if self.batch_size is not None:
            positive("train.batch_size", self.batch_size)
        positive("train.timestep_std", self.timestep_std)
        one_of("train.precision", self.precision, ("bf16", "fp32"))
        if self.float8 and self.precision != "bf16":
            rule = "float8 products belong to a bf16 model"
            raise ConfigError("train.float8", True, rule, "train.precision=bf16 or train.float8=false")
        one_of("train.attention", self.attention, ("auto", "flash3", "flash4"))
        one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        if self.offload_gib < 0 or (self.offload_gib and not self.compile):
            rule = "GiB of the host's memory a worker, 0 or more; only what compiled blocks keep can be moved there"
            raise ConfigError("train.offload_gib", self.offload_gib, rule, "train.offload_gib=64 train.compile=true")
        if not 0 <= self.caption_dropout <= 1:
            rule = "a probability, 0 ≤ p ≤ 1"
            raise ConfigError("train.caption_dropout", self.caption_dropout, rule, "train.caption_dropout=0.1")
        if self.timestep_shift is not None:
            positive("train.timestep_shift", self.timestep_shift)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    kind: str
    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    max_grad_norm: float
    schedule: str
    warmup_steps: int

    def __post_init__(self) -> None:
        one_of("optimizer.kind", self.kind, ("adamw", "adamw_bf16"))
        positive("optimizer.lr", self.lr)
        positive("optimizer.max_grad_norm", self.max_grad_norm)
        one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optimizer.betas", self.betas, "two numbers, 0 ≤ β < 1", "optimizer.betas=[0.9,0.99]")
        if self.warmup_steps < 0:
            raise ConfigError("optimizer.warmup_steps", self.warmup_steps, "steps ≥ 0", "optimizer.warmup_steps=0")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    shard: int | None
    replicate: int
    context: int

    def __post_init__(self) -> None:
        for name in ("shard", "replicate", "context"):
            if getattr(self, name) is not None:
                positive(f"parallel.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    kind: str
    nodes: int
    gpus_per_node: int | None
    workers_per_node: int | None
    address: str | None
    max_restarts: int

    def __post_init__(self) -> None:
        one_of("cluster.kind", self.kind, ("local", "ray", "slurm", "kubernetes"))
        positive("cluster.nodes", self.nodes)
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            raise ConfigError("cluster.gpus_per_node", self.gpus_per_node, "GPUs ≥ 0", "cluster.gpus_per_node=8")
        if self.workers_per_node is not None:
            positive("cluster.workers_per_node", self.workers_per_node)
        if self.max_restarts < 0:
            raise ConfigError("cluster.max_restarts", self.max_restarts, "restarts ≥ 0", "cluster.max_restarts=3")


@dataclasses.dataclass(frozen=True)
class StorageConfig:
    root: str


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    uri: str | None
    experiment: str


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    prompts: tuple[str, ...]
    negative_prompt: str
    every: int
    guidance: float
    num_frames: int | None
    resolution: tuple[int, ...] | None
    sampling_steps: int
    timesteps: int

    def __post_init__(self) -> None:
        if self.num_frames is not None:
            check_num_frames("validation.num_frames", self.num_frames)
        if self.resolution is not None:
            ((height, width),) = parse_resolution("validation.resolution", self.resolution)
            check_sides("validation.resolution", height, width)
        if self.every < 0:
            raise ConfigError("validation.every", self.every, "steps ≥ 0 (0: at the end only)", "validation.every=100")
        if self.guidance < 1:
            rule = "classifier-free guidance ≥ 1 (1: none; 2…6 looks right)"
            raise ConfigError("validation.guidance", self.guidance, rule, "validation.guidance=5.0")
        positive("validation.sampling_steps", self.sampling_steps)
        positive("validation.timesteps", self.timesteps)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int

    def __post_init__(self) -> None:
        positive("checkpoint.every", self.every)
        positive("checkpoint.keep", self.keep)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, whole. `from_mapping` is the only way in; what it returns has passed every rule of this module."""

    name: str | None
    stages: tuple[str, ...]
    flavour: FlavourConfig
    pretrained: str
    model: ModelConfig
    adapter: str
    lora: LoraConfig
    data: DataConfig
    precache: PrecacheConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    cluster: ClusterConfig
    storage: StorageConfig
    tracking: TrackingConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    resume: str

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> RunConfig:
        return build(cls, mapping, "")

    def to_mapping(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars: what JSON and YAML can hold; `from_mapping` takes it back."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ConfigError("stages", stage, f"out of {', '.join(STAGES)}", f"stages=[{','.join(STAGES)}]")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise ConfigError("name", self.name, "a plain folder name", "name=my-run")
        if not self.stages:
            raise ConfigError("stages", [], "at least one stage", f"stages=[{','.join(STAGES)}]")
        self._check_no_credentials()
        one_of("adapter", self.adapter, ("lora", "full"))
        one_of("resume", self.resume, ("auto", "never"))
        if self.pretrained == "???":
            rule = f"flavour {self.flavour.name} names no public repository"
            raise ConfigError("pretrained", None, rule, "pretrained=<hub id, local folder or s3:// URI>")
        if self.model.is_sparse:
            self._check_nabla()
        for dataset in self.datasets:
            self._check_dataset(dataset)
        if self.model.num_heads % self.parallel.context:
            heads = self.model.num_heads
            divisors = [d for d in range(1, heads + 1) if heads % d == 0]
            rule = f"Ulysses splits attention heads: the degree must divide the model's {heads} heads"
            fix = f"parallel.context= one of {', '.join(map(str, divisors))}"
            raise ConfigError("parallel.context", self.parallel.context, rule, fix)
        if self.flavour.task == "i2v" and self.validation_shape[0] < 17:
            rule = "the image-to-video pipeline normalises 5 latent frames after the first: at least 17 frames"
            raise ConfigError("validation.num_frames", self.validation_shape[0], rule, "validation.num_frames=17")

    def _check_dataset(self, dataset: DatasetConfig) -> None:
        """What of a dataset hangs on the model and the task."""
        dataset.resolutions(self.side_unit)
        if self.flavour.task == "i2v" and dataset.frame_counts[-1] == 1:
            name = "num_frames" if dataset.num_frames == 1 else "min_frames"
            rule = "image-to-video learns the frames after the first: samples need more than one"
            raise ConfigError(dataset.key(name), getattr(dataset, name), rule, f"{dataset.key(name)}=17")

    def _check_no_credentials(self) -> None:
        """Configurations are stored and shown: a login in a URI would be, too."""
        uris = {"storage.root": self.storage.root, "tracking.uri": self.tracking.uri, "data.source": self.data.source}
        uris |= {dataset.key("source"): dataset.source for dataset in self.datasets}
        for key, uri in {**uris, "pretrained": self.pretrained}.items():
            scheme, separator, rest = (uri or "").partition("://")
            authority = rest.split("/", 1)[0]
            if separator and "@" in authority:
                shown = f"{scheme}://…@{authority.rsplit('@', 1)[1]}"
                fix = "use the environment (AWS_*, MLFLOW_TRACKING_USERNAME and _PASSWORD) or a profile"
                raise ConfigError(key, shown, "a configuration holds no credentials", fix)

    def _check_nabla(self) -> None:
        shapes = [
            (data.key("resolution"), *sides) for data in self.datasets for sides in data.resolutions(self.side_unit)
        ]
        shapes.append(("validation.resolution", *self.validation_shape[1:]))
        for key, height, width in shapes:
            check_nabla_sides(key, height, width)

    @property
    def prepares(self) -> bool:
        """Whether the cache is brought up to date: by the stage of that name, or to mend what `verify` finds."""
        return "precache" in self.stages or ("verify" in self.stages and self.precache.repair)

    @property
    def needs_gpu(self) -> bool:
        return self.prepares or not _LIGHT_STAGES.issuperset(self.stages)

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """Every dataset with its keys resolved: those of `data.datasets`, or `main` out of `data.*`."""
        return self.data.resolve()

    @property
    def side_unit(self) -> int:
        """What sides of buckets must be multiples of, in pixels."""
        return NABLA_SIDE_UNIT if self.model.is_sparse else SIDE_UNIT

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of all datasets' buckets."""
        return tuple(dict.fromkeys(sides for data in self.datasets for sides in data.resolutions(self.side_unit)))

    @property
    def validation_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the validation videos, in pixels."""
        height, width = self.validation.resolution or default_resolution(self.resolutions)
        frames = self.validation.num_frames or max(dataset.num_frames for dataset in self.datasets)
        return (frames, height, width)
