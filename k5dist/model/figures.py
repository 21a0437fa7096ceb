"""Figures of a sampled video: how much it moves, how much it flickers, how well it agrees with its prompt.

Shape suffixes: T frames, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from k5dist import storage
from k5dist.model.pretrained import is_hub_id

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709
BLOCK = 8  # pixels a side
SCORED_FRAMES = 8


def motion_and_flicker(frames_THW3: np.ndarray) -> dict[str, float]:
    """Of uint8 RGB [T, H, W, 3], in grey levels (0…255); nothing of fewer frames than they need.

    `motion` is the mean absolute difference of neighbouring frames' luma: mean |Y(t+1) − Y(t)|.

    `flicker` is what alternates from frame to frame: mean |Y(t−1) − 2 Y(t) + Y(t+1)| / 4 of the luma's means over 8×8
    pixels. A picture that alternates by ±a gives a; a still one, a steady fade and anything else linear in time gives
    0. Means of blocks keep fine texture that moves along out of it; coarse and fast motion still counts.
    """
    luma = np.stack([frame @ LUMA for frame in frames_THW3.astype(np.float32)])
    found: dict[str, float] = {}
    if len(luma) > 1:
        found["motion"] = float(np.abs(np.diff(luma, axis=0)).mean(dtype=np.float64))
    if len(luma) > 2:
        height, width = (side // BLOCK * BLOCK for side in luma.shape[1:])
        blocks = luma[:, :height, :width].reshape(len(luma), height // BLOCK, BLOCK, width // BLOCK, BLOCK)
        means = blocks.mean(axis=(2, 4))
        found["flicker"] = float(np.abs(np.diff(means, 2, axis=0)).mean(dtype=np.float64) / 4)
    return found


class TextAgreement:
    """CLIPScore (Hessel et al., 2021) of a video: 100 max(cos, 0) of a frame and the prompt, mean over frames.

    Args:
        clip_model: a CLIP checkpoint with both towers: hub id, folder or URI.
        device: fp32 on it.
    """

    def __init__(self, clip_model: str, device: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        place = clip_model
        if not is_hub_id(clip_model):
            uri = storage.normalise(clip_model)
            place = str(storage.fetch_folder(uri, Path.home() / ".cache" / "k5dist" / "clip" / uri.rsplit("/", 1)[-1]))
        model: Any = CLIPModel.from_pretrained(place)
        self.model = model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.device = device

    def score(self, frames_THW3: np.ndarray, prompt: str) -> float:
        """Of uint8 RGB [T, H, W, 3]: over `SCORED_FRAMES` frames spread evenly."""
        import torch

        at = np.linspace(0, len(frames_THW3) - 1, min(SCORED_FRAMES, len(frames_THW3))).round().astype(int)
        pixels = clip_pixels(frames_THW3[at], self.model.config.vision_config.image_size)
        tokens = self.tokenizer([prompt], return_tensors="pt", truncation=True)
        with torch.no_grad():
            out = self.model(pixel_values=pixels.to(self.device), **tokens.to(self.device))
        image, text = out.image_embeds.float(), out.text_embeds.float()
        cosine = torch.nn.functional.cosine_similarity(image, text)
        return float(100 * cosine.clamp(min=0).mean())


def clip_pixels(frames_THW3: np.ndarray, size: int) -> Any:
    """[T, 3, size, size] as CLIP's own preprocessing has them: the shorter side to `size` (bicubic, antialiased), its
    middle, OpenAI's mean and deviation."""
    import torch
    from torch.nn.functional import interpolate
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = torch.from_numpy(np.ascontiguousarray(frames_THW3)).permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[2:]
    short = min(height, width)
    resized = (int(size * height / short), int(size * width / short))
    pixels = interpolate(pixels, resized, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels[:, :, top : top + size, left : left + size] - mean) / deviation
