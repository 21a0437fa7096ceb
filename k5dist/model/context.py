"""Context parallelism after DeepSpeed-Ulysses: a group's workers share one clip's tokens, and swap them for heads.

Outside attention every worker holds a run of the tokens with all heads; inside, all tokens with its share of the heads.

Shape suffixes: B clips, S all tokens, s a worker's tokens, H all heads, h a worker's heads, D head_dim, n workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

# Named anew in torch 2.13.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_GROUPS: dict[str, dist.ProcessGroup] = {}  # an operator takes names, not groups


@torch.library.custom_op("k5dist::all_to_all", mutates_args=())
def _all_to_all(x_NX: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    """Worker i gets the next `send[i]` rows of dimension 0; `receive[i]` come from worker i, in order.

    An operator of our own: what goes through PyTorch's functional `all_to_all_single` in a compiled, checkpointed block
    stays on the GPU from its forward to its backward (torch 2.11; four times a block's input on H200).
    """
    out_NX = x_NX.new_empty(sum(receive), *x_NX.shape[1:])
    dist.all_to_all_single(out_NX, x_NX.contiguous(), list(receive), list(send), group=_GROUPS[group])
    return out_NX


@_all_to_all.register_fake
def _all_to_all_fake(x_NX: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    return x_NX.new_empty(sum(receive), *x_NX.shape[1:])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.receive, ctx.send, ctx.group = inputs[1:]


def _all_to_all_gradient(ctx: Any, grad_NX: Tensor) -> tuple[Tensor | None, ...]:
    return _all_to_all(grad_NX, ctx.send, ctx.receive, ctx.group), None, None, None


_all_to_all.register_autograd(_all_to_all_gradient, setup_context=_keep_for_backward)


@dataclass(frozen=True)
class ContextGroup:
    """The workers that share a clip. All of them must be given the same clip, noise, timestep and text."""

    group: dist.ProcessGroup
    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> ContextGroup:
        _GROUPS[group.group_name] = group
        return cls(group, group.group_name, dist.get_rank(group), dist.get_world_size(group))

    def own_tokens(self, x_BSC: Tensor) -> Tensor:
        """This worker's run of the tokens, [B, ceil(S / n), C]; zeros stand where the last worker's run is short."""
        share = -(-x_BSC.shape[1] // self.size)
        own = x_BSC[:, self.rank * share : (self.rank + 1) * share]
        short = share - own.shape[1]
        # A copy: a view would keep the whole clip's on the GPU for as long as the first block keeps its input.
        return F.pad(own, (0, 0, 0, short)) if short else own.clone()

    def gather_tokens(self, x_BsC: Tensor, num_tokens: int) -> Tensor:
        """All tokens on every worker, [B, num_tokens, C].

        Its backward sums the workers' gradients: each takes the loss over the whole clip, so a weight's gradient comes
        out n times its share, which FSDP2's mean over data-parallel × context workers takes back.
        """
        return _all_gather(x_BsC.contiguous(), 1, self.group)[:, :num_tokens]

    def heads_for_tokens(self, x_BsHD: Tensor, num_tokens: int) -> Tensor:
        """[B, s, H, D] → [B, num_tokens, h, D]: give the other workers their heads, take the rest of the tokens."""
        x_nBshD = x_BsHD.unflatten(2, (self.size, -1)).movedim(2, 0)
        return self._swap(x_nBshD).transpose(0, 1).flatten(1, 2)[:, :num_tokens]

    def tokens_for_heads(self, x_BShD: Tensor) -> Tensor:
        """[B, S, h, D] → [B, s, H, D], the way back."""
        num_tokens = x_BShD.shape[1]
        share = -(-num_tokens // self.size)
        short = share * self.size - num_tokens
        padded = F.pad(x_BShD, (0, 0, 0, 0, 0, short)) if short else x_BShD
        x_nBshD = padded.unflatten(1, (self.size, share)).movedim(1, 0)
        return self._swap(x_nBshD).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def move_tokens(self, x_BsC: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Give worker i the next `send[i]` tokens of this run; `receive[i]` tokens come from worker i, in order."""
        moved = _all_to_all(x_BsC.transpose(0, 1), receive, send, self.name)
        return moved.transpose(0, 1).contiguous()

    def _swap(self, x_nXXXX: Tensor) -> Tensor:
        """Slice i of dimension 0 goes to worker i; what worker i sent comes back at i."""
        splits = [1] * self.size
        return _all_to_all(x_nXXXX, splits, splits, self.name)
