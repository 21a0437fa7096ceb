"""The frozen encoders, as the inference pipelines use them: in precache and decode workers, never beside the DiT.

Shape suffixes: T frames, t latent frames, H W pixels, h w latent sides, C 16 latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from k5dist.cache.layout import TextEncoding
from k5dist.model.pretrained import component_folder
from k5dist.model.vae import Encoder
from k5dist.model.vae_tiles import tiling_error


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the uint16 bit patterns of its bfloat16 values (numpy has no bfloat16)."""
    return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


class VideoAutoencoder:
    """The HunyuanVideo VAE: 8× in space, 4× in time after the first frame.

    Args:
        pretrained: a checkpoint folder, with the VAE in `vae/`.
        device: bf16 on CUDA, fp32 elsewhere.
        patch_conv: encode with convolutions in smaller chunks: the same latents in less memory (`k5dist.model.vae`).
        tiling: encode pictures in spatial tiles: other latents in far less memory (`k5dist.model.vae_tiles`).
        compile: compiled kernels between the encoder's convolutions; None: on CUDA.
    """

    def __init__(
        self, pretrained: str, device: str, *, patch_conv: bool = False, tiling: bool = False,
        compile: bool | None = None,
    ) -> None:  # fmt: skip
        from diffusers import AutoencoderKLHunyuanVideo

        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        folder = component_folder(pretrained, "vae")
        vae: Any = AutoencoderKLHunyuanVideo.from_pretrained(str(folder), torch_dtype=self.dtype, local_files_only=True)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        compile = on_gpu if compile is None else compile
        self.encoder = Encoder(self.vae, patch_conv=patch_conv, tiling=tiling, compile=compile)

    def encode(self, frames_THW3: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 RGB [T, H, W, 3] → posterior mean and log-variance [t, h, w, C], unscaled, fp32 on CPU."""
        mean, logvar = self.encode_batch(frames_THW3[None])
        return mean[0], logvar[0]

    @torch.no_grad()
    def encode_batch(self, frames_BTHW3: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips of one shape, [B, T, H, W, 3] → [B, t, h, w, C]; each as if it were alone, to the bit."""
        moments = torch.stack([self.encoder(torch.from_numpy(frames).to(self.device)) for frames in frames_BTHW3])
        mean, logvar = moments.float().cpu().chunk(2, dim=-1)
        if not (torch.isfinite(mean).all() and torch.isfinite(logvar).all()):
            raise ValueError("the VAE gave values that are not finite")
        return mean.contiguous(), logvar.clamp(-30.0, 20.0)  # the range diffusers' posterior allows

    @torch.no_grad()
    def tiling_error(self, frames_THW3: np.ndarray) -> float:
        """How far tiles are off on this clip, relative: over four tiles in the middle of its first 17 frames."""
        side = 2 * self.encoder.tile[1]
        frames = torch.from_numpy(frames_THW3[:17]).to(self.device)
        top, left = (max(0, size - side) // 2 // 16 * 16 for size in frames.shape[1:3])
        part = frames[:, top : top + side, left : left + side]
        return tiling_error(*(self.encoder.encode(part, tiling) for tiling in (False, True)))

    @torch.no_grad()
    def decode(self, latents_thwC: torch.Tensor) -> np.ndarray:
        """Scaled latents [t, h, w, C] → uint8 RGB [T, H, W, 3]."""
        latents = latents_thwC.to(self.device, self.dtype).permute(3, 0, 1, 2)[None]
        video = self.vae.decode(latents / self.vae.config.scaling_factor).sample[0]
        return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


class _TokenizerOnly:
    """The pipeline's processor reduced to its tokenizer: text needs no image processor, and no torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *, text: list[str], images: None, videos: None, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def decode(self, tokens: Any) -> str:
        return self.tokenizer.decode(tokens)


def text_encoding(template: str | None, start: int | None, max_tokens: int) -> TextEncoding:
    """The given template, or that of the installed diffusers release (releases differ in it)."""
    if template is not None and start is not None:
        return TextEncoding(template, start, max_tokens)
    pipeline = _text_pipeline()
    return TextEncoding(pipeline.prompt_template, pipeline.prompt_template_encode_start_idx, max_tokens)


def _text_pipeline() -> Any:
    """The inference pipeline with nothing in it: its prompt handling, to which encoders can be given."""
    from diffusers import Kandinsky5T2VPipeline

    components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    nothing: Any = dict.fromkeys(components)
    return Kandinsky5T2VPipeline(**nothing)


def without_head(qwen: Any) -> Any:
    """Without the layer that gives a logit to each of 152,064 words: features are the states before it."""
    qwen.lm_head = torch.nn.Identity()
    return qwen


def pass_through(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`model`, on the host, with every layer's weights on `device` while that layer computes, and no longer.

    Host memory stays pageable: a copy of a layer waits for nothing but itself, and page-locking 15 GiB is what small
    machines do not have. A batch costs one reading of all weights over the bus.
    """

    def enter(layer: Any, _: object) -> None:
        layer.on_host = dict(layer._parameters), dict(layer._buffers)
        for name, weight in layer.on_host[0].items():
            if weight is not None:
                layer._parameters[name] = torch.nn.Parameter(weight.to(device), requires_grad=False)
        for name, buffer in layer.on_host[1].items():
            layer._buffers[name] = None if buffer is None else buffer.to(device)

    def leave(layer: Any, *_: object) -> None:
        parameters, buffers = layer.on_host
        layer._parameters.update(parameters)
        layer._buffers.update(buffers)
        del layer.on_host

    for layer in model.modules():
        if any(True for _ in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))):
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)
    return model


