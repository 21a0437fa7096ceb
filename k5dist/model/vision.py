"""The frozen vision encoder of CREPA: DINOv2's patch features of the frames that stand for a clip's latent frames.

Shape suffixes: T frames, t latent frames, H W pixels, h w sides of the grid of patches, D width of the features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from k5dist.config import VAE_TIME_COMPRESSION, CrepaConfig
from k5dist.config.crepa import PATCH_PIXELS
from k5dist.model.pretrained import encoder_folder

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, as DINOv2 was trained
_FRAMES_AT_ONCE = 8


class VisionEncoder:
    """Any of transformers' DINOv2 models (with registers or without) in bf16 on CUDA, fp32 elsewhere.

    Latent frame 0 is pixel frame 0 alone, latent frame i holds pixel frames 4i − 3 to 4i: pixel frame 4i, the last,
    stands for it. Frames keep their aspect ratio (`CrepaConfig.grid`).
    """

    def __init__(self, crepa: CrepaConfig, device: str) -> None:
        from transformers import AutoModel

        self.crepa, self.device = crepa, torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model: Any = AutoModel.from_pretrained(
            str(encoder_folder(crepa.encoder)), dtype=self.dtype, local_files_only=True
        )
        if getattr(model.config, "patch_size", None) != PATCH_PIXELS:
            raise ValueError(f"{crepa.encoder} is no DINOv2 of patches of {PATCH_PIXELS} pixels")
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, frames_THW3: np.ndarray) -> torch.Tensor:
        """uint8 RGB [T, H, W, 3] → features [t, h, w, D], fp32 on CPU."""
        rows, columns = self.crepa.grid(*frames_THW3.shape[1:3])
        frames = torch.from_numpy(np.ascontiguousarray(frames_THW3[::VAE_TIME_COMPRESSION]))
        mean, std = (torch.tensor(each, device=self.device)[:, None, None] for each in (_MEAN, _STD))
        features = []
        for some in frames.split(_FRAMES_AT_ONCE):
            pixels = some.to(self.device).permute(0, 3, 1, 2).float() / 255
            size = (rows * PATCH_PIXELS, columns * PATCH_PIXELS)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
            hidden = self.model(pixel_values=((pixels - mean) / std).to(self.dtype)).last_hidden_state
            features.append(hidden[:, -rows * columns :].float().cpu().unflatten(1, (rows, columns)))
        out = torch.cat(features)
        if not torch.isfinite(out).all():
            raise ValueError("the vision encoder gave values that are not finite")
        return out
