"""What is trained: flavour and architecture."""

from __future__ import annotations

import dataclasses

from k5dist.schema import one_of


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