class TextEncoders:
    """Qwen2.5-VL (token features) and CLIP (pooled), driven by the inference pipeline's own `encode_prompt`.

    With `offload` their weights stay on the host and pass through the device layer by layer: equal features.
    """

    def __init__(self, pretrained: str, encoding: TextEncoding, device: str, *, offload: bool = False) -> None:
        from transformers import AutoTokenizer, CLIPTextModel, Qwen2_5_VLForConditionalGeneration

        self.device = torch.device(device)
        self.encoding = encoding
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

        def load(cls: Any, component: str, **options: Any) -> Any:
            return cls.from_pretrained(str(component_folder(pretrained, component)), local_files_only=True, **options)

        self.pipeline = _text_pipeline()
        qwen = without_head(load(Qwen2_5_VLForConditionalGeneration, "text_encoder", dtype=dtype)).eval()
        clip = load(CLIPTextModel, "text_encoder_2", dtype=dtype).eval()
        place = pass_through if offload and self.device.type == "cuda" else torch.nn.Module.to
        self.pipeline.text_encoder, self.pipeline.text_encoder_2 = place(qwen, self.device), place(clip, self.device)
        self.pipeline.tokenizer = _TokenizerOnly(load(AutoTokenizer, "tokenizer", padding_side="right"))
        self.pipeline.tokenizer_2 = load(AutoTokenizer, "tokenizer_2")
        self.pipeline.prompt_template = encoding.template
        self.pipeline.prompt_template_encode_start_idx = encoding.start

    def encode(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(Qwen features [L, in_text_dim] at the caption's true length, CLIP pooled [in_text_dim2]) a caption, on CPU.

        Captions are padded on the right; Qwen is causal, so padding changes nothing for the real tokens, and it is cut
        off again. A caption that must be truncated goes alone: the pipeline cuts every text of a batch as soon as one
        is too long, the short ones by the length of their padding.
        """
        features: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(captions)
        too_long = [at for at, caption in enumerate(captions) if self._is_too_long(caption)]
        together = [at for at in range(len(captions)) if at not in too_long]
        for group in [together, *([at] for at in too_long)]:
            if group:
                for at, feature in zip(group, self._encode_batch([captions[at] for at in group]), strict=True):
                    features[at] = feature
        return features

    def _is_too_long(self, caption: str) -> bool:
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean

        tokens = self.pipeline.tokenizer.tokenizer(self.encoding.template.format(prompt_clean(caption)))["input_ids"]
        return len(tokens) > self.encoding.start + self.encoding.max_tokens

    @torch.no_grad()
    def _encode_batch(self, captions: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        qwen, clip, cu_seqlens = self.pipeline.encode_prompt(
            captions, max_sequence_length=self.encoding.max_tokens, device=self.device
        )
        lengths = cu_seqlens.diff().tolist()
        assert min(lengths) > 0, "every prompt has tokens"
        return [(qwen[i, :length].float().cpu(), clip[i].float().cpu()) for i, length in enumerate(lengths)]
