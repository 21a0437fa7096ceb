"""Decoding validation latents into videos on a Ray worker, beside the training and never on its GPUs."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from k5dist import storage
from k5dist.console import say
from k5dist.plan import RunPlan


@ray.remote
class VideoDecoder:
    """Loads the VAE once; decodes one latent file after another."""

    def __init__(self, pretrained: str, task: str, frame_rate: float, device: str) -> None:
        import os

        import torch

        from k5dist.model.encoders import VideoAutoencoder

        if device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray allows one thread to a fraction of a CPU
        self.vae = VideoAutoencoder(pretrained, device)
        self.task, self.frame_rate = task, frame_rate

    def decode(self, place: str) -> bytes:
        """`<place>.safetensors` → `<place>.mp4` beside it; returns the video's bytes."""
        import safetensors.torch

        from k5dist.precache.video import encode_mp4

        latents = safetensors.torch.load(storage.read_bytes(f"{place}.safetensors"))["latents"]
        if self.task == "i2v":
            latents = _normalise_first_frames(latents)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            encode_mp4(self.vae.decode(latents), path, frame_rate=self.frame_rate)
            storage.publish_file(path, f"{place}.mp4")
            return path.read_bytes()


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
        self._places: collections.deque[tuple[int, str]] = collections.deque()
        self._running: collections.deque[tuple[int, str, Any]] = collections.deque()

    def submit(self, step: int, places: list[str]) -> None:
        self._places += [(step, place) for place in places]
        self._begin(gang_ended=False)

    def _begin(self, *, gang_ended: bool) -> None:
        if self._decoder is None:
            if self.on_gpu and not gang_ended and ray.available_resources().get("GPU", 0) < 1:
                return
            device = "cuda" if self.on_gpu else "cpu"
            options = {"num_gpus": 1, "num_cpus": 0} if self.on_gpu else {"num_gpus": 0, "num_cpus": 0.5}
            config = self.plan.config
            self._decoder = VideoDecoder.options(**options).remote(  # type: ignore[attr-defined]
                self.plan.pretrained, config.flavour.task, config.data.frame_rate, device
            )
        while self._places:
            step, place = self._places.popleft()
            self._running.append((step, place, self._decoder.decode.remote(place)))

    def finished(self, *, wait: bool = False) -> list[tuple[int, str, bytes]]:
        """(step, place, mp4 bytes) of what is done; with `wait` (the gang has ended), of everything submitted."""
        if wait and self._places:
            self._begin(gang_ended=True)
        done = []
        while self._running:
            step, place, reference = self._running[0]
            if not wait and not ray.wait([reference], timeout=0)[0]:
                break
            self._running.popleft()
            try:
                done.append((step, place, ray.get(reference)))
            except RayError as error:
                # A video is for looking at: without it the training goes on.
                say(f"warning: the video {place} could not be decoded: {str(error).splitlines()[-1]}")
        return done

    def close(self) -> None:
        if self._decoder is not None:
            ray.kill(self._decoder)
            self._decoder = None
