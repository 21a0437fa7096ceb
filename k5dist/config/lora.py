"""Adapters: which layers of the blocks get one, how it is scaled, where it starts, how the frozen base is stored."""

from __future__ import annotations

import dataclasses

from k5dist.schema import ConfigError, nearest, one_of, positive

_PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")
_FEED_FORWARD = ("feed_forward.in_layer", "feed_forward.out_layer")
_SELF, _CROSS = (tuple(f"{name}.{layer}" for layer in _PROJECTIONS) for name in ("self_attention", "cross_attention"))
# The linear layers of a block that an adapter may be on. (A modulation is fp32, outside the block.)
BLOCK_LAYERS = {"text": (*_SELF, *_FEED_FORWARD), "visual": (*_SELF, *_CROSS, *_FEED_FORWARD)}
PRESETS = {"attention": (*_SELF, *_CROSS), "attention+ffn": (*_SELF, *_CROSS, *_FEED_FORWARD)}
BASE_DTYPES = ("int8", "float8")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    blocks: str
    dropout: float
    use_rslora: bool
    use_dora: bool
    init_from: str | None
    base_dtype: str | None

    def __post_init__(self) -> None:
        positive("lora.rank", self.rank)
        positive("lora.alpha", self.alpha)
        one_of("lora.blocks", self.blocks, ("all", *BLOCK_LAYERS))
        if isinstance(self.targets, str):
            one_of("lora.targets", self.targets, PRESETS)
        elif not self.targets:
            raise ConfigError("lora.targets", [], "at least one layer", "lora.targets=attention")
        layers = self.layers
        for target in self.targets if not isinstance(self.targets, str) else ():
            if not any(_ends_with(name, target) for names in layers.values() for name in names):
                known = list(dict.fromkeys(name for names in BLOCK_LAYERS.values() for name in names))
                of_kind = "a block" if self.blocks == "all" else f"a {self.blocks} block"
                rule = f"the end of the name of one of {of_kind}'s layers: {', '.join(known)}"
                guess = nearest(target, [*known, *_PROJECTIONS], 1)
                raise ConfigError("lora.targets", target, rule, f"lora.targets=[{guess[0] if guess else 'to_query'}]")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora.dropout", self.dropout, "a probability, 0 ≤ p < 1", "lora.dropout=0.05")
        if self.base_dtype is not None:
            one_of("lora.base_dtype", self.base_dtype, BASE_DTYPES)

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of the adapted layers of a block of each kind, `text` and `visual`."""
        wanted = PRESETS[self.targets] if isinstance(self.targets, str) else self.targets
        return {
            kind: tuple(name for name in names if any(_ends_with(name, target) for target in wanted))
            for kind, names in BLOCK_LAYERS.items()
            if self.blocks in ("all", kind)
        }

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by: α / r, with rsLoRA α / √r (Kalajdzievski 2023)."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def _ends_with(name: str, suffix: str) -> bool:
    """Whether `suffix` is `name` or ends it from a dot on."""
    return name == suffix or name.endswith(f".{suffix}")
