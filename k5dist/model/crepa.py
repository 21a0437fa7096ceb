"""CREPA: a block's hidden states are drawn towards a frozen vision encoder's features of the frame and its neighbours.

    L = L_score + λ L_align,   L_align = −Σ_f [ sim(y_f, h(x_f)) + Σ_{k ∈ K} exp(−|k − f| / τ) sim(y_k, h(x_f)) ]

with K = {f − d, f + d} as far as there are such frames, sim the cosine similarity, meaned over a frame's patches, and h
a trained projection head (arXiv 2506.09229; the head is REPA's, arXiv 2410.06940). With `normalize_by_frames` the sum
over f is a mean, so that its weight against the score does not grow with a clip's length.

Features lie on a grid of the encoder's patches. They are interpolated, in two dimensions, to the grid of the DiT's
tokens: frozen targets move, hidden states stay whole, wherever and in whatever order a worker holds them.

Shape suffixes: B clips, T H W latent frames and sides in tokens, h w sides of the features' grid, s a worker's tokens,
M model_dim, D width of the features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from k5dist.config import CrepaConfig
from k5dist.config.crepa import HEAD_DIM
from k5dist.model.context import ContextGroup
from k5dist.model.tokens import flatten

FRAMES_AT_ONCE = 4  # whose targets and projections are alive together


class CrepaHead(nn.Module):
    """The projection head, and the alignment itself: what is large never leaves it."""

    def __init__(self, crepa: CrepaConfig, model_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.block_index, self.distance = crepa.block_index, crepa.adjacent_distance
        self.decay = math.exp(-crepa.adjacent_distance / crepa.temporal_decay) if crepa.adjacent_distance else 0.0
        self.mean = crepa.normalize_by_frames
        self.first = nn.Linear(model_dim, HEAD_DIM)
        self.second = nn.Linear(HEAD_DIM, HEAD_DIM)
        self.third = nn.Linear(HEAD_DIM, feature_dim)

    def forward(
        self, x_BsM: Tensor, features_ThwD: Tensor, tokens_THW: tuple[int, int, int], blocked: bool,
        context: ContextGroup | None,
    ) -> Tensor:  # fmt: skip
        """−L_align of one clip, fp32, 0-dim; the whole clip's on every worker of a context-parallel group.

        Args:
            x_BsM: a worker's run of the block's output.
            features_ThwD: of the whole clip.
            blocked: tokens stand in NABLA's order.
        """
        assert len(x_BsM) == 1 and len(features_ThwD) == tokens_THW[0], "one clip, features of each latent frame"
        frames, frame_tokens = tokens_THW[0], tokens_THW[1] * tokens_THW[2]
        start = 0 if context is None else context.rank * x_BsM.shape[1]
        stop = max(start, min(start + x_BsM.shape[1], frames * frame_tokens))
        total = torch.zeros((), device=x_BsM.device)
        # A worker whose run is padding alone takes part with no token: all must gather and reduce the head's weights.
        first, last = min(start // frame_tokens, frames - 1), max(-(-stop // frame_tokens), 1)
        for at in range(first, max(last, first + 1), FRAMES_AT_ONCE):
            to = min(at + FRAMES_AT_ONCE, frames)
            begin, end = max(at * frame_tokens, start), min(to * frame_tokens, stop)
            piece = x_BsM[0, begin - start : max(end, begin) - start]
            where = slice(begin - at * frame_tokens, max(end, begin) - at * frame_tokens)
            arguments = (piece, features_ThwD, at, to, tokens_THW[1:], blocked, where)
            total = total + checkpoint(self._agreement, *arguments, use_reentrant=False, preserve_rng_state=False)
        if context is not None:  # as the velocity is gathered: its backward sums what each worker's loss asks
            total = context.gather_tokens(total.reshape(1, 1, 1), context.size).sum()
        return total / (frame_tokens * (frames if self.mean else 1))

    def _agreement(
        self, x_sM: Tensor, features_ThwD: Tensor, at: int, to: int, sides: tuple[int, int], blocked: bool, where: slice
    ) -> Tensor:
        """Sum over some tokens of frames `at` to `to` of their weighted cosine similarities."""
        projected = self.third(F.silu(self.second(F.silu(self.first(x_sM)))))
        targets = flatten(self.targets(features_ThwD, at, to, sides)[None], blocked)[0, where]
        return (F.normalize(projected.float(), dim=-1) * targets).sum()

    @torch.no_grad()
    def targets(self, features_ThwD: Tensor, at: int, to: int, sides: tuple[int, int]) -> Tensor:
        """What frames `at` to `to` are held against, [to − at, H, W, D]: Σ_k exp(−|k − f| / τ) y_k / |y_k|, fp32."""
        low, high = max(0, at - self.distance), min(len(features_ThwD), to + self.distance)
        grid = features_ThwD[low:high].float().permute(0, 3, 1, 2)
        y = F.interpolate(grid, size=sides, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        y = F.normalize(y, dim=-1)
        targets = y[at - low : to - low].clone()
        if self.distance:
            for frame in range(at, to):
                for neighbour in (frame - self.distance, frame + self.distance):
                    if 0 <= neighbour < len(features_ThwD):
                        targets[frame - at] += self.decay * y[neighbour - low]
        return targets
