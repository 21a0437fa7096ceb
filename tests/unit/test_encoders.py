"""The frozen encoders give what the inference pipelines' give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    Kandinsky5T2VPipeline,
)

from k5dist.model.encoders import TextEncoders, VideoAutoencoder, pass_through, text_encoding
from tests.unit.models import random, random_frames, relative

CAPTIONS = ["a red car", "", "A dog's 2 tails\nwag.", "—日本 🙂", "Cyclists ride through a city street, in the rain"]


# Frozen encoders


def text_encoders(folder: Path, max_tokens: int = 256) -> TextEncoders:
    return TextEncoders(str(folder), text_encoding(None, None, max_tokens), "cpu")


def check_texts(folder: Path, captions: list[str], max_tokens: int = 256) -> list[int]:
    """All captions encoded together equal the stock pipeline's, one at a time; returns the token counts."""
    pipeline: Any = Kandinsky5T2VPipeline.from_pretrained(folder, local_files_only=True)
    encoded = text_encoders(folder, max_tokens).encode(captions)
    for caption, (qwen, clip) in zip(captions, encoded, strict=True):
        with torch.no_grad():
            expected, pooled, lengths = pipeline.encode_prompt(caption, max_sequence_length=max_tokens)
        assert len(qwen) == lengths[-1] == expected.shape[1], caption
        torch.testing.assert_close(qwen, expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(clip, pooled[0], rtol=0, atol=1e-5)
    return [len(qwen) for qwen, _ in encoded]


def test_texts_encoded_together_equal_the_pipelines_one_by_one(tiny_t2v: Path) -> None:
    lengths = check_texts(tiny_t2v, CAPTIONS)
    assert lengths[1] == min(lengths), "the empty caption is the shortest"
    assert len(set(lengths)) > 2


def test_weights_pass_through_the_device_layer_by_layer() -> None:
    """On a machine without a GPU the device is one on which nothing can be computed: a layer is there, no other is."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Sequential(torch.nn.Linear(3, 2)))
    pass_through(model, torch.device("meta"))
    inner = model[1][0]  # type: ignore[index]
    seen: list[tuple[str, str]] = []

    def look(layer: torch.nn.Module, _: object) -> None:
        seen.append((layer.weight.device.type, inner.weight.device.type))  # type: ignore[union-attr]

    model[0].register_forward_pre_hook(look)
    inner.register_forward_pre_hook(look)
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        assert model(torch.zeros(4, dtype=torch.long, device="meta")).shape == (4, 2)
    assert seen == [("meta", "cpu"), ("meta", "meta")]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, kept[name]), name


def test_a_long_caption_is_cut(tiny_t2v: Path) -> None:
    assert check_texts(tiny_t2v, ["word " * 60], max_tokens=32) == [32]


def test_a_long_caption_cuts_no_other(tiny_t2v: Path) -> None:
    lengths = check_texts(tiny_t2v, ["a red car drives along the coast", "word " * 60], max_tokens=48)
    assert lengths[0] < lengths[1] == 48


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (17, 5), (61, 16)])
def test_video_latents_equal_the_vaes(tiny_t2v: Path, frames: int, latent_frames: int) -> None:
    video = random_frames(frames)
    vae: Any = AutoencoderKLHunyuanVideo.from_pretrained(tiny_t2v / "vae")
    with torch.no_grad():
        pixels = torch.from_numpy(video).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
    mean, logvar = VideoAutoencoder(str(tiny_t2v), "cpu").encode(video)
    assert mean.shape == logvar.shape == (latent_frames, 8, 12, 16)
    torch.testing.assert_close(mean, posterior.mean[0].permute(1, 2, 3, 0), rtol=0, atol=3e-5)
    torch.testing.assert_close(logvar, posterior.logvar[0].permute(1, 2, 3, 0), rtol=0, atol=3e-5)


def test_the_last_frame_reaches_the_last_latent(tiny_t2v: Path) -> None:
    autoencoder = VideoAutoencoder(str(tiny_t2v), "cpu")
    video = random_frames(61)
    before, _ = autoencoder.encode(video)
    video[-1] = 255 - video[-1]
    after, _ = autoencoder.encode(video)
    assert relative(after[-1], before[-1]) > 0.01


def test_latents_decode_to_frames(tiny_t2v: Path) -> None:
    frames = VideoAutoencoder(str(tiny_t2v), "cpu").decode(random(5, 8, 12, 16))
    assert frames.shape == (17, 64, 96, 3)
    assert frames.dtype == np.uint8
    assert frames.std() > 5
