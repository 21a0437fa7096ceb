"""Validation on the training workers: held-out loss at fixed timesteps and noise, and videos denoised to latents.

Videos leave as latents: a VAE worker elsewhere decodes them, so that no VAE ever sits beside the DiT.
"""

from __future__ import annotations

import collections

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.keys import seed_of
from k5dist.config import ConfigError, RunConfig
from k5dist.estimate import Bucket
from k5dist.events import emit
from k5dist.model.forward import Text
from k5dist.model.sample import load_scheduler, sample
from k5dist.plan import RunPlan
from k5dist.train.checkpoint import step_folder
from k5dist.train.feed import Dataset, padded_share
from k5dist.train.objective import Objective


class Validator:
    """Runs on every rank together; what it finds is a function of the weights and the seed, not of the world size."""

    def __init__(
        self,
        config: RunConfig,
        pretrained: str,
        run_uri: str,
        dataset: Dataset,
        objective: Objective,
        *,
        rank: int,
        size: int,
    ) -> None:
        self.config, self.dataset, self.objective = config, dataset, objective
        self.run_uri, self.folder = run_uri, storage.join(run_uri, "validation")
        self.rank, self.size = rank, size  # among data-parallel groups
        self.context = config.parallel.context
        self.scheduler = load_scheduler(pretrained)

    @torch.no_grad()
    def run(self, transformer: nn.Module, step: int) -> None:
        """Held-out losses and a video for every prompt."""
        self.report_losses(transformer, step)
        transformer.eval()
        self.sample_videos(transformer, step)
        transformer.train()

    def report_losses(self, transformer: nn.Module, step: int) -> None:
        transformer.eval()
        losses = self.held_out_loss(transformer)
        transformer.train()
        if losses and dist.get_rank() == 0:
            emit("validation", step=step, losses=losses)

    def held_out_loss(self, transformer: nn.Module) -> dict[str, float]:
        """Mean loss over held-out clips: `loss`, `loss/sigma-k` for each timestep, `loss/<dataset>` for several."""
        rows, levels = self.dataset.held_out_rows, self.config.validation.timesteps
        items = [(row, level) for row in rows for level in range(levels)]
        if not items:
            return {}
        counts = collections.Counter(self.dataset.datasets[row] for row in rows)
        names = sorted(counts)
        totals = torch.zeros(len(names), levels, dtype=torch.float64, device=self.objective.device)
        for at, real in padded_share(items, self.rank, self.size):
            row, level = items[at]
            clip = self.dataset.read(row)
            text = clip.text.to(self.objective.device, self.objective.dtype)
            loss = self.objective.validation_loss(transformer, clip, text, level, levels)
            if real:
                totals[names.index(self.dataset.datasets[row]), level] += loss.double()
        dist.all_reduce(totals)
        totals /= self.context
        means = (totals.sum(0) / len(rows)).tolist()
        losses = {"loss": sum(means) / levels} | {f"loss/sigma-{k}": mean for k, mean in enumerate(means)}
        if len(names) > 1:
            of_dataset = zip(names, totals.sum(1).tolist(), strict=True)
            losses |= {f"loss/{name}": total / (counts[name] * levels) for name, total in of_dataset}
        return losses

    def sample_videos(self, transformer: nn.Module, step: int) -> None:
        """Denoise every prompt (spread over the workers) and leave its latents in the run's folder."""
        prompts = self.config.validation.prompts
        for at, real in padded_share(prompts, self.rank, self.size):
            latents = self.sample_prompt(transformer, at)
            if real and dist.get_rank() % self.context == 0:
                name = f"{step_folder(step)}/{at:02d}.safetensors"
                publish_tensors(storage.join(self.folder, name), {"latents": latents})
        if prompts:
            dist.barrier()
            if dist.get_rank() == 0:
                places = [storage.join(self.folder, f"{step_folder(step)}/{i:02d}") for i in range(len(prompts))]
                emit("videos", step=step, prompts=list(prompts), places=places)

    def sample_prompt(self, transformer: nn.Module, at: int) -> Tensor:
        """Scaled latents [T, H, W, C] of the prompt at a position, fp32."""
        validation = self.config.validation
        texts = self.dataset.texts
        shape = Bucket(*self.config.validation_shape).latent_shape
        return sample(
            transformer,
            self.config.model,
            self.scheduler,
            initial_noise(self.config, at, shape, self.objective.device),
            text=texts.get(validation.prompts[at]),
            negative=texts.get(validation.negative_prompt),
            guidance=validation.guidance,
            steps=validation.sampling_steps,
            first_frame_1HWC=self._first_frame(at, shape),
            dtype=self.objective.dtype,
        )

    def _first_frame(self, at: int, shape: tuple[int, int, int]) -> Tensor | None:
        """For image-to-video: the prompt's image, else a held-out clip's first frame in the videos' bucket."""
        if not self.objective.first_frame:
            return None
        if self.config.validation.images:
            return self._image(at, shape) * self.objective.scaling_factor
        rows = [*self.dataset.held_out_rows, *self.dataset.train_rows]
        fitting = [row for row in rows if Bucket(*self.dataset.buckets[row]).latent_shape[1:] == shape[1:]]
        if not fitting:
            rule = "no cached clip has these sides, to take a first frame from"
            fix = "set validation.images, or validation.resolution to sides that the clips have"
            raise ConfigError("validation.resolution", list(self.config.validation_shape[1:]), rule, fix)
        clip = self.dataset.read(fitting[at % len(fitting)])
        assert clip.first_mean_1HWC is not None
        return clip.first_mean_1HWC.float() * self.objective.scaling_factor

    def _image(self, at: int, shape: tuple[int, int, int]) -> Tensor:
        """Unscaled latents [1, h, w, C] that precache left of `validation.images[at]`."""
        place = layout.image_uri(self.run_uri, at)
        mean = read_tensors(place)["mean"] if storage.exists(place) else None
        if mean is None or tuple(mean.shape[1:3]) != shape[1:]:
            rule = "it is not encoded for the videos' sides"
            raise ConfigError(
                "validation.images", self.config.validation.images[at], rule, "run with the stage precache"
            )
        return mean.float()


