"""`python -m k5dist.launch +flavour=t2v-tiny`: compose → validate → plan → run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from k5dist import fit, storage, sweep
from k5dist.cluster import submission
from k5dist.compose import compose, config_folder, expand_files, normalise_arguments, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.console import console, say, show_table
from k5dist.estimate import GIB
from k5dist.plan import ClusterFacts, Estimates, RunPlan, estimates, make_plan
from k5dist.retry import StorageUnavailable

_MULTIRUN = {"-m", "--multirun"}
EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def plan_run(config: RunConfig) -> RunPlan:
    """Plan for this machine's GPUs, or for those that the configuration names."""
    from k5dist.hardware import local_facts
    from k5dist.model import pretrained
    from k5dist.tracking.run import default_tracking_uri

    only_planning = config.stages == ("plan",) or submission.is_elsewhere(config)
    facts = submission.facts_elsewhere(config) if submission.is_elsewhere(config) else local_facts(config.cluster)
    if facts.gpu_name is None:
        facts = dataclasses.replace(facts, gpu_name=submission.selected_gpu(config))
    if facts.gpus_per_node == 0 and config.cluster.gpus_per_node is None and not config.flavour.generated:
        if config.needs_gpu:
            rule = f"{config.flavour.name} trains on GPUs, and this machine shows none"
            fix = "run it on a GPU machine, set cluster.gpus_per_node, or try +flavour=t2v-tiny"
            raise ConfigError("cluster.gpus_per_node", None, rule, fix)
        facts = ClusterFacts(1, None, assumed=True)
    if not only_planning:
        pretrained.check(config)
        pretrained.check_clip(config)
        for uri in config.validation.images:
            storage.check_readable("validation.images", uri)
    encoder = pretrained.encoder_identity(config) if config.crepa.enabled else None
    plan = make_plan(config, facts, _identity(config, only_planning), encoder, _lora_identity(config))
    fit.check(config, facts)
    if plan.tracking_uri:
        return plan
    return dataclasses.replace(plan, tracking_uri=default_tracking_uri(storage.normalise(config.storage.root)))


def _lora_identity(config: RunConfig) -> str:
    if config.adapter != "lora" or config.lora.init_from is None:
        return ""
    from k5dist.model import lora_files, pretrained

    if submission.is_elsewhere(config) and not pretrained.is_hub_id(config.lora.init_from):
        return f"elsewhere:{config.lora.init_from}"
    lora_files.check(config.lora, config.model)
    return lora_files.identity(config.lora)


def _identity(config: RunConfig, only_planning: bool) -> str:
    from k5dist.model import pretrained

    if submission.is_elsewhere(config) and not pretrained.is_hub_id(config.pretrained) and not config.flavour.generated:
        return f"elsewhere:{config.pretrained}"
    if only_planning and not pretrained.is_hub_id(config.pretrained) and not config.flavour.generated:
        pretrained.check(config)
    return pretrained.identity(config)


def show_plan(plan: RunPlan) -> None:
    costs = estimates(plan)
    world, config = plan.world, plan.config
    device = "CPU" if world.device == "cpu" else costs.gpu
    kept = "" if config.model.attention_P is None else f", NABLA P={config.model.attention_P}"
    buckets = ", ".join(f"{bucket} ({bucket.tokens:,} tokens)" for bucket in plan.buckets)
    degrees = f"shard {world.shard} × replicate {world.replicate} × context {world.context}"
    batch = f"{plan.batch_size} clips a step: {world.data_parallel} at once, {plan.accumulation} times"
    rows = [
        ("flavour", f"{config.flavour.name} ({config.flavour.task}{kept})"),
        ("checkpoint", f"{plan.pretrained} ({plan.pretrained_identity})"),
        ("model", f"{_count(costs.parameters)} weights, {_count(costs.trainable)} trained ({config.adapter})"),
        ("world", f"{world.size} workers on {device}: {world.nodes} × {world.workers_per_node} a node; {degrees}"),
        *([("network", _network(config))] if world.nodes > 1 else []),
        ("buckets", buckets),
        ("batch", batch),
        (
            "steps",
            f"{config.train.steps}, seed {config.train.seed}, lr {config.optimizer.lr:g} ({config.optimizer.schedule})",
        ),
        ("precache", _pools(plan)),
        *([("under way", _flow(plan))] if plan.world.store_bytes else []),
        ("recompute", _recompute(plan)),
        ("memory a GPU" if world.device == "cuda" else "memory a worker", _memory(plan, costs)),
        *([("rollout", _rollout(plan, costs))] if config.rollout.enabled else []),
        ("time a step", _duration(costs)),
        ("cache a clip", f"{costs.sample_cache_bytes / 2**20:.1f} MiB"),
        ("fingerprints", f"cache {plan.cache_fingerprint}, run {plan.run_fingerprint}"),
        ("data", _data(config)),
        ("run", plan.run_uri),
        ("tracking", plan.tracking_uri),
    ]
    show_table(f"Plan of {plan.name}", rows)


