"""Sweeps before anything runs: which runs they are, what a job array asks for, and what is shipped to a Ray cluster."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml

from k5dist.cluster import ahead, jobs, slurm
from k5dist.cluster.manifests import ARGUMENTS_ANNOTATION
from k5dist.compose import compose, expand_sweep, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.plan import ClusterFacts, RunPlan, make_plan
from k5dist.sweep import Sweep, make_sweep, multirun

TINY = ["+flavour=t2v-tiny", "name=a"]


def plan(config: RunConfig) -> RunPlan:
    return make_plan(config, ClusterFacts(0), "generated:test")


def sweep_of(*arguments: str) -> Sweep:
    overrides = expand_sweep([*TINY, *arguments])
    return make_sweep([to_run_config(compose(typed)) for typed in overrides], overrides, plan)


def test_all_combinations_and_values_that_only_look_like_lists() -> None:
    prompts = "validation.prompts=['a fox, running','a, b']"
    found = expand_sweep(["flavour=t2v-tiny", "optimizer.lr=1e-5,3e-5", "lora.rank=choice(4,8)", prompts])
    rows = [row[1:] for row in found]
    assert rows == [
        [f"optimizer.lr={lr}", f"lora.rank={rank}", prompts] for lr in ("1e-05", "3e-05") for rank in (4, 8)
    ]
    assert to_run_config(compose(found[0])).validation.prompts == ("a fox, running", "a, b")
    with pytest.raises(ConfigError, match="no key has several values"):
        expand_sweep(["flavour=t2v-tiny", prompts])
    with pytest.raises(ConfigError, match="single values"):
        expand_sweep(["optimizer.lr=interval(1e-5,1e-4)"])


def test_runs_have_names_of_their_own_that_stay() -> None:
    two, three = sweep_of("train.seed=1,2"), sweep_of("train.seed=1,2,3")
    names = [made.name for made in two.plans]
    assert len(set(names)) == 2 and all(name.startswith("a-") for name in names)
    assert [made.name for made in three.plans][:2] == names
    assert two.swept == {"train.seed": "1, 2"}
    assert two.describe(1) == "train.seed=2"
    with pytest.raises(ConfigError, match="are one run"):
        sweep_of("checkpoint.every=10,20")


def test_whose_cache_may_be_made_beside_a_training() -> None:
    """The next run's with work that none before it has done."""
    sweep = sweep_of("data.crop=center,none", "train.seed=1,2")
    assert [made.config.data.crop for made in sweep.plans] == ["center", "center", "none", "none"]
    assert [sweep.following(at) for at in range(4)] == [sweep.plans[2], sweep.plans[2], None, None]
    alone = sweep_of("data.crop=center,none", "stages=[plan,precache]")
    assert alone.following(0) is None, "it does not train"


def test_a_precache_beside_a_training_fits_the_gpus_that_are_left() -> None:
    asked = ["train.batch_size=8", "precache.vae_workers=8", "precache.vae_gpus=0.5", "cluster.nodes=2"]
    made = make_plan(to_run_config(compose([*TINY, *asked])), ClusterFacts(4, "NVIDIA H200"), "generated:test")
    assert (made.pools.vae.workers, made.pools.text.workers) == (8, 8)
    beside = ahead.resized(made, gpus=3)
    assert (beside.pools.vae.workers, beside.pools.text.workers) == (6, 3)
    assert (beside.cache_uri, beside.run_uri, beside.batch_size) == (made.cache_uri, made.run_uri, made.batch_size)
    on_cpus = sweep_of("train.seed=1,2").first
    assert ahead.resized(on_cpus, gpus=0) == on_cpus


