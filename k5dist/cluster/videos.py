"""Decoding validation latents into videos on a Ray worker, beside the training and never on its GPUs."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from k5dist import storage
from k5dist.console import say
from k5dist.plan import RunPlan


@dataclass(frozen=True)
class Item:
    """One prompt's videos of one validation: places by variant (base, trained, ema), from left to right."""

    step: int
    prompt: str
    places: dict[str, str]


@dataclass(frozen=True)
class Decoded:
    """The videos of an item by name, MP4, and the figures of each variant."""

    item: Item
    videos: dict[str, bytes]
    figures: dict[str, dict[str, float]]


@ray.remote
class VideoDecoder:
    """Loads the VAE (and CLIP, if asked for) once; decodes one item after another."""

    def __init__(self, pretrained: str, task: str, frame_rate: float, device: str, clip_model: str | None) -> None:
        import os

        import torch

        from k5dist.model.encoders import VideoAutoencoder
        from k5dist.model.figures import TextAgreement

        if device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray allows one thread to a fraction of a CPU
        self.vae = VideoAutoencoder(pretrained, device)
        self.agreement = None if clip_model is None else TextAgreement(clip_model, device)
        self.task, self.frame_rate = task, frame_rate

    def decode(self, item: Item) -> Decoded:
        """`<place>.safetensors` → `<place>.mp4` beside it; of several variants also one with all of them side by side,
        `<place of the trained>-side.mp4`."""
        import numpy as np

        from k5dist.model.figures import motion_and_flicker

        videos: dict[str, bytes] = {}
        figures: dict[str, dict[str, float]] = {}
        panels = {variant: self._frames(place) for variant, place in item.places.items()}
        for variant, frames in panels.items():
            figures[variant] = motion_and_flicker(frames)
            if self.agreement is not None:
                figures[variant]["clip_score"] = self.agreement.score(frames, item.prompt)
            place = item.places[variant]
            if variant != "base" or not storage.exists(f"{place}.mp4"):
                videos[_name(place)] = self._publish(frames, place)
        if len(panels) > 1:
            side = f"{item.places['trained']}-side"
            videos[_name(side)] = self._publish(np.concatenate(list(panels.values()), axis=2), side)
        return Decoded(item, videos, figures)

    def _frames(self, place: str) -> Any:
        import safetensors.torch

        latents = safetensors.torch.load(storage.read_bytes(f"{place}.safetensors"))["latents"]
        return self.vae.decode(_normalise_first_frames(latents) if self.task == "i2v" else latents)

    def _publish(self, frames: Any, place: str) -> bytes:
        from k5dist.precache.review import encode_mp4

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            encode_mp4(frames, path, frame_rate=self.frame_rate)
            storage.publish_file(path, f"{place}.mp4")
            return path.read_bytes()


def _name(place: str) -> str:
    folder, name = place.rsplit("/", 2)[-2:]
    return f"base-{name}" if folder == "base" else name


def _normalise_first_frames(latents_THWC: Any) -> Any:
    """The image-to-video pipeline's own last step: the first frames take the statistics of those after them."""
    from diffusers import Kandinsky5I2VPipeline

    names = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    nothing: Any = dict.fromkeys(names)
    return Kandinsky5I2VPipeline(**nothing).normalize_first_frame(latents_THWC[None])[0]


class VideoQueue:
    """The driver's end: places go in, finished videos come out, in order, whenever they are ready.

    On GPUs a video waits for one that nobody trains on: a spare one, or those of the gang once it has ended.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.on_gpu = plan.world.device == "cuda"
        self._decoder: Any = None
        self._waiting: collections.deque[Item] = collections.deque()
        self._running: collections.deque[tuple[Item, Any]] = collections.deque()

    def submit(self, items: list[Item]) -> None:
        self._waiting += items
        self._begin(gang_ended=False)

    def has(self, step: int) -> bool:
        """Whether videos of this step are still to come."""
        return any(item.step == step for item in (*self._waiting, *(item for item, _ in self._running)))

    def _begin(self, *, gang_ended: bool) -> None:
        if self._decoder is None:
            if self.on_gpu and not gang_ended and ray.available_resources().get("GPU", 0) < 1:
                return
            device = "cuda" if self.on_gpu else "cpu"
            options = {"num_gpus": 1, "num_cpus": 0} if self.on_gpu else {"num_gpus": 0, "num_cpus": 0.5}
            config = self.plan.config
            self._decoder = VideoDecoder.options(**options).remote(  # type: ignore[attr-defined]
                self.plan.pretrained, config.flavour.task, config.data.frame_rate, device, config.validation.clip_model
            )
        while self._waiting:
            item = self._waiting.popleft()
            self._running.append((item, self._decoder.decode.remote(item)))

    def finished(self, *, wait: bool = False) -> Iterator[Decoded]:
        """What is done; with `wait` (the gang has ended), everything submitted."""
        if wait and self._waiting:
            self._begin(gang_ended=True)
        while self._running:
            item, reference = self._running[0]
            if not wait and not ray.wait([reference], timeout=0)[0]:
                break
            self._running.popleft()
            try:
                decoded: Any = ray.get(reference)
                yield decoded
            except RayError as error:
                # A video is for looking at: without it the training goes on.
                place = item.places["trained"]
                say(f"warning: the video {place} could not be decoded: {str(error).splitlines()[-1]}")

    def close(self) -> None:
        if self._decoder is not None:
            ray.kill(self._decoder)
            self._decoder = None
