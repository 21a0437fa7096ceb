"""Context parallelism after DeepSpeed-Ulysses: a group's workers share one clip's tokens, and swap them for heads.

Outside attention every worker holds a run of the tokens with all heads; inside, all tokens with its share of the heads.

Shape suffixes: B clips, S all tokens, s a worker's tokens, H all heads, h a worker's heads, D head_dim, n workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed._functional_collectives import all_to_all_single_autograd

# Named anew in torch 2.13.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


@dataclass(frozen=True)
class ContextGroup:
    """The workers that share a clip. All of them must be given the same clip, noise, timestep and text."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> ContextGroup:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def own_tokens(self, x_BSC: Tensor) -> Tensor:
        """This worker's run of the tokens, [B, ceil(S / n), C]; zeros stand where the last worker's run is short."""
        share = -(-x_BSC.shape[1] // self.size)
        own = x_BSC[:, self.rank * share : (self.rank + 1) * share]
        short = share - own.shape[1]
        return F.pad(own, (0, 0, 0, short)) if short else own

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
        moved = all_to_all_single_autograd(x_BsC.transpose(0, 1).contiguous(), receive, send, self.group)
        return moved.transpose(0, 1).contiguous()

    def _swap(self, x_nXXXX: Tensor) -> Tensor:
        """Slice i of dimension 0 goes to worker i; what worker i sent comes back at i."""
        splits = [1] * self.size
        return all_to_all_single_autograd(x_nXXXX.contiguous(), splits, splits, self.group)