def arguments_of(job: slurm.SlurmJob, task: int) -> list[str]:
    """The overrides of a task as bash reads them out of the script."""
    head = job.script.partition("# Inside a Slurm allocation")[0] + "\nprintf '%s\\n' \"$@\"\n"
    environment = {"SLURM_ARRAY_TASK_ID": str(task), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["bash"], input=head, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_a_job_array_after_one_job_that_makes_the_cache() -> None:
    sweep = sweep_of("cluster=slurm", "cluster.nodes=2", "optimizer.lr=1e-5,3e-5", "lora.rank=4,8")
    cache, array = slurm.sweep_jobs(sweep.name, sweep.plans, sweep.overrides)
    assert "#SBATCH --array=0-3\n" in array.script and "--array" not in cache.script
    assert (cache.after_previous, array.after_previous) == (False, True)
    assert arguments_of(cache, 0)[-2:] == ["name=a-sweep-cache-0", "stages=[plan,precache]"]
    for at, made in enumerate(sweep.plans):
        typed = arguments_of(array, at)
        assert f"name={made.name}" in typed and "train.batch_size=4" in typed
        assert plan(to_run_config(compose(typed))).run_fingerprint == made.run_fingerprint
    of_data = sweep_of("cluster=slurm", "data.frame_rate=12,6")
    assert "#SBATCH --array=0-1\n" in slurm.sweep_jobs("s", of_data.plans, of_data.overrides)[0].script
    other = sweep_of("cluster=slurm", "cluster.nodes=1", "train.seed=1,2")
    with pytest.raises(ConfigError, match="the same nodes"):
        slurm.sweep_jobs("s", [sweep.plans[0], other.plans[0]], [sweep.overrides[0], other.overrides[0]])


KUBERNETES = (
    *("cluster=kubernetes", "cluster.gpus_per_node=0", "cluster.dry_run=true", "kubernetes.image=k5dist:1"),
    *("storage.root=s3://bucket/k5", "tracking.uri=http://mlflow:5000"),
)


def run_multirun(*arguments: str) -> int:
    return multirun([*arguments], plan, plan, lambda *_: pytest.fail("nothing runs here"))


def test_rayjobs_are_told_whose_children_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    typed = [*TINY, *KUBERNETES, "train.seed=1,2"]
    assert run_multirun(*typed) == 0
    rayjobs = list(yaml.safe_load_all(capsys.readouterr().out))
    told = set()
    for rayjob, made in zip(rayjobs, sweep_of(*typed[len(TINY) :]).plans, strict=True):
        head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        there = plan(to_run_config(compose(json.loads(head["metadata"]["annotations"][ARGUMENTS_ANNOTATION]))))
        assert (there.name, there.run_fingerprint) == (made.name, made.run_fingerprint)
        told.add(there.config.tracking.parent)
    (parent,) = told
    assert parent is not None and parent.startswith("sweep:") and parent.endswith(":a-sweep")


@pytest.mark.parametrize("where", [KUBERNETES, ("cluster=slurm", "cluster.dry_run=true"), ()])
def test_what_would_not_run_is_not_submitted(where: tuple[str, ...]) -> None:
    large = ["+flavour=t2v-tiny-nabla", "name=a", "data.resolution=[1024,1024]", "data.num_frames=61"]
    with pytest.raises(ConfigError, match="65,536 tokens"):
        run_multirun(*large, *where, "train.seed=1,2")


def test_a_ray_job_gets_the_plan_and_of_the_environment_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K5_TEST_MARK", "passed on")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    ray = ["cluster=ray", "cluster.submit=true", "cluster.address=https://head:8265", "cluster.pass_env=[K5_TEST_MARK]"]
    made = plan(to_run_config(compose([*TINY, *ray])))
    assert jobs.environment(made.config) == {"K5_TEST_MARK": "passed on", "RAY_JOB_STOP_WAIT_TIME_S": "900"}
    shipped = RunConfig.from_mapping(json.loads(json.dumps(jobs.configuration(made))))
    assert not shipped.cluster.submit and shipped.cluster.address is None
    again = plan(shipped)
    assert (again.run_uri, again.run_fingerprint) == (made.run_uri, made.run_fingerprint)


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["cluster.submit=true"], "cluster.submit", "cluster=ray"),
        (["cluster=ray", "cluster.submit=true", "cluster.address=head:6379"], "cluster.address", "http://head:8265"),
        (["cluster=ray", "cluster.pass_env=[HF_TOKEN]"], "cluster.pass_env", "credential"),
        (["cluster=ray", "cluster.pass_env=['NCCL_DEBUG=INFO']"], "cluster.pass_env", "without its value"),
        (["cluster=slurm", "cluster.overlap=true"], "cluster.overlap", "side by side"),
        (["cluster.wait_seconds=0"], "cluster.wait_seconds", "greater than 0"),
        (["cluster=ray", "cluster.address=http://me:word@head:8265"], "cluster.address", "no credentials"),
    ],
)
def test_what_could_not_be_submitted_is_refused(overrides: list[str], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        to_run_config(compose([*TINY, *overrides]))
    assert caught.value.key == key
    assert "word" not in caught.value.block()
