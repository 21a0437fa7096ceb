"""Validation on the training workers: held-out loss at fixed timesteps and noise, and videos denoised to latents.

Videos leave as latents: a VAE worker elsewhere decodes them, so that no VAE ever sits beside the DiT.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.keys import key_of, seed_of
from k5dist.config import ConfigError, RunConfig
from k5dist.estimate import Bucket
from k5dist.events import emit
from k5dist.model.forward import Text
from k5dist.model.sample import load_scheduler, sample
from k5dist.model.transformer import adapters_off
from k5dist.model.weights import read_header
from k5dist.plan import RunPlan
from k5dist.train.checkpoint import step_folder
from k5dist.train.feed import Dataset, padded_share
from k5dist.train.objective import Objective

log = logging.getLogger(__name__)


class Averaged(Protocol):
    """Weights averaged over the training, which can stand in for the trained ones."""

    def applied(self, model: nn.Module) -> AbstractContextManager[object]: ...


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
        ema: Averaged | None = None,
    ) -> None:
        self.config, self.dataset, self.objective = config, dataset, objective
        self.run_uri, self.folder = run_uri, storage.join(run_uri, "validation")
        self.rank, self.size = rank, size  # among data-parallel groups
        self.context = config.parallel.context
        self.scheduler = load_scheduler(pretrained)
        self.ema = ema
        validation = config.validation
        self.items = [(at, seed) for at in range(len(validation.prompts)) for seed in validation.seeds]
        if validation.prompts and "validate" in config.stages:  # before the first step, not after it
            for at in range(len(validation.images) or 1):
                self._first_frame(at, Bucket(*config.validation_shape).latent_shape)
        if "ema" in validation.compare and ema is None:
            rule = "this run keeps no average of its weights"
            raise ConfigError("validation.compare", list(validation.compare), rule, "leave ema out of it")

    def report_losses(self, transformer: nn.Module, step: int) -> dict[str, float]:
        """Held-out losses, told to the driver; those of the averaged weights as `ema/…`. Alike on every rank."""
        with _evaluating(transformer):
            losses = self.held_out_loss(transformer)
            if losses and self.ema is not None and "ema" in self.config.validation.compare:
                with self.ema.applied(transformer):
                    losses |= {f"ema/{name}": loss for name, loss in self.held_out_loss(transformer).items()}
        if losses and dist.get_rank() == 0:
            emit("validation", step=step, losses=losses)
        return losses

    def held_out_loss(self, transformer: nn.Module) -> dict[str, float]:
        """Mean loss over held-out clips: `loss`, `loss/sigma-k` for each timestep; for several of them also
        `loss/<dataset>` and `loss/bucket/<frames>x<height>x<width>`."""
        rows, levels = self.dataset.held_out_rows, self.config.validation.timesteps
        of_row = {row: self.dataset.stratum(row) for row in rows}
        strata = {row: (of.dataset, "x".join(map(str, of.bucket))) for row, of in of_row.items()}
        # Clips of one bucket side by side: workers of one round have equal work.
        rows = sorted(rows, key=lambda row: (of_row[row].bucket, row))
        items = [(row, level) for row in rows for level in range(levels)]
        if not items:
            return {}
        counts = collections.Counter(strata.values())
        names = sorted(counts)
        totals = torch.zeros(len(names), levels, dtype=torch.float64, device=self.objective.device)
        for at, real in padded_share(items, self.rank, self.size):
            row, level = items[at]
            clip = self.dataset.read(row)
            text = clip.text.to(self.objective.device, self.objective.dtype)
            loss = self.objective.validation_loss(transformer, clip, text, level, levels)
            if real:
                totals[names.index(strata[row]), level] += loss.double()
        dist.all_reduce(totals)
        dist.broadcast(totals, 0)  # decisions hang on it: alike to the last bit
        totals /= self.context
        means = (totals.sum(0) / len(rows)).tolist()
        losses = {"loss": sum(means) / levels} | {f"loss/sigma-{k}": mean for k, mean in enumerate(means)}
        of_stratum = dict(zip(names, totals.sum(1).tolist(), strict=True))
        for part, prefix in enumerate(("loss/", "loss/bucket/")):
            parts = sorted({name[part] for name in names})
            for one in parts if len(parts) > 1 else ():
                inside = [name for name in names if name[part] == one]
                clips = sum(counts[name] for name in inside)
                losses[prefix + one] = sum(of_stratum[name] for name in inside) / (clips * levels)
        return losses

    def sample_videos(self, transformer: nn.Module, step: int) -> None:
        """Denoise every prompt with every seed and leave the latents in the run's folder, variants side by side."""
        compare, folder = self.config.validation.compare, step_folder(step)
        own = [f"{folder}/{i:02d}" for i in range(len(self.items))]
        shown = {"trained": own}
        with _evaluating(transformer):
            self._sample_all(transformer, own)
            if "ema" in compare and self.ema is not None:
                shown["ema"] = [f"{place}-ema" for place in own]
                with self.ema.applied(transformer):
                    self._sample_all(transformer, shown["ema"])
        if "base" in compare and self.sample_base(transformer, step):
            shown = {"base": self._base_places()} | shown
        if own:
            dist.barrier()
        if own and dist.get_rank() == 0:
            prompts = [self.config.validation.prompts[at] for at, _ in self.items]
            places = {name: [storage.join(self.folder, place) for place in of] for name, of in shown.items()}
            emit("videos", step=step, prompts=prompts, places=places)

    def sample_base(self, transformer: nn.Module, step: int) -> bool:
        """The untrained model's videos, once for all validations with equal settings; whether they are there.

        Without adapters to switch off they can be made only before the first step.
        """
        if "base" not in self.config.validation.compare or not self.items:
            return False
        places, lora = self._base_places(), self.config.adapter == "lora"
        missing = torch.zeros(len(places), device=self.objective.device)
        if dist.get_rank() == 0:
            known = [storage.exists(storage.join(self.folder, f"{place}.safetensors")) for place in places]
            missing += torch.tensor([not there for there in known], device=missing.device)
        dist.broadcast(missing, 0)
        wanted = [i for i, lacks in enumerate(missing.tolist()) if lacks]
        if wanted and not lora and step > 0:
            log.warning("no videos of the untrained model to compare with: all weights have been trained since")
            return False
        with _evaluating(transformer), adapters_off(transformer) if lora else contextlib.nullcontext():
            self._sample_all(transformer, places, wanted)
        return True

    def _base_places(self) -> list[str]:
        """Named after all that the untrained model's videos hang on."""
        validation = self.config.validation
        shared = [validation.negative_prompt, validation.guidance, validation.sampling_steps]
        shared += [self.config.validation_shape, self.config.train.precision]
        images = [layout.image_uri(self.run_uri, at) for at in range(len(validation.images))]
        pictures = [[read_header(uri)[1]["key"]] if storage.exists(uri) else [] for uri in images]
        pictures = pictures or [[]] * len(validation.prompts)
        facts = [[validation.prompts[at], at, seed, *shared, *pictures[at]] for at, seed in self.items]
        return [f"base/{key_of({'video': fact})[:12]}" for fact in facts]

    def _sample_all(self, transformer: nn.Module, places: Sequence[str], wanted: Sequence[int] | None = None) -> None:
        """Sample the items (at the positions `wanted`, or all), spread over the data-parallel groups.

        Every group runs as many forwards as any other, repeating its last video if need be: their weights' shards are
        gathered together.
        """
        wanted = range(len(places)) if wanted is None else wanted
        for at, real in padded_share(wanted, self.rank, self.size):
            prompt, seed = self.items[wanted[at]]
            latents = self.sample_prompt(transformer, prompt, seed)
            if real and dist.get_rank() % self.context == 0:
                publish_tensors(storage.join(self.folder, f"{places[wanted[at]]}.safetensors"), {"latents": latents})

    def sample_prompt(self, transformer: nn.Module, at: int, seed: int) -> Tensor:
        """Scaled latents [T, H, W, C] of the prompt at a position, fp32."""
        validation = self.config.validation
        texts = self.dataset.texts
        shape = Bucket(*self.config.validation_shape).latent_shape
        return sample(
            transformer,
            self.config.model,
            self.scheduler,
            initial_noise(self.config, at, shape, self.objective.device, seed),
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
        strata = sorted(self.dataset.strata, key=lambda stratum: not stratum.held_out)
        fitting = [stratum for stratum in strata if Bucket(*stratum.bucket).latent_shape[1:] == shape[1:]]
        if not fitting:
            rule = "no cached clip has these sides, to take a first frame from"
            fix = "set validation.images, or validation.resolution to sides that the clips have"
            raise ConfigError("validation.resolution", list(self.config.validation_shape[1:]), rule, fix)
        at %= sum(stratum.count for stratum in fitting)
        while at >= fitting[0].count:
            at -= fitting.pop(0).count
        clip = self.dataset.read(fitting[0].rows[at])
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


@contextlib.contextmanager
def _evaluating(transformer: nn.Module) -> Iterator[None]:
    """Without gradient and without an adapter's dropout."""
    training = transformer.training
    transformer.eval()
    with torch.no_grad():
        yield
    transformer.train(training)


def initial_noise(
    config: RunConfig, at: int, latent_shape: tuple[int, int, int], device: torch.device, seed: int = 0
) -> Tensor:
    """The noise [T, H, W, C] that the video of prompt `at` starts from, equal at every validation and in all runs."""
    generator = torch.Generator(device).manual_seed(seed_of(seed, "validation video", at))
    return torch.randn(*latent_shape, config.model.in_visual_dim, generator=generator, device=device)


def publish_tensors(uri: str, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    storage.publish_bytes(uri, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def read_tensors(uri: str) -> dict[str, Tensor]:
    return safetensors.torch.load(storage.read_bytes(uri))


def probe_uri(plan: RunPlan) -> str:
    return storage.join(plan.run_uri, "probe.safetensors")


def best_probe_uri(plan: RunPlan) -> str:
    """Of the checkpoint with the least held-out loss."""
    return storage.join(plan.run_uri, "probe-best.safetensors")


def probed_step(plan: RunPlan) -> int | None:
    """The step whose model the probe shows; None where a training has left none yet."""
    uri = probe_uri(plan)
    return int(read_tensors(uri)["step"]) if storage.exists(uri) else None


def write_probe(
    uri: str,
    transformer: nn.Module,
    validator: Validator,
    step: int,
    evaluated: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """A two-step sample of the trained model with all its inputs: what an export must reproduce.

    With the weights of `evaluated`; where those are an average (EMA), with the raw ones as well, as `latents.raw`.
    Small on purpose (17 frames at the smallest sides that every attention takes), so that it can be checked anywhere.
    """
    config, objective = validator.config, validator.objective
    shape = Bucket(17, 128, 128).latent_shape
    noise = initial_noise(config, -1, shape, objective.device)
    prompt = config.validation.prompts[0] if config.validation.prompts else ""
    text, negative = (validator.dataset.texts.get(t) for t in (prompt, config.validation.negative_prompt))
    first = initial_noise(config, -2, (1, *shape[1:]), objective.device) if objective.first_frame else None

    def sampled() -> Tensor:
        return sample(
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

    transformer.eval()
    raw = {"latents.raw": sampled()} if config.ema.enabled else {}
    with evaluated():
        latents = sampled()
    transformer.train()
    if dist.get_rank() == 0:
        tensors = _text_tensors("text", text) | _text_tensors("negative", negative)
        # With the guidance: validation's settings may change between the training and its export.
        tensors |= {"noise": noise, "latents": latents, "guidance": torch.tensor(config.validation.guidance)} | raw
        tensors |= {"step": torch.tensor(step)} | ({} if first is None else {"first_frame": first})
        publish_tensors(uri, tensors)


def _text_tensors(name: str, text: Text) -> dict[str, Tensor]:
    return {f"{name}.qwen": text.qwen_1LD, f"{name}.clip": text.clip_1D}
