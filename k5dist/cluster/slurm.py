"""A plan as Slurm jobs: scripts that start Ray in an allocation and the same command on its first node."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import k5dist
from k5dist.cluster.record import refuse_second, submitted, write_record
from k5dist.config import ConfigError, SlurmConfig
from k5dist.console import say
from k5dist.plan import RunPlan

_SUBMIT_SECONDS = 60
_BEFORE_TRAINING = ("plan", "verify", "precache")
# What sbatch says → the key that is wrong and what to do; the rest is shown as it is.
_REFUSALS = (
    (r"invalid partition", "slurm.partition", "`sinfo --summarize` lists the partitions"),
    (r"invalid account", "slurm.account", "`sacctmgr show associations user=$USER` lists your accounts"),
    (r"invalid qos", "slurm.qos", "`sacctmgr show qos` lists them"),
    (r"time limit", "slurm.time", "ask for less; `sinfo` shows each partition's limit"),
    (r"qos\w*limit|assocgrp|job violates accounting", "slurm.qos", "a quota is used up: ask for less, or wait"),
    (r"generic resource|gres", "cluster.gpus_per_node", "`sinfo --Format=nodes,gres` shows the GPUs of a node"),
    (r"node count|node configuration", "cluster.nodes", "ask for what `sinfo --Node --long` shows"),
)


@dataclass(frozen=True)
class SlurmJob:
    """One sbatch script; with `after_previous` it waits for the good end of the job before it."""

    name: str
    script: str
    after_previous: bool


def jobs(plan: RunPlan, overrides: Sequence[str]) -> list[SlurmJob]:
    """The job of this plan, or two where other GPUs make the cache. `overrides` are those of the command."""
    slurm, stages = plan.config.slurm, plan.config.stages
    first = [stage for stage in stages if stage in _BEFORE_TRAINING]
    rest = [stage for stage in stages if stage not in _BEFORE_TRAINING]
    if slurm.precache_partition is None or "precache" not in first or not rest:
        cluster = plan.config.cluster
        tasks = [[*overrides, _batch(plan)]]
        return [_job(plan, tasks, plan.name, slurm.partition, cluster.nodes, cluster.gpus_per_node, after=False)]
    gpus = plan.config.cluster.gpus_per_node
    other = gpus if slurm.precache_gpus_per_node is None else slurm.precache_gpus_per_node
    before = [[*overrides, f"stages=[{','.join(first)}]", _batch(plan)]]
    # resume=never has been done by then.
    behind = [[*overrides, f"stages=[{','.join(['plan', *rest])}]", "resume=auto", _batch(plan)]]
    name = f"{plan.name}-precache"
    return [
        _job(plan, before, name, slurm.precache_partition, slurm.precache_nodes, other, after=False),
        _job(plan, behind, plan.name, slurm.partition, plan.config.cluster.nodes, gpus, after=True),
    ]


def sweep_jobs(name: str, plans: Sequence[RunPlan], overrides: Sequence[Sequence[str]]) -> list[SlurmJob]:
    """A job array with a task a run. Before it one that makes the caches, each once: tasks that all begin with an empty
    cache would encode the same clips at the same time.

    Raises:
        ConfigError: where the runs ask for different machines, which tasks of one array cannot.
    """
    first = plans[0]
    for plan in plans:
        if (plan.config.slurm, plan.config.cluster) != (first.config.slurm, first.config.cluster):
            rule = "the tasks of a job array all ask for the same nodes, GPUs and partition"
            raise ConfigError("cluster, slurm", plan.name, rule, "sweep other keys, or submit these runs one by one")
    cluster, slurm = first.config.cluster, first.config.slurm
    tasks = [
        [*typed, f"name={plan.name}", f"tracking.parent={plan.config.tracking.parent or 'null'}", _batch(plan)]
        for plan, typed in zip(plans, overrides, strict=True)
    ]
    array = _job(first, tasks, name, slurm.partition, cluster.nodes, cluster.gpus_per_node, after=False)
    if "precache" not in first.config.stages or first.config.stages[-1] == "precache":
        return [array]
    of_cache = {plan.what_is_encoded: task for plan, task in zip(plans, tasks, strict=True)}
    # Under names of their own: who stops a run that waits does not mean the cache of all.
    before = [[*task, f"name={name}-cache-{at}", "stages=[plan,precache]"] for at, task in enumerate(of_cache.values())]
    other = slurm.precache_partition or slurm.partition
    nodes = slurm.precache_nodes if slurm.precache_partition else cluster.nodes
    gpus = slurm.precache_gpus_per_node if slurm.precache_partition else None
    gpus = cluster.gpus_per_node if gpus is None else gpus
    return [
        _job(first, before, f"{name}-precache", other, nodes, gpus, after=False),
        replace(array, after_previous=True),
    ]


def _batch(plan: RunPlan) -> str:
    """Inside, the plan is this one: the batch is settled here, and where it runs is the script's own to say."""
    return f"train.batch_size={plan.batch_size}"


