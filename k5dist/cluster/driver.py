"""The driver: takes a plan through its stages on a Ray cluster, and tells the user and the tracking server about it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from k5dist import storage
from k5dist.cluster.ahead import Ahead
from k5dist.cluster.gang import Gang, check_room
from k5dist.cluster.generated import ensure_generated
from k5dist.cluster.interrupts import Interrupts
from k5dist.cluster.record import Recorder
from k5dist.cluster.session import ray_session
from k5dist.cluster.videos import Item, VideoQueue
from k5dist.config import ConfigError
from k5dist.console import Bar, progress_bar, say, show_table
from k5dist.events import parse
from k5dist.plan import RunPlan
from k5dist.precache.pipeline import precache
from k5dist.precache.sources import Listing
from k5dist.precache.upkeep import CacheDamaged, explain, prune_cache, verify_cache
from k5dist.tracking.parent import join_parent
from k5dist.tracking.run import TrackedRun
from k5dist.train.checkpoint import committed_steps
from k5dist.train.history import is_complete
from k5dist.train.validate import probed_step

_KEPT_LINES = 200
_ON_RAY = {"precache", "train", "validate", "export"}


class TrainingFailed(Exception):
    """The gang ended without finishing; the message holds the worker's own traceback or its last lines."""


def tracked_run(plan: RunPlan, artifact_root: str) -> TrackedRun:
    """The MLflow run of this plan: the one that an earlier attempt began, or a new one."""
    uri = storage.join(plan.run_uri, "tracking.json")
    run_id = json.loads(storage.read_text(uri))["run_id"] if storage.exists(uri) else None
    tags = {"flavour": plan.config.flavour.name, "run_fingerprint": plan.run_fingerprint}
    tags |= {"cache_fingerprint": plan.cache_fingerprint, "run_uri": plan.run_uri}
    tracking = plan.config.tracking
    if tracking.parent is not None:
        tags["mlflow.parentRunId"] = join_parent(
            uri=plan.tracking_uri,
            experiment=tracking.experiment,
            artifact_root=artifact_root,
            parent=tracking.parent,
        )
    return TrackedRun(
        uri=plan.tracking_uri,
        experiment=tracking.experiment,
        run_name=plan.name,
        artifact_root=artifact_root,
        run_id=run_id,
        tags=tags,
    )


def run_stages(
    plan: RunPlan, tracked: TrackedRun, source: Listing, record: Recorder, following: RunPlan | None = None
) -> list[tuple[str, str]]:
    """Everything after planning; returns the rows of the closing summary. Beside the training the precache of
    `following` may begin."""
    ensure_generated(plan)
    stages = plan.config.stages
    summary: list[tuple[str, str]] = []
    damaged = _verify(plan, tracked, summary) if "verify" in stages else False
    heavy = damaged or bool(set(stages) & _ON_RAY)
    with ray_session(plan.config.cluster) if heavy else contextlib.nullcontext():
        if plan.config.cluster.kind == "ray" and heavy:
            record.stage("wait for nodes")
            check_room(plan)
        if "precache" in stages or damaged:
            record.stage("precache")
            done = precache(plan, source)
            show_table("Precache", done.rows())
            tracked.log_metrics(done.metrics(), step=0)
            tracked.log_text(json.dumps(done.table(), indent=2), "precache.json")
            summary.append(("cache", plan.cache_uri))
            if done.failures:
                summary.append(("failed clips", f"{len(done.failures)}, see failures.parquet in the cache"))
        if "train" in stages or "validate" in stages:
            with TrainingStage(plan, tracked, record, Ahead(following, plan)) as training:
                training.run()
                summary += training.summary()
        if "export" in stages:
            record.stage("export")
            summary += _export(plan, tracked)
    if "prune" in stages:
        summary.append(("pruned", f"{prune_cache(plan)} samples"))
    return summary


def _verify(plan: RunPlan, tracked: TrackedRun, summary: list[tuple[str, str]]) -> bool:
    """Whether there was damage, which is out of the index by then; raises CacheDamaged where it shall stay."""
    repair = plan.config.precache.repair
    bad = verify_cache(plan, repair=repair)
    tracked.log_text(json.dumps([asdict(record) for record in bad], indent=2), "verify.json")
    tracked.log_metrics({"verify/bad": float(len(bad))}, step=0)
    if not bad:
        summary.append(("verify", "every record is what was written"))
        return False
    found = f"{len(bad)} records of the cache are damaged:\n{explain(bad)}"
    if not repair:
        raise CacheDamaged(f"{found}\nthe same command with precache.repair=true encodes them again")
    say(f"{found}\nthey are removed, and what this run uses of them is encoded again")
    summary.append(("verify", f"{len(bad)} damaged records, removed; those that this run uses encoded again"))
    return True


