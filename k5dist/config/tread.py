"""TREAD: which blocks are skipped by which share of the tokens, and the rules on it (arXiv 2501.04765)."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

from k5dist.config.model import ModelConfig
from k5dist.schema import ConfigError
from k5dist.shapes import NABLA_BLOCK


@dataclasses.dataclass(frozen=True)
class RouteConfig:
    """Names, meanings and negative indices are those of the reference implementation and of other trainers."""

    selection_ratio: float
    start_layer_idx: int
    end_layer_idx: int


@dataclasses.dataclass(frozen=True)
class Route:
    """Visual blocks `first` to `last`, both included, which the share `ratio` of the tokens skips."""

    first: int
    last: int
    ratio: float

    def kept(self, units: int, fixed: int) -> int:
        """Units (tokens, or NABLA's blocks of them) that stay, of which `fixed` always do.

        As the reference, the number of dropped ones is rounded down.
        """
        return units - int((units - fixed) * self.ratio)


@dataclasses.dataclass(frozen=True)
class TreadConfig:
    routes: tuple[RouteConfig, ...]

    def __post_init__(self) -> None:
        for number, route in enumerate(self.routes):
            if not 0 < route.selection_ratio < 1:
                key = f"tread.routes[{number}].selection_ratio"
                rule = "the share of the tokens that skip the blocks, 0 < share < 1"
                raise ConfigError(key, route.selection_ratio, rule, "selection_ratio: 0.5, or tread.routes=[]")

    def resolve(self, num_blocks: int) -> tuple[Route, ...]:
        """The routes of a model of `num_blocks` visual blocks, in the order in which tokens meet them.

        Raises:
            ConfigError: for blocks that are not there, a route that ends before it starts, and routes that overlap.
        """
        routes = []
        for number, route in enumerate(self.routes):
            first, last = (
                self._index(num_blocks, f"tread.routes[{number}].{name}", getattr(route, name))
                for name in ("start_layer_idx", "end_layer_idx")
            )
            if first > last:
                rule = f"a route starts at or before the block where it ends: here blocks {first} and {last}"
                fix = f"end_layer_idx: {first} or more, or -1"
                raise ConfigError(f"tread.routes[{number}].end_layer_idx", route.end_layer_idx, rule, fix)
            routes.append(Route(first, last, route.selection_ratio))
        routes.sort(key=lambda route: route.first)
        for one, other in itertools.pairwise(routes):
            if one.last >= other.first:
                rule = f"routes must not overlap: {one.first}…{one.last} and {other.first}…{other.last} do"
                raise ConfigError("tread.routes", self._shown(), rule, f"start the second at {one.last + 1} or later")
        return tuple(routes)

    def tokens_of_blocks(
        self, model: ModelConfig, tokens_THW: tuple[int, int, int], *, first_frame: bool
    ) -> tuple[int, ...]:
        """Visual tokens of a training clip that each visual block computes; `first_frame`: image-to-video."""
        return _tokens_of_blocks(self, model, tokens_THW, first_frame)

    def _index(self, num_blocks: int, key: str, index: int) -> int:
        if not -num_blocks <= index < num_blocks:
            rule = f"the model has {num_blocks} visual blocks: 0…{num_blocks - 1}, or -1…-{num_blocks} from the end"
            name = key.rsplit(".", 1)[-1]
            fix = f"{name}: {min(2, num_blocks - 1) if name.startswith('start') else -1}"
            raise ConfigError(key, index, rule, fix)
        return index % num_blocks

    def _shown(self) -> list[dict[str, float]]:
        return [dataclasses.asdict(route) for route in self.routes]


@lru_cache(maxsize=64)  # the plan asks for every setting that it tries
def _tokens_of_blocks(
    tread: TreadConfig, model: ModelConfig, tokens_THW: tuple[int, int, int], first_frame: bool
) -> tuple[int, ...]:
    frames, height, width = tokens_THW
    unit = NABLA_BLOCK**2 if model.is_sparse else 1
    a_frame = height * width // unit
    tokens = [frames * height * width] * model.num_visual_blocks
    for route in tread.resolve(model.num_visual_blocks):
        kept = route.kept(frames * a_frame, a_frame if first_frame else 0) * unit
        tokens[route.first : route.last + 1] = [kept] * (route.last + 1 - route.first)
    return tuple(tokens)