def initial_noise(config: RunConfig, at: int, latent_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """The noise [T, H, W, C] that the video of prompt `at` starts from, the same at every validation."""
    seed = seed_of(config.train.seed, "validation video", at)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*latent_shape, config.model.in_visual_dim, generator=generator, device=device)


def publish_tensors(uri: str, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    storage.publish_bytes(uri, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def read_tensors(uri: str) -> dict[str, Tensor]:
    return safetensors.torch.load(storage.read_bytes(uri))


def probe_uri(plan: RunPlan) -> str:
    return storage.join(plan.run_uri, "probe.safetensors")


def write_probe(uri: str, transformer: nn.Module, validator: Validator) -> None:
    """A two-step sample of the trained model with all its inputs: what an export must reproduce.

    Small on purpose (17 frames at the smallest sides that every attention takes), so that it can be checked anywhere.
    """
    config, objective = validator.config, validator.objective
    shape = Bucket(17, 128, 128).latent_shape
    noise = initial_noise(config, -1, shape, objective.device)
    prompt = config.validation.prompts[0] if config.validation.prompts else ""
    text, negative = (validator.dataset.texts.get(t) for t in (prompt, config.validation.negative_prompt))
    first = initial_noise(config, -2, (1, *shape[1:]), objective.device) if objective.first_frame else None
    transformer.eval()
    latents = sample(
        transformer,
        config.model,
        validator.scheduler,
        noise,
        text=text,
        negative=negative,
        guidance=config.validation.guidance,
        steps=2,
        first_frame_1HWC=first,
        dtype=objective.dtype,
    )
    transformer.train()
    if dist.get_rank() == 0:
        tensors = _text_tensors("text", text) | _text_tensors("negative", negative)
        # With the guidance: validation's settings may change between the training and its export.
        tensors |= {"noise": noise, "latents": latents, "guidance": torch.tensor(config.validation.guidance)} | (
            {} if first is None else {"first_frame": first}
        )
        publish_tensors(uri, tensors)


def _text_tensors(name: str, text: Text) -> dict[str, Tensor]:
    return {f"{name}.qwen": text.qwen_1LD, f"{name}.clip": text.clip_1D}