class TrainingStage:
    """Runs the gang to its end, over crashes, and turns the workers' events into metrics, videos and progress."""

    def __init__(self, plan: RunPlan, tracked: TrackedRun, record: Recorder, ahead: Ahead) -> None:
        self.plan, self.tracked, self.record, self.ahead = plan, tracked, record, ahead
        self.videos = VideoQueue(plan)
        self.last_step = 0
        self.losses: dict[int, float] = {}
        self.validation: dict[int, float] = {}
        self.best_step: int | None = None
        self.num_videos = 0
        self.figures: dict[int, list[dict[str, dict[str, float]]]] = {}  # by step, of items whose step is not through
        self.failure: dict[str, Any] | None = None
        self.ended_at: int | None = None
        self.tail: list[str] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="k5dist-driver-")
        self._log = (Path(self._scratch.name) / "train.log").open("w")

    def __enter__(self) -> TrainingStage:
        return self

    def __exit__(self, *_: object) -> None:
        self.videos.close()
        self._log.close()
        self.tracked.log_artifact(Path(self._log.name), "logs")
        self._scratch.cleanup()

    def run(self) -> None:
        """Raises TrainingFailed, or KeyboardInterrupt once the workers have saved and ended."""
        if "train" in self.plan.config.stages and self._complete():
            say(f"training: step {probed_step(self.plan)} is reached, nothing to train")
            return
        steps = self.plan.config.train.steps
        self.record.stage("train" if "train" in self.plan.config.stages else "validate")
        restarts = 0
        with progress_bar("train", steps) as bar:
            while True:
                step_before = self.last_step
                crash = self._attempt(bar)
                if crash is None:
                    break
                if self.last_step > step_before:
                    restarts = 0  # it got somewhere: count crashes in a row
                if restarts >= self.plan.config.cluster.max_restarts or not self._worth_a_restart():
                    raise TrainingFailed(self._explanation(crash))
                restarts += 1
                say(f"the gang stopped ({crash}); restart {restarts} from the newest checkpoint")
        self._log_videos(wait=True)
        if self.ended_at is None:
            raise TrainingFailed(self._explanation("the workers ended without a word"))

    def _complete(self) -> bool:
        """Whether an earlier launch of the same command has left everything that training leaves."""
        if self.plan.config.resume != "auto":
            return False
        steps = committed_steps(self.plan.checkpoints_uri, self.plan.run_fingerprint)
        return is_complete(self.plan, probed_step(self.plan), steps[-1] if steps else None)

    def _attempt(self, bar: Bar) -> str | None:
        """One gang; None when it ended well, else what happened."""
        self.failure, self.ended_at = None, None
        with Gang(self.plan) as gang, self.record.watching(gang.loads), self.ahead.beside_gang():
            try:
                gang.start()
                return self._follow(gang.output(), bar)
            except KeyboardInterrupt:
                say("stopping: the workers finish their step and save a checkpoint (Ctrl-C again to drop it)")
                self.ahead.stop()
                gang.ask_to_stop()
                if gang.started:
                    self._follow(gang.output(), bar)
                raise
            except RayActorError as error:
                return f"a node was lost: {str(error).splitlines()[0]}"

    def _follow(self, lines: Any, bar: Bar) -> str | None:
        with Interrupts() as interrupts:
            for piece in lines:
                interrupts.check()
                if isinstance(piece, int):
                    return None if piece == 0 else f"exit status {piece}"
                if piece is not None:
                    self._on_line(piece, bar)
                self._log_videos(wait=False)
                self.ahead.tell()
        return "the output ended without an exit status"

    def _on_line(self, line: str, bar: Bar) -> None:
        event = parse(line)
        self._log.write(line + "\n")
        self.record.rank_line(line, event)
        if event is not None:
            self._on_event(event, bar)
        elif line.strip():
            self.tail = [*self.tail[-_KEPT_LINES:], line]

    def _on_event(self, event: dict[str, Any], bar: Bar) -> None:
        kind = event["kind"]
        if kind == "step":
            self.last_step = event["step"]
            self.losses[event["step"]] = event["metrics"]["loss"]
            self.tracked.log_metrics(event["metrics"], event["step"])
            bar.to(event["step"], f"loss {event['metrics']['loss']:.4f}  {event['metrics']['step_seconds']:.2f} s/step")
        elif kind == "validation":
            self._log_validation(event["step"], event["losses"])
        elif kind == "patience":
            say(f"no lower held-out loss than at step {event['best']}: the training stops at step {event['step']}")
        elif kind == "videos":
            places = event["places"]
            of_item = [dict(zip(places, item, strict=True)) for item in zip(*places.values(), strict=True)]
            items = zip(event["prompts"], of_item, strict=True)
            self.videos.submit([Item(event["step"], prompt, variants) for prompt, variants in items])
        elif kind == "resumed":
            say(f"resumed from the checkpoint of step {event['step']}")
            self._fill_history(event["history"])
            self._fill_validations({int(step): losses for step, losses in event["validations"].items()})
            self.last_step = event["step"]
            bar.to(event["step"])
        elif kind == "node":
            say(f"node {event['node']}: {event['network']}")
        elif kind == "failed":
            self.failure = self.failure or event
        elif kind == "config_error":
            raise ConfigError(event["key"], event["value"], event["rule"], event["fix"])
        elif kind == "finished":
            self.ended_at = event["step"]

    def _fill_history(self, history: list[dict[str, Any]]) -> None:
        """Send the metrics that a killed driver had received but not yet sent."""
        self.tracked.flush()
        known = self.tracked.logged_steps("loss")
        for row in history:
            if row["step"] not in known:
                self.tracked.log_metrics(row["metrics"], row["step"])

    def _log_validation(self, step: int, losses: dict[str, float]) -> None:
        """The losses, and the step with the least of them so far as the run's tag `best_step`."""
        self.validation[step] = losses["loss"]
        self.tracked.log_metrics({f"validation/{name}": value for name, value in losses.items()}, step)
        steps = [known for known in self.validation if known]
        if steps:
            best = min(steps, key=lambda known: (self.validation[known], known))
            self.tracked.log_metrics({"validation/best_loss": self.validation[best]}, step)
            if best != self.best_step:
                self.best_step = best
                self.tracked.set_tags({"best_step": str(best), "best_loss": f"{self.validation[best]:.6g}"})

    def _fill_validations(self, validations: dict[int, dict[str, float]]) -> None:
        """Those of before; the store may lack what a killed driver had received but not yet sent."""
        self.validation = {step: loss for step, loss in self.validation.items() if step in validations or not step}
        known = self.tracked.logged_steps("validation/loss")
        for step, losses in sorted(validations.items()):
            self.validation[step] = losses["loss"]
            if step not in known:
                self._log_validation(step, losses)

    def _log_videos(self, *, wait: bool) -> None:
        for decoded in self.videos.finished(wait=wait):
            step = decoded.item.step
            for name, data in decoded.videos.items():
                path = Path(self._scratch.name) / f"{name}.mp4"
                path.write_bytes(data)
                self.tracked.log_video(path, step=step, name=name)
                self.num_videos += 1
            self.figures.setdefault(step, []).append(decoded.figures)
            if not self.videos.has(step):
                self.tracked.log_metrics(_mean_figures(self.figures.pop(step)), step)

    def _worth_a_restart(self) -> bool:
        """A worker that was killed, or lost its peers, may do better next time; one that raised will raise again."""
        return self.failure is None or self.failure["communication"]

    def _explanation(self, crash: str) -> str:
        if self.failure is not None:
            return f"rank {self.failure['rank']}: {self.failure['error']}\n{self.failure['traceback']}"
        return "\n".join([crash, *self.tail[-40:]])

    def summary(self) -> list[tuple[str, str]]:
        rows = [("run", self.plan.run_uri)]
        if self.losses:
            first, last = min(self.losses), max(self.losses)
            rows.append(
                ("training loss", f"{self.losses[first]:.4f} (step {first}) → {self.losses[last]:.4f} (step {last})")
            )
        if self.validation:
            shown = ", ".join(f"{loss:.4f} (step {step})" for step, loss in sorted(self.validation.items()))
            rows.append(("validation loss", shown))
        if self.num_videos:
            rows.append(("videos", f"{self.num_videos} in {storage.join(self.plan.run_uri, 'validation')}"))
        return rows


