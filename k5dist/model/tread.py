"""TREAD, token routing: a share of the visual tokens skips a run of blocks and comes back as it was (arXiv 2501.04765).

At a route's first block the tokens are parted by a draw of the clip's own; the kept ones go through its blocks, with
their own rotations and, under NABLA, their own part of the window; after its last block the dropped ones stand in
their old places with the values they had before it. As published, and as its reference implementation does it.

Under NABLA whole blocks of 64 tokens are kept or dropped. Image-to-video always keeps the first frame. The draw knows
nothing of ranks: a context-parallel group parts the clip as one worker does, and then evens out who holds the kept
tokens, so that every worker's run has one static length.

Shape suffixes: B clips, S all tokens, s a worker's tokens, K all kept tokens, M model_dim, C channels, E head_dim / 2,
N blocks of 64 tokens, W words of a row's bits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k5dist.cache.keys import seed_of
from k5dist.config import Route
from k5dist.model.attention import Rope
from k5dist.model.context import ContextGroup
from k5dist.model.nabla import BLOCK_TOKENS, NablaParameters, pack_bits, unpack_bits


@dataclass(frozen=True)
class Routing:
    """One clip's routes; all its draws follow from `seed`."""

    routes: tuple[Route, ...]
    seed: int
    first_frame: bool  # its tokens are never dropped


class Visual(NamedTuple):
    """What a visual block is given of the tokens: a worker's run of them, and what says where they stand."""

    x_BsM: Tensor
    rope: Rope  # of the worker's run
    sparsity: NablaParameters | None
    num_tokens: int  # of the whole context-parallel group


def draw_kept(route: Route, seed: int, units: int, fixed: int) -> Tensor:
    """Indices of the kept units, ascending, int64 on the CPU; the first `fixed` are among them.

    Uniform over all subsets of that size. Drawn on the CPU, so that the host knows them without asking a device.
    """
    free = route.kept(units, fixed) - fixed
    drawn = torch.randperm(units - fixed, generator=torch.Generator().manual_seed(seed))[:free]
    return torch.cat([torch.arange(fixed), drawn.sort().values + fixed])


def window_between(sparsity: NablaParameters, blocks_K: Tensor) -> NablaParameters:
    """NABLA's parameters for the kept blocks alone: their pairs see each other as they did among all."""
    num_blocks = len(sparsity.window_NW)
    rows = unpack_bits(sparsity.window_NW.index_select(0, blocks_K), num_blocks)
    return dataclasses.replace(sparsity, window_NW=pack_bits(rows.index_select(1, blocks_K)))


