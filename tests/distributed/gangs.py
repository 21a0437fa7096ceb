"""Real gangs of the real worker on a cache of random latents: what the tests of training start and read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import k5dist
from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.places import Stores, note_places
from k5dist.cache.shards import Record
from k5dist.compose import compose, to_run_config
from k5dist.events import parse
from k5dist.model.encoders import to_bits
from k5dist.plan import ClusterFacts, RunPlan, make_plan
from k5dist.shapes import Bucket
from k5dist.train.worker import plan_encoding

IDENTITY = "generated:test"
SCALE = 0.476986
_SECONDS = 120


def make_run(
    root: Path, checkpoint: Path, name: str, *overrides: str, workers: int = 1, clips: int = 10, gpu: bool = False
) -> RunPlan:
    """A planned run on `clips` random clips: plan, cache and selection are written, nothing is started."""
    task = "i2v" if checkpoint.name == "i2v" else "t2v"
    settings = [f"+flavour={task}-tiny", f"name={name}", f"pretrained={checkpoint}", f"storage.root={root}"]
    settings += ["stages=[train]", "data.held_out=0", "train.steps=6", "train.batch_size=4", "optimizer.warmup_steps=2"]
    settings += ["checkpoint.every=100", "validation.prompts=[a red car]", f"cluster.workers_per_node={workers}"]
    plan = make_plan(to_run_config(compose([*settings, *overrides])), ClusterFacts(workers if gpu else 0), IDENTITY)
    storage.publish_bytes(plan.plan_uri, plan.to_json().encode())
    keys = [_key(plan, i) for i in range(clips)]
    if not layout.samples(plan.cache_uri).keys().issuperset(keys):
        _write_cache(plan)
    if plan.features_id and not layout.features(plan.cache_uri, plan.features_id).keys().issuperset(keys):
        _write_features(plan, keys)
    select(plan, layout.selection(keys, captions=[[f"clip {i}"] for i in range(clips)]))
    return plan


def select(plan: RunPlan, selected: pa.Table) -> None:
    """Make `selected` the run's samples, as precache ends by doing."""
    layout.write_selection(storage.join(plan.run_uri, layout.SELECTION), selected)
    stores = Stores.of(plan.cache_uri, plan_encoding(plan), plan.features_id)
    prompts = ["", plan.config.validation.negative_prompt, *plan.config.validation.prompts]
    note_places(plan.run_uri, selected, plan.config.data.held_out, stores, prompts)


def _key(plan: RunPlan, i: int) -> str:
    """Of a clip in the plan's first bucket. Runs of several buckets share a cache."""
    bucket = plan.buckets[0]
    return f"{bucket.frames:04x}{bucket.height:04x}{bucket.width:04x}{i:020x}"


def _write_cache(plan: RunPlan, clips: int = 10) -> None:
    """Latents of unit scale around a picture of each clip's own, that a model can learn; text of varied lengths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model, bucket = plan.config.model, plan.buckets[0]
    frames, height, width = bucket.latent_shape
    records = []
    for i in range(clips):
        picture = random(1, 1, 1, 16) + 0.3 * random(1, height, width, 16)
        mean = (picture + 0.1 * random(frames, height, width, 16)) / SCALE
        records.append(clip_record(_key(plan, i), bucket, mean, first_frame=plan.config.flavour.task == "i2v"))
    layout.samples(plan.cache_uri).write(records[:6])
    layout.samples(plan.cache_uri).write(records[6:])
    if storage.exists(storage.join(plan.cache_uri, "cache.json")):
        return  # its captions stay as they are
    texts = []
    captions = [f"clip {i}" for i in range(clips)]
    for i, caption in enumerate(["", plan.config.validation.negative_prompt, "a red car", *captions]):
        tensors = {"qwen": random(5 + i, model.in_text_dim), "clip": random(model.in_text_dim2)}
        texts.append(Record(layout.caption_key(caption), _bits(tensors), {"caption": caption, "text_length": 5 + i}))
    layout.captions(plan.cache_uri, plan_encoding(plan)).write(texts)
    layout.write_header(plan.cache_uri, plan.cache_fingerprint, IDENTITY)


def clip_record(
    key: str, bucket: Bucket, mean: torch.Tensor, *, first_frame: bool = False, mask: torch.Tensor | None = None
) -> Record:
    """A clip with this posterior mean [T, H, W, C] and mask [T, H, W, 1], as precache stores it."""
    tensors = {"mean": mean, "logvar": torch.full_like(mean, -4.0)} | ({} if mask is None else {"mask": mask})
    if first_frame:
        tensors |= {"first_mean": mean[:1] + 0.1, "first_logvar": torch.full_like(mean[:1], -4.0)}
    columns = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    columns |= {"frame_rate": 12.0, "crop": "center", "uri": f"{key}.mp4", "start": 0.0, "end": 1.4}
    return Record(key, _bits(tensors), columns | {"first_frame": first_frame})


def _write_features(plan: RunPlan, keys: list[str]) -> None:
    """Random features of CREPA's on the grid of the bucket."""
    bucket, crepa = plan.buckets[0], plan.config.crepa
    shape = (bucket.latent_shape[0], *crepa.grid(bucket.height, bucket.width), 12)
    generator = torch.Generator().manual_seed(1)
    features = {key: {"features": torch.randn(shape, generator=generator)} for key in keys}
    records = [Record(key, _bits(tensors), {"uri": f"{key}.mp4"}) for key, tensors in features.items()]
    layout.features(plan.cache_uri, plan.features_id).write(records)


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: to_bits(tensor) for name, tensor in tensors.items()}


@dataclass
class Result:
    """How a gang ended and what it said."""

    status: int
    log: str

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = (parse(line) for line in self.log.splitlines())
        return [event for event in found if event is not None and event["kind"] == kind]

    def metric(self, name: str) -> dict[int, float]:
        """A metric by step."""
        return {event["step"]: event["metrics"][name] for event in self.events("step")}

    @property
    def losses(self) -> dict[int, float]:
        return self.metric("loss")

    @property
    def norms(self) -> dict[int, float]:
        return self.metric("grad_norm")


class Gang:
    """torchrun with as many workers as the plan says."""

    def __init__(self, plan: RunPlan) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(plan.world.size), "-m", "k5dist.train.worker", plan.plan_uri]
        self._process = subprocess.Popen(
            command,
            # The code that is tested, and no spinning where workers share cores.
            cwd=Path(k5dist.__file__).parent.parent,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid
        self._lines: list[str] = []

    def lines(self) -> Iterator[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            yield line

    def result(self) -> Result:
        try:
            rest, _ = self._process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        return Result(self._process.returncode, "".join([*self._lines, rest]))


def train(*plans: RunPlan) -> list[Result]:
    """Gangs of all plans side by side, each to a good end."""
    results = [gang.result() for gang in [Gang(plan) for plan in plans]]
    for plan, result in zip(plans, results, strict=True):
        assert result.status == 0, f"{plan.name}:\n{result.log[-4000:]}"
        assert result.events("finished"), f"{plan.name}:\n{result.log[-4000:]}"
    return results


def assert_close(ours: dict[int, float], theirs: dict[int, float], rtol: float, steps: Sequence[int] = ()) -> None:
    """Equal metrics at the same steps (at `steps` where given)."""
    for step in steps or sorted(ours.keys() | theirs.keys()):
        difference = abs(ours[step] - theirs[step]) / abs(theirs[step])
        assert difference <= rtol, f"step {step}: {ours[step]} and {theirs[step]} differ by {difference:.1e}"