def _mean_figures(items: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Means over a validation's videos: `validation/motion`, of other variants `validation/base/motion`."""
    found: dict[str, list[float]] = {}
    for item in items:
        for variant, figures in item.items():
            prefix = "validation/" if variant == "trained" else f"validation/{variant}/"
            for name, value in figures.items():
                found.setdefault(prefix + name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _export(plan: RunPlan, tracked: TrackedRun) -> list[tuple[str, str]]:
    from k5dist.export import LORA_FILE, export_run

    gpus = 1 if plan.world.device == "cuda" else 0
    report = ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(export_run).remote(plan))
    tracked.log_text(json.dumps(asdict(report), indent=2), "export.json")
    if plan.config.adapter == "lora":
        with tempfile.TemporaryDirectory(prefix="k5dist-driver-") as folder:
            local = Path(folder) / LORA_FILE
            local.write_bytes(storage.read_bytes(storage.join(report.uri, LORA_FILE)))
            tracked.log_artifact(local, "export")
    metrics = {"export/error": report.error, "export/difference_to_base": report.difference_to_base}
    tracked.log_metrics(metrics, report.step)
    verified = f"verified: error {report.error:.1e} against the trained model, {report.difference_to_base:.1e} without"
    return [("export", report.uri), ("", verified)]