class _Part(torch.autograd.Function):
    """x → (kept, dropped). The gradient is a gather as well: that of `index_select` would add by atomics."""

    @staticmethod
    def forward(ctx: Any, x_BsC: Tensor, kept: Tensor, dropped: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inverse)
        return x_BsC.index_select(1, kept), x_BsC.index_select(1, dropped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return torch.cat(grads, 1).index_select(1, inverse), None, None, None


class _Join(torch.autograd.Function):
    """(kept, dropped) → x, the way back."""

    @staticmethod
    def forward(
        ctx: Any, kept_BkC: Tensor, dropped_BdC: Tensor, kept: Tensor, dropped: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(kept, dropped)
        return torch.cat([kept_BkC, dropped_BdC], 1).index_select(1, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, dropped = ctx.saved_tensors
        return grads[0].index_select(1, kept), grads[0].index_select(1, dropped), None, None, None


class Router:
    """Takes one forward's tokens into its routes and out of them.

    Args:
        angles_SE: of all the clip's tokens, in their order.
        frame_tokens: tokens of a latent frame.
    """

    def __init__(
        self, routing: Routing, angles_SE: Tensor, frame_tokens: int, *, sparse: bool, context: ContextGroup | None
    ) -> None:
        self.routing, self.context, self.angles_SE = routing, context, angles_SE
        self.unit = BLOCK_TOKENS if sparse else 1
        self.fixed = frame_tokens // self.unit if routing.first_frame else 0
        self._starts = {route.first: number for number, route in enumerate(routing.routes)}
        self._ends = {route.last for route in routing.routes}

    def enter(self, block: int, visual: Visual) -> Visual:
        """What visual block `block` sees; at a route's first block the kept tokens alone."""
        number = self._starts.get(block)
        if number is None:
            return visual
        seed = seed_of(self.routing.seed, number)
        units = draw_kept(self.routing.routes[number], seed, visual.num_tokens // self.unit, self.fixed)
        tokens = units if self.unit == 1 else (units[:, None] * self.unit + torch.arange(self.unit)).flatten()
        x = visual.x_BsM
        own = self._own_positions(tokens, x.shape[1])
        mask = torch.zeros(x.shape[1], dtype=torch.bool)
        mask[own] = True
        dropped = (~mask).nonzero().flatten()
        inverse = torch.cat([own, dropped]).argsort()
        self._kept, self._out, self._inverse = (_to_device(each, x.device) for each in (own, dropped, inverse))
        kept_BkM, self._dropped = _Part.apply(x, self._kept, self._out, self._inverse)  # type: ignore[misc]
        self._shares = _shares(tokens, visual.num_tokens, self.context)
        on_device = _to_device(tokens, x.device)
        angles = self.angles_SE.index_select(0, on_device)[None]
        if self.context is not None:
            kept_BkM = self._evened(kept_BkM, len(tokens))
            angles = self.context.own_tokens(angles)
        self._before = visual[1:]
        sparsity = visual.sparsity and window_between(visual.sparsity, _to_device(units, x.device))
        return Visual(kept_BkM, Rope(angles[0].cos(), angles[0].sin()), sparsity, len(tokens))

    def leave(self, block: int, visual: Visual) -> Visual:
        """What comes after visual block `block`; at a route's last block all tokens, in their places."""
        if block not in self._ends:
            return visual
        kept_BkM = visual.x_BsM
        if self.context is not None:
            send, receive = self._shares
            kept_BkM = self.context.move_tokens(kept_BkM[:, : sum(receive)], receive, send)
        x = _Join.apply(kept_BkM, self._dropped, self._kept, self._out, self._inverse)
        del self._dropped, self._kept, self._out, self._inverse
        assert isinstance(x, Tensor)
        return Visual(x, *self._before)

    def _own_positions(self, tokens_K: Tensor, share: int) -> Tensor:
        """Where the kept tokens lie in this worker's run of `share` tokens; padding at a run's end is never kept."""
        if self.context is None:
            return tokens_K
        own = tokens_K - self.context.rank * share
        return own[(own >= 0) & (own < share)]

    def _evened(self, kept_BkM: Tensor, num_kept: int) -> Tensor:
        """This worker's run of the kept tokens, of the same length on all: ceil(K / n), zeros where it is short."""
        assert self.context is not None
        x = self.context.move_tokens(kept_BkM, *self._shares)
        short = -(-num_kept // self.context.size) - x.shape[1]
        return F.pad(x, (0, 0, 0, short)) if short else x


def _shares(tokens_K: Tensor, num_tokens: int, context: ContextGroup | None) -> tuple[list[int], list[int]]:
    """How many kept tokens this worker sends to each of its group, and gets from each, to even them out.

    Runs of tokens and runs of kept tokens are both in order, so what goes from one to another is a run as well.
    """
    if context is None:
        return [], []
    size, rank = context.size, context.rank
    share, kept_share = -(-num_tokens // size), -(-len(tokens_K) // size)
    holds = torch.searchsorted(tokens_K, torch.arange(size + 1) * share).tolist()
    wants = [min(worker * kept_share, len(tokens_K)) for worker in range(size + 1)]

    def common(holder: int, wanter: int) -> int:
        return max(0, min(holds[holder + 1], wants[wanter + 1]) - max(holds[holder], wants[wanter]))

    workers = range(size)
    return [common(rank, worker) for worker in workers], [common(worker, rank) for worker in workers]


def _to_device(index: Tensor, device: torch.device) -> Tensor:
    """From page-locked memory, from where a GPU takes it without being waited for."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