def _job(
    plan: RunPlan,
    tasks: Sequence[Sequence[str]],
    name: str,
    partition: str | None,
    nodes: int,
    gpus: int | None,
    *,
    after: bool,
) -> SlurmJob:
    """`tasks` are the overrides of each; of more than one an array is made."""
    slurm = plan.config.slurm
    gpus = plan.world.workers_per_node if gpus is None and plan.world.device == "cuda" else gpus
    options = [f"--job-name={name}", f"--nodes={nodes}", "--ntasks-per-node=1", "--requeue", "--open-mode=append"]
    options += [f"--signal=B:USR1@{slurm.signal_seconds}", f"--output={slurm.output}"]
    wanted = {"partition": partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time}
    options += [f"--{option}={value}" for option, value in wanted.items() if value is not None]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += [f"--array=0-{len(tasks) - 1}"] if len(tasks) > 1 else []
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in [*options, *slurm.options]), "set -euo pipefail"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in _settings(slurm).items()]
    lines += _arguments(tasks)
    body = (_folder() / "in_allocation.sh").read_text()
    return SlurmJob(name, "\n".join([*lines, "", body]), after)


def _arguments(tasks: Sequence[Sequence[str]]) -> list[str]:
    """Lines that make a task's overrides the script's positional parameters."""
    # A script that was printed is there to be submitted, and then runs.
    kept = [[each for each in task if not each.lstrip("+").startswith("cluster.dry_run=")] for task in tasks]
    quoted = [[f"  {shlex.quote(override)}" for override in task] for task in kept]
    sets = [["set -- \\", *(f"{line} \\" for line in lines[:-1]), lines[-1]] for lines in quoted]
    if len(sets) == 1:
        return sets[0]
    cases = [line for at, lines in enumerate(sets) for line in (f"{at})", *lines, ";;")]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def _settings(slurm: SlurmConfig) -> dict[str, str]:
    if slurm.container is None:
        return {"K5DIST_PYTHON": sys.executable}
    settings = {"K5DIST_CONTAINER": slurm.container, "K5DIST_CONTAINER_KIND": slurm.container_kind}
    if slurm.container_mounts:
        settings["K5DIST_CONTAINER_MOUNTS"] = ",".join(slurm.container_mounts)
    return settings


def _folder() -> Path:
    """`slurm/`: inside an installed package, or beside it in a checkout."""
    packaged = Path(k5dist.__path__[0])
    return packaged / "slurm" if (packaged / "slurm").is_dir() else packaged.parent / "slurm"


def submit(scripts: Sequence[SlurmJob]) -> tuple[list[str], list[str]]:
    """Submit them; returns their numbers, and lines for the user.

    Raises:
        ConfigError: where Slurm refuses one; those submitted before it are cancelled.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("cluster", "slurm", "this machine has no sbatch", "submit from a login node of the cluster")
    numbers: list[str] = []
    said = []
    for job in scripts:
        after = [f"--dependency=afterok:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if job.after_previous else []
        try:
            numbers.append(_sbatch(job.script, after))
        except ConfigError:
            if numbers:
                subprocess.run(["scancel", *numbers], check=False, timeout=_SUBMIT_SECONDS)
            raise
        waits = f" after {numbers[-2]}" if job.after_previous else ""
        said.append(f"submitted {job.name}: job {numbers[-1]}{waits}")
    said.append(f"look: squeue --jobs={','.join(numbers)}   save and queue again: scancel --signal=USR1 --batch <job>")
    return numbers, said


def printed(scripts: Sequence[SlurmJob]) -> str:
    """One script as it is; several each below a line that says how it is submitted, which keeps sbatch from taking them
    for one."""
    if len(scripts) == 1:
        return scripts[0].script
    pieces = []
    for number, job in enumerate(scripts, start=1):
        after = f" --dependency=afterok:<job {number - 1}> --kill-on-invalid-dep=yes" if job.after_previous else ""
        pieces.append(f"# {number} of {len(scripts)}, {job.name}: sbatch{after}\n{job.script}")
    return "\n".join(pieces)


def submit_run(plan: RunPlan, overrides: Sequence[str]) -> int:
    """Hand the same command to Slurm, or print it (`cluster.dry_run`); it runs `launch` again inside its allocation."""
    made = jobs(plan, overrides)
    if plan.config.cluster.dry_run:
        sys.stdout.write(printed(made))
        return 0
    refuse_second(plan.run_uri, everywhere=True)
    numbers, lines = submit(made)
    write_record(plan.run_uri, submitted(slurm_job_id=numbers[-1]))
    for line in lines:
        say(line)
    return 0


def _sbatch(script: str, options: Sequence[str]) -> str:
    """The job's number."""
    command = ["sbatch", "--parsable", *options]
    # Options of an allocation that this shell may be in would override the script's.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    environment |= {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    try:
        done = subprocess.run(
            command,
            input=script,
            capture_output=True,
            text=True,
            timeout=_SUBMIT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        rule = f"Slurm's controller did not answer within {_SUBMIT_SECONDS} s"
        raise ConfigError("cluster", "slurm", rule, "see `scontrol ping`") from error
    if done.returncode == 0:
        return done.stdout.strip().split(";")[0]
    reason = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
    for pattern, key, fix in _REFUSALS:
        if re.search(pattern, reason, re.IGNORECASE):
            raise ConfigError(key, None, f"Slurm refused the job: {reason}", fix)
    raise ConfigError("cluster", "slurm", f"Slurm refused the job: {reason}", "see `scontrol ping` and `sinfo`")
