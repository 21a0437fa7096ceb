"""The run's configuration as frozen dataclasses, with every rule that needs nothing but the configuration itself.

Pure Python on purpose: composing and refusing a configuration must take milliseconds. Defaults, units and meanings of
the keys stand in one place, `conf/`; this package holds none, so a key that is missing there is an error here.
"""

from k5dist.config.cluster import ClusterConfig, ParallelConfig, StorageConfig, TrackingConfig
from k5dist.config.crepa import CrepaConfig
from k5dist.config.export import ExportConfig
from k5dist.config.kubernetes import KubernetesConfig
from k5dist.config.lora import BLOCK_LAYERS, LoraConfig
from k5dist.config.model import FlavourConfig, ModelConfig
from k5dist.config.optimizer import OPTIMIZERS, EmaConfig, OptimizerConfig
from k5dist.config.precache import PrecacheConfig
from k5dist.config.rollout import RolloutConfig
from k5dist.config.run import STAGES, RunConfig
from k5dist.config.slurm import SlurmConfig
from k5dist.config.train import CHECKPOINTING, TrainConfig
from k5dist.config.tread import Route, RouteConfig, TreadConfig
from k5dist.config.validation import RECOMMENDED_GUIDANCE, CheckpointConfig, ValidationConfig
from k5dist.schema import ConfigError, nearest
from k5dist.shapes import NABLA_BLOCK, PATCH, VAE_SPACE_COMPRESSION, VAE_TIME_COMPRESSION

__all__ = [
    "BLOCK_LAYERS",
    "CHECKPOINTING",
    "NABLA_BLOCK",  # with those constants of shapes that the model reads from here
    "OPTIMIZERS",
    "PATCH",
    "RECOMMENDED_GUIDANCE",
    "STAGES",
    "VAE_SPACE_COMPRESSION",
    "VAE_TIME_COMPRESSION",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "CrepaConfig",
    "EmaConfig",
    "ExportConfig",
    "FlavourConfig",
    "KubernetesConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecacheConfig",
    "RolloutConfig",
    "Route",
    "RouteConfig",
    "RunConfig",
    "SlurmConfig",
    "StorageConfig",
    "TrackingConfig",
    "TrainConfig",
    "TreadConfig",
    "ValidationConfig",
    "nearest",
]