def _network(config: RunConfig) -> str:
    named = config.cluster.interface
    shown = f"{named} (cluster.interface)" if named else "the interface of each node's address in the Ray cluster"
    return f"gloo and NCCL begin over {shown}"


def _data(config: RunConfig) -> str:
    if not config.data.datasets:
        return str(config.data.source or "none named: the flavour's default bucket")
    return ", ".join(f"{dataset.name} ({dataset.source})" for dataset in config.datasets)


def _pools(plan: RunPlan) -> str:
    pools = plan.pools
    shown = ((pools.text, "text"), (pools.vae, "VAE"))
    parts = [f"{p.workers} {name} workers" + (f" of {p.gpus:g} GPU" if p.gpus else "") for p, name in shown]
    decoding = "a free core" if pools.decode_tasks is None else f"{pools.decode_tasks} at once"
    return f"{', then '.join(parts)}; decoding: {decoding}"


def _flow(plan: RunPlan) -> str:
    """What precache may hold in Ray's object store; where it is too small, what helps."""
    flow, mib = plan.flow, 2**20
    told = f"at most {flow.blocks} × {flow.block_bytes / mib:.1f} MiB of decoded clips and {flow.shards} + 1 shards"
    told += f" in Ray's object stores of about {flow.store_bytes / GIB:.1f} GiB"
    if flow.bound_bytes > flow.store_bytes:
        return f"{told}: MORE THAN THEY HOLD, they spill to disk; a smaller precache.shard_size_mib, or larger stores"
    waits = flow.blocks < 2 * plan.pools.vae.workers
    return told + ("; VAE workers wait for clips: larger stores help" if waits else "")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _recompute(plan: RunPlan) -> str:
    """What of the blocks stays in memory between forward and backward, and who said so."""
    blocks, keep, attention = plan.config.model.num_visual_blocks, plan.recompute.keep, plan.recompute.attention
    parts = [f"matrix products kept in {keep}"] if keep else []
    parts += [f"attention outputs kept in {attention}"] if attention else []
    said = ", ".join(parts) + f" of {blocks} blocks" if parts else f"all {blocks} blocks from their inputs"
    if plan.recompute.offload:
        said += f"; what the first {plan.recompute.offload} keep waits in the host's memory"
    return f"{said} ({plan.config.train.activation_checkpointing})"


def _memory(plan: RunPlan, costs: Estimates) -> str:
    parts = {name: size / GIB for name, size in dataclasses.asdict(costs.memory).items()}
    shown = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size >= 0.05)
    limit = f" of {costs.gpu_bytes / GIB:.1f}" if plan.world.device == "cuda" else ""
    note = f"; {costs.memory_note}" if costs.memory_note else ""
    return f"about {costs.memory.total / GIB:.1f}{limit} GiB ({shown or 'next to nothing'}){note}"


def _rollout(plan: RunPlan, costs: Estimates) -> str:
    rollout = plan.config.rollout
    share = costs.rollout_flops / costs.step_flops
    when = f"from step {rollout.start_step + 1} on" + (
        f", in full {rollout.ramp_steps} later" * bool(rollout.ramp_steps)
    )
    what = f"{rollout.probability:.0%} of the clips over 1 to {rollout.max_steps} steps {when}"
    return f"{what}: {costs.rollout_forwards:.1f} forwards more a worker and step, {share:.0%} of its operations"


def _duration(costs: Estimates) -> str:
    flops = f"{costs.step_flops / 1e15:.3g} PFLOP"
    if costs.step_seconds is None:
        return f"{flops} (no estimate for CPUs)"
    return f"about {costs.step_seconds:.1f} s ({flops}; assuming {'; '.join(costs.notes)})"


def launch(composed: DictConfig, overrides: Sequence[str] = ()) -> int:
    """One job, from a composed configuration to an exit status. `overrides` are what was typed."""
    return _guarded(lambda: _launch(to_run_config(composed), OmegaConf.to_yaml(composed), overrides))


def _launch(config: RunConfig, resolved_yaml: str, overrides: Sequence[str]) -> int:
    console.stderr = config.cluster.dry_run  # standard output is what would be submitted, and that alone
    plan = prepare(config)
    if config.stages == ("plan",):
        if not storage.exists(plan.plan_uri):  # a run that is under way keeps the plan its workers read
            storage.publish_bytes(plan.plan_uri, plan.to_json().encode())
        say(f"plan: {plan.plan_uri}")
        return 0
    if config.cluster.overlap:
        rule = "overlaps the runs of a sweep, and this is a single run"
        raise ConfigError("cluster.overlap", True, rule, "cluster.overlap=false, or several runs by -m")
    if submission.is_submitted(config.cluster):
        fit.refuse_unfinished(plan)
        return submission.submit(plan, overrides)
    return run_plan(plan, resolved_yaml)


def prepare(config: RunConfig) -> RunPlan:
    """The plan, shown, with everything checked that can be checked before anything runs."""
    plan = plan_run(config)
    show_plan(plan)
    _warn(config)
    if not submission.is_elsewhere(config):
        storage.check_writable("storage.root", storage.normalise(config.storage.root))
        _check_folder(plan)
    return plan


