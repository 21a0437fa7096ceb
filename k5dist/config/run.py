"""One run's configuration, whole, and the rules that hang on more than one of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from k5dist.config.cluster import ClusterConfig, ParallelConfig, StorageConfig, TrackingConfig
from k5dist.config.crepa import CrepaConfig
from k5dist.config.export import ExportConfig
from k5dist.config.kubernetes import KubernetesConfig
from k5dist.config.lora import LoraConfig
from k5dist.config.model import FlavourConfig, ModelConfig
from k5dist.config.names import adapter_names, weight_names
from k5dist.config.optimizer import EmaConfig, OptimizerConfig
from k5dist.config.precache import PrecacheConfig
from k5dist.config.rollout import RolloutConfig
from k5dist.config.slurm import SlurmConfig
from k5dist.config.train import TrainConfig
from k5dist.config.tread import TreadConfig
from k5dist.config.validation import CheckpointConfig, ValidationConfig
from k5dist.datasets import DataConfig, DatasetConfig
from k5dist.schema import ConfigError, build, one_of
from k5dist.shapes import NABLA_SIDE_UNIT, SIDE_UNIT, check_nabla_sides, default_resolution

STAGES = ("plan", "verify", "precache", "train", "validate", "export", "prune")
_LIGHT_STAGES = frozenset(("plan", "verify", "prune"))  # what needs no GPU


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
    ema: EmaConfig
    rollout: RolloutConfig
    tread: TreadConfig
    crepa: CrepaConfig
    parallel: ParallelConfig
    cluster: ClusterConfig
    slurm: SlurmConfig
    kubernetes: KubernetesConfig
    storage: StorageConfig
    tracking: TrackingConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
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
        self._check_lora()
        self._check_first_frames()
        if self.pretrained == "???":
            rule = f"flavour {self.flavour.name} names no public repository"
            raise ConfigError("pretrained", None, rule, "pretrained=<hub id, local folder or s3:// URI>")
        full = self.adapter == "full"
        self.optimizer.check_names(weight_names(self.model) if full else adapter_names(self.model, self.lora))
        self._check_weights()
        if self.model.is_sparse:
            self._check_nabla()
        for dataset in self.datasets:
            self._check_dataset(dataset)
        blocks = self.model.num_visual_blocks
        self.crepa.check(blocks, self.tread.resolve(blocks))
        if self.model.num_heads % self.parallel.context:
            heads = self.model.num_heads
            divisors = [d for d in range(1, heads + 1) if heads % d == 0]
            rule = f"Ulysses splits attention heads: the degree must divide the model's {heads} heads"
            fix = f"parallel.context= one of {', '.join(map(str, divisors))}"
            raise ConfigError("parallel.context", self.parallel.context, rule, fix)
        self._check_best()
        if self.rollout.enabled and self.rollout.start_step >= self.train.steps:
            rule = f"rollouts begin after this step, and the training has {self.train.steps}"
            raise ConfigError("rollout.start_step", self.rollout.start_step, rule, "rollout.start_step=0")
        if self.flavour.task == "i2v" and self.validation_shape[0] < 17:
            rule = "the image-to-video pipeline normalises 5 latent frames after the first: at least 17 frames"
            raise ConfigError("validation.num_frames", self.validation_shape[0], rule, "validation.num_frames=17")

    def _check_weights(self) -> None:
        """What asks for an average of the weights, or for frozen ones."""
        if "ema" in self.validation.compare and not self.ema.enabled:
            rule = "this run keeps no average of its weights"
            raise ConfigError("validation.compare", list(self.validation.compare), rule, "ema.enabled=true")
        if self.ema.enabled and self.optimizer.kind == "adamw_schedulefree":
            rule = "a schedule-free optimiser's weights are an average already"
            raise ConfigError("ema.enabled", True, rule, "ema.enabled=false or optimizer.kind=adamw")
        if self.train.stream_weights and self.adapter == "full":
            rule = "frozen weights can wait in the host's memory; adapter=full trains them all"
            raise ConfigError("train.stream_weights", True, rule, "adapter=lora or train.stream_weights=false")

    def _check_best(self) -> None:
        """What hangs on held-out losses needs them to be measured."""
        wants = {"export.checkpoint": self.export.checkpoint == "best", "validation.patience": self.validation.patience}
        measured = "train" not in self.stages or "validate" in self.stages
        for key, wanted in wants.items():
            if not wanted:
                continue
            value = "best" if wanted is True else wanted
            if not self.data.held_out or not measured:
                rule = "it goes by the loss of clips held out, which the stage validate measures"
                raise ConfigError(key, value, rule, "data.held_out=0.05, and train and validate among the stages")
            if key == "export.checkpoint" and not self.checkpoint.keep_best:
                rule = "the best checkpoint is only there where it is kept"
                raise ConfigError(key, value, rule, "checkpoint.keep_best=true")
            if key == "validation.patience" and not self.validation.every:
                rule = "it counts validations, and there is but one, at the end"
                raise ConfigError(key, value, rule, "validation.every=250")

    def _check_dataset(self, dataset: DatasetConfig) -> None:
        """What of a dataset hangs on the model and the task."""
        dataset.resolutions(self.side_unit)
        if self.flavour.task == "i2v" and dataset.frame_counts[-1] == 1:
            name = "num_frames" if dataset.num_frames == 1 else "min_frames"
            rule = "image-to-video learns the frames after the first: samples need more than one"
            raise ConfigError(dataset.key(name), getattr(dataset, name), rule, f"{dataset.key(name)}=17")

    def _check_lora(self) -> None:
        """Of adapters what hangs on the rest."""
        off = {"init_from": "null", "base_dtype": "null", "dropout": "0", "use_rslora": "false", "use_dora": "false"}
        for name, nothing in off.items():
            value = getattr(self.lora, name)
            if self.adapter == "full" and value:
                rule = "a full fine-tune has no adapter, and no frozen weights"
                raise ConfigError(f"lora.{name}", value, rule, f"adapter=lora or lora.{name}={nothing}")
        if self.adapter == "full" and self.export.merge:
            rule = "a full fine-tune is exported whole, there is nothing to merge"
            raise ConfigError("export.merge", True, rule, "adapter=lora or export.merge=false")
        if self.lora.base_dtype is not None and self.train.float8:
            rule = "train.float8 multiplies weights that are stored in bf16"
            raise ConfigError("lora.base_dtype", self.lora.base_dtype, rule, "one of lora.base_dtype and train.float8")

    def _check_first_frames(self) -> None:
        """What only image-to-video has."""
        validation = self.validation
        if self.flavour.task != "i2v":
            for key, value in (
                ("train.first_frame_dropout", self.train.first_frame_dropout),
                ("validation.images", list(validation.images)),
            ):
                if value:
                    off = "[]" if key == "validation.images" else "0"
                    rule = "only image-to-video is given a first frame"
                    raise ConfigError(key, value, rule, f"{key}={off}, or an i2v flavour")
            return
        if validation.images and len(validation.images) != len(validation.prompts):
            rule = f"one image for each of the {len(validation.prompts)} validation.prompts, in their order"
            raise ConfigError("validation.images", list(validation.images), rule, "as many of both, or no images")
        sides = self.validation_shape[1:]
        if validation.prompts and not validation.images and sides not in self.resolutions:
            rule = "without validation.images videos begin with cached clips' first frames: sides of one of the buckets"
            fix = f"validation.resolution=[{','.join(map(str, self.resolutions[0]))}], or set validation.images"
            raise ConfigError("validation.resolution", list(sides), rule, fix)

    def _check_no_credentials(self) -> None:
        """Configurations are stored and shown: a login in a URI would be, too."""
        uris = {"storage.root": self.storage.root, "tracking.uri": self.tracking.uri, "data.source": self.data.source}
        uris |= {dataset.key("source"): dataset.source for dataset in self.datasets}
        uris |= {f"validation.images[{at}]": uri for at, uri in enumerate(self.validation.images)}
        uris |= {"pretrained": self.pretrained, "validation.clip_model": self.validation.clip_model}
        uris |= {"lora.init_from": self.lora.init_from, "cluster.address": self.cluster.address}
        for key, uri in uris.items():
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
