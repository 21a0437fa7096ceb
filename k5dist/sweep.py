"""Sweeps (`-m`): several runs of one command, each a child of one run in MLflow (docs/adr/0030).

Where this process is the driver they go one after another, so the first makes the cache that the others find; elsewhere
they are handed over together: a job array of Slurm, one job of a Ray cluster, RayJobs side by side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from k5dist import fit, storage
from k5dist.cluster import slurm, submission
from k5dist.cluster.record import read_record, refuse_second, submitted, write_record
from k5dist.compose import compose, expand_sweep, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.console import console, say, show_table
from k5dist.plan import RunPlan
from k5dist.retry import StorageUnavailable
from k5dist.tracking.parent import close_parent, named_parent, open_parent
from k5dist.tracking.redact import redact_text

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
Planner = Callable[[RunConfig], RunPlan]
# A plan, its configuration as YAML, the sweep's name, whose precache may begin beside the training → exit status.
Run = Callable[[RunPlan, str, str | None, RunPlan | None], int]


@dataclass(frozen=True)
class Sweep:
    """Runs that belong together. `overrides` are what was typed for each."""

    name: str
    plans: tuple[RunPlan, ...]
    overrides: tuple[tuple[str, ...], ...]

    @property
    def first(self) -> RunPlan:
        return self.plans[0]

    @property
    def identity(self) -> str:
        """A digest of the runs' folders: the same for the same sweep."""
        folders = sorted(plan.run_uri for plan in self.plans)
        return hashlib.sha256(json.dumps(folders).encode()).hexdigest()[:16]

    @property
    def swept(self) -> dict[str, str]:
        """The keys that differ, with the values that they take."""
        values: dict[str, list[str]] = {}
        for typed in self.overrides:
            for override in typed:
                key, _, value = override.partition("=")
                values.setdefault(key.lstrip("+"), []).append(value)
        return {key: ", ".join(dict.fromkeys(taken)) for key, taken in values.items() if len(set(taken)) > 1}

    def following(self, at: int) -> RunPlan | None:
        """The next run with a precache that finds its work not done by those before it, if run `at` trains."""
        done = {plan.what_is_encoded for plan in self.plans[: at + 1]}
        if not {"train", "validate"} & set(self.plans[at].config.stages):
            return None
        later = (plan for plan in self.plans[at + 1 :] if "precache" in plan.config.stages)
        return next((plan for plan in later if plan.what_is_encoded not in done), None)

    def describe(self, at: int) -> str:
        """What is particular about one run."""
        return " ".join(one for one in self.overrides[at] if one.partition("=")[0].lstrip("+") in self.swept)


def multirun(arguments: list[str], plan: Planner, prepare: Planner, run: Run) -> int:
    """Every combination of the values typed; all are planned, and shown, before the first begins."""
    overrides = expand_sweep(arguments)
    configs = [to_run_config(compose(typed)) for typed in overrides]
    console.stderr = configs[0].cluster.dry_run  # standard output is what would be submitted, and that alone
    sweep = make_sweep(configs, overrides, plan)
    for planned in sweep.plans:
        prepare(planned.config)
    cluster, stages = sweep.first.config.cluster, sweep.first.config.stages
    if stages == ("plan",):
        return 0
    for planned in sweep.plans:
        fit.refuse_unfinished(planned)
    if cluster.kind == "kubernetes":  # the tracking server is the cluster's own: the runs make their parent there
        return submission.submit_each(sweep.plans, sweep.overrides, named_parent(sweep.identity, sweep.name))
    if cluster.kind == "slurm":
        if cluster.dry_run:
            sys.stdout.write(slurm.printed(slurm.sweep_jobs(sweep.name, sweep.plans, sweep.overrides)))
            return 0
        for line in submit_array(sweep):
            say(line)
        return 0
    check_store(sweep.first)
    sweep = with_parent(sweep)
    if cluster.submit:
        from k5dist.cluster import jobs

        try:
            job = jobs.submit(sweep.plans, sweep.name)
        except ConfigError:
            _tell_parent(sweep, "FAILED", [])
            raise
        return jobs.follow(job)
    return run_sweep(sweep, run)


def resolved(files: Sequence[str], prepare: Planner, run: Run) -> int:
    """Runs as `cluster.submit` ships them: whole configurations, one after another where there are several."""
    plans = [prepare(RunConfig.from_mapping(json.loads(Path(file).read_text()))) for file in files]
    if len(plans) == 1:
        return run(plans[0], _yaml(plans[0].config), None, None)
    record = read_record(plans[0].run_uri)
    name = (record.sweep if record else None) or "sweep"
    return run_sweep(Sweep(name, tuple(plans), ((),) * len(plans)), run, submitted_together=True)


def check_store(plan: RunPlan) -> None:
    """Raises ConfigError where the tracking store cannot be used."""
    from k5dist.tracking.run import TrackingUnreachable, check_tracking

    try:
        check_tracking(plan.tracking_uri)
    except TrackingUnreachable as error:
        fix = "start the server, or leave it null"
        raise ConfigError("tracking.uri", plan.tracking_uri, str(error), fix) from error


def _yaml(config: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(config.to_mapping()))))