def _guarded(work: Callable[[], int]) -> int:
    """What a user can mend in one block, in place of a traceback."""
    try:
        return work()
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
        return EXIT_CONFIG
    except StorageUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the newest checkpoint")
        return EXIT_INTERRUPTED
    finally:
        console.stderr = False


def _check_folder(plan: RunPlan) -> None:
    """A run's folder belongs to one run: its probe, samples and checkpoints say nothing about another."""
    if plan.config.resume == "never" or not storage.exists(plan.plan_uri):
        return
    found = json.loads(storage.read_text(plan.plan_uri))["run_fingerprint"]
    if found != plan.run_fingerprint:
        rule = f"its folder holds run {found}, and these settings make run {plan.run_fingerprint}"
        raise ConfigError("name", plan.name, rule, "choose another name, or resume=never to replace what is there")


def run_plan(plan: RunPlan, resolved_yaml: str, sweep_name: str | None = None, following: RunPlan | None = None) -> int:
    from k5dist.cluster.driver import TrainingFailed, run_stages, tracked_run
    from k5dist.cluster.record import RAYJOB, Recorder, refuse_second
    from k5dist.precache.pipeline import PrecacheError, check_source
    from k5dist.precache.sources import Listing
    from k5dist.precache.upkeep import CacheDamaged
    from k5dist.train.feed import refuse_featureless

    fit.refuse_unfinished(plan)
    refuse_second(plan.run_uri)
    refuse_featureless(plan)
    source = check_source(plan) if plan.config.prepares else Listing.of(())
    sweep.check_store(plan)
    if plan.config.resume == "never" and plan.config.needs_gpu:
        storage.remove(plan.run_uri)
    storage.publish_bytes(plan.plan_uri, plan.to_json().encode())
    storage.publish_bytes(storage.join(plan.run_uri, "config.yaml"), resolved_yaml.encode())
    root = storage.normalise(plan.config.storage.root)
    record = Recorder(plan.run_uri, sweep_name)
    try:
        with record:
            with tracked_run(plan, storage.join(root, "mlartifacts")) as tracked:
                storage.publish_bytes(storage.join(plan.run_uri, "tracking.json"), _tracking_json(tracked.run_id))
                tracked.log_config(resolved_yaml, plan.to_json(), _flat(plan.config.to_mapping()))
                tracked.log_git(Path(__file__).parent.parent)
                summary = run_stages(plan, tracked, source, record, following)
                summary.append(("tracking", tracked.url))
            show_table("Done", summary)
        return 0
    except (TrainingFailed, PrecacheError, CacheDamaged) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    except KeyboardInterrupt:
        if record.asked_to_stop and os.environ.get(RAYJOB):
            say("stopped by name")
            return 0  # KubeRay would begin a RayJob that failed again
        if sweep_name is None or not record.asked_to_stop:
            raise
        say("stopped by name; the sweep goes on")
        return EXIT_INTERRUPTED
    except (ConfigError, StorageUnavailable):
        raise
    except Exception:
        sys.stderr.write(traceback.format_exc())
    sys.stderr.write(f"the run is marked as failed; the same command goes on from what {plan.run_uri} holds\n")
    return EXIT_FAILED


def _tracking_json(run_id: str) -> bytes:
    return json.dumps({"run_id": run_id}).encode()


def _flat(node: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def _warn(config: RunConfig) -> None:
    from k5dist.config import RECOMMENDED_GUIDANCE

    low, high = RECOMMENDED_GUIDANCE
    guidance = config.validation.guidance
    if not low <= guidance <= high:
        say(f"warning: validation.guidance={guidance:g} is outside {low:g}…{high:g}: videos may be black or noise")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def _job(composed: DictConfig) -> None:
    # Hydra turns exceptions into its own report and status; ours have been handled by then.
    status = launch(composed, HydraConfig.get().overrides.task)
    if status:
        sys.stdout.flush()
        sys.exit(status)


def main() -> None:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    for number in (signal.SIGTERM, signal.SIGUSR1):  # what schedulers say where a person types Ctrl-C
        signal.signal(number, _interrupt)
    try:
        arguments = expand_files(sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
        sys.exit(EXIT_CONFIG)
    if arguments[:1] == ["--resolved"]:
        sys.exit(_guarded(lambda: sweep.resolved(arguments[1:], prepare, run_plan)))
    if _MULTIRUN.intersection(arguments):
        typed = [argument for argument in arguments if argument not in _MULTIRUN]
        sys.exit(_guarded(lambda: sweep.multirun(typed, plan_run, prepare, run_plan)))
    sys.argv[1:] = normalise_arguments(arguments)
    try:
        compose([argument for argument in sys.argv[1:] if not argument.startswith("-")])
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
        sys.exit(EXIT_CONFIG)
    GlobalHydra.instance().clear()
    _job()


if __name__ == "__main__":
    main()