def make_sweep(configs: Sequence[RunConfig], overrides: Sequence[Sequence[str]], plan: Planner) -> Sweep:
    """Plan all runs before the first begins. With `name=` theirs are `<name>-<run fingerprint>`.

    Raises:
        ConfigError: where a run cannot be planned, and where two are one: equal but for keys that change no result.
    """
    plans = [plan(config) for config in configs]
    named = configs[0].name
    if named is not None:
        renamed = [
            dataclasses.replace(config, name=f"{named}-{made.run_fingerprint}")
            for config, made in zip(configs, plans, strict=True)
        ]
        plans = [plan(config) for config in renamed]
    seen: dict[str, int] = {}
    for at, made in enumerate(plans):
        if (other := seen.setdefault(made.name, at)) != at:
            rule = f"runs {other + 1} and {at + 1} of the sweep are one run: they differ in keys that change no result"
            raise ConfigError("--multirun", " ".join(overrides[at]), rule, "sweep keys of the training or the data")
    digest = hashlib.sha256(json.dumps(sorted(seen)).encode()).hexdigest()[:10]
    name = f"sweep-{digest}" if named is None else f"{named}-sweep"
    return Sweep(name, tuple(plans), tuple(tuple(typed) for typed in overrides))


def with_parent(sweep: Sweep) -> Sweep:
    """The same with the parent's id in each run's configuration; the parent is made where there is none."""
    parent = open_parent(
        uri=sweep.first.tracking_uri,
        experiment=sweep.first.config.tracking.experiment,
        name=sweep.name,
        artifact_root=storage.join(storage.normalise(sweep.first.config.storage.root), "mlartifacts"),
        sweep=sweep.identity,
        swept=sweep.swept,
    )
    plans = []
    for plan in sweep.plans:
        tracking = dataclasses.replace(plan.config.tracking, parent=parent)
        plans.append(dataclasses.replace(plan, config=dataclasses.replace(plan.config, tracking=tracking)))
    return dataclasses.replace(sweep, plans=tuple(plans))


def run_sweep(sweep: Sweep, run: Run, *, submitted_together: bool = False) -> int:
    """One after another, here; a run that fails, or is stopped by name, does not keep the others from theirs. Of runs
    that were submitted in one job some may have been stopped before their turn."""
    statuses = [0] * len(sweep.plans)
    _check_overlap(sweep)
    try:
        for at, plan in enumerate(sweep.plans):
            if submitted_together and _taken_out(plan):
                say(f"run {at + 1} of {len(sweep.plans)} was stopped before its turn: {plan.name}")
                continue
            say(f"run {at + 1} of {len(sweep.plans)} of {sweep.name}: {sweep.describe(at) or plan.name}")
            following = sweep.following(at) if plan.config.cluster.overlap else None
            statuses[at] = _run_child(plan, sweep.name, run, following)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with this sweep")
        return _close(sweep, "KILLED", EXIT_INTERRUPTED)
    if any(status not in (0, EXIT_INTERRUPTED) for status in statuses):
        return _close(sweep, "FAILED", EXIT_FAILED)
    return _close(sweep, "FINISHED", max(statuses))


def _taken_out(plan: RunPlan) -> bool:
    record = read_record(plan.run_uri)  # the submission has said "submitted" of them all
    return record is not None and record.state == "stopped"


def _check_overlap(sweep: Sweep) -> None:
    """Raises ConfigError where a training leaves nothing to the precache that may go on beside it."""
    from k5dist.cluster.ahead import check_room_beside

    beside = [(plan, sweep.following(at)) for at, plan in enumerate(sweep.plans) if plan.config.cluster.overlap]
    worlds = {plan.world: (plan, following) for plan, following in beside if following is not None}
    try:
        for plan, following in worlds.values():
            check_room_beside(plan, following)
    except ConfigError:
        _tell_parent(sweep, "FAILED", [])
        raise


def _run_child(plan: RunPlan, name: str, run: Run, following: RunPlan | None) -> int:
    """What ends a run alone in a message ends this one with it, and not the sweep."""
    try:
        return run(plan, _yaml(plan.config), name, following)
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
    except StorageUnavailable as error:
        sys.stderr.write(f"{error}\n")
    return EXIT_FAILED


def _close(sweep: Sweep, status: str, exit_status: int) -> int:
    """Tell how each run ended, here and in the parent, if there is one."""
    rows = []
    for at, plan in enumerate(sweep.plans):
        record = read_record(plan.run_uri)
        state, loss = (record.state, record.loss) if record else ("not begun", None)
        rows.append({"run": plan.name, "overrides": sweep.describe(at), "state": state, "loss": loss})
    _tell_parent(sweep, status, rows)
    show_table(f"Sweep {sweep.name}", [(row["run"], _told(row)) for row in rows])
    return exit_status


def _told(row: dict[str, Any]) -> str:
    loss = "" if row["loss"] is None else f", loss {row['loss']:.4f}"
    return f"{row['overrides']}: {row['state']}{loss}".removeprefix(": ")


def submit_array(sweep: Sweep) -> list[str]:
    """Hand a sweep to Slurm as a job array; lines for the user."""
    for plan in sweep.plans:
        refuse_second(plan.run_uri, everywhere=True)
    check_store(sweep.first)
    sweep = with_parent(sweep)
    try:
        numbers, lines = slurm.submit(slurm.sweep_jobs(sweep.name, sweep.plans, sweep.overrides))
    except ConfigError:
        _tell_parent(sweep, "FAILED", [])
        raise
    for at, plan in enumerate(sweep.plans):
        write_record(plan.run_uri, submitted(slurm_job_id=f"{numbers[-1]}_{at}", sweep=sweep.name))
    table = [{"run": plan.name, "overrides": sweep.describe(at)} for at, plan in enumerate(sweep.plans)]
    _tell_parent(sweep, "FINISHED", table)  # no process outlives the others to do it
    return lines


def _tell_parent(sweep: Sweep, status: str, table: list[dict[str, Any]]) -> None:
    """How it ended, where there is a parent; a tracking server that is gone by then changes nothing that was done."""
    parent = sweep.first.config.tracking.parent
    if parent is None:
        return
    try:
        close_parent(sweep.first.tracking_uri, parent, status, table)
    except Exception as error:
        say(f"warning: the sweep's run in MLflow could not be closed: {redact_text(str(error))}")
