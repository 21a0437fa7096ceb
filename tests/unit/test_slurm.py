"""The scripts that `cluster=slurm` submits, and what it says when Slurm refuses. A real Slurm: tests/cluster."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k5dist.cluster import slurm
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.plan import ClusterFacts, make_plan

TINY = ["+flavour=t2v-tiny", "cluster=slurm", "cluster.nodes=2", "name=a"]


def jobs(*overrides: str, gpus: int = 0) -> list[slurm.SlurmJob]:
    typed = [*TINY, *overrides]
    return slurm.jobs(make_plan(to_run_config(compose(typed)), ClusterFacts(gpus), "generated:test"), typed)


def directives(job: slurm.SlurmJob) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in job.script.splitlines() if line.startswith("#SBATCH ")}


def test_a_script_asks_for_what_the_plan_says() -> None:
    asked = ["slurm.partition=long", "slurm.account=us", "slurm.qos=high", "slurm.options=[--exclusive]"]
    (job,) = jobs(*asked, "cluster.gpus_per_node=8", "train.batch_size=16", gpus=8)
    assert {"--partition=long", "--account=us", "--qos=high", "--exclusive", "--nodes=2"} <= directives(job)
    assert {"--gpus-per-node=8", "--signal=B:USR1@180", "--requeue", "--ntasks-per-node=1"} <= directives(job)
    subprocess.run(["bash", "-n"], input=job.script, text=True, check=True)


def arguments_of(job: slurm.SlurmJob) -> list[str]:
    """The overrides as bash reads them out of the script."""
    head = job.script.partition("# Inside a Slurm allocation")[0]
    done = subprocess.run(
        ["bash"], input=head + "\nprintf '%s\\n' \"$@\"\n", capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_overrides_pass_the_shell_unchanged() -> None:
    typed = """validation.prompts=["it's $HOME `a` !", "two  spaces"]"""
    (job,) = jobs(typed)
    assert arguments_of(job) == [*TINY, typed, "train.batch_size=4"]


def test_other_gpus_make_the_cache_in_a_job_before() -> None:
    before, behind = jobs(
        "slurm.precache_partition=cheap", "slurm.precache_nodes=1", "slurm.precache_gpus_per_node=2", "resume=never",
        "cluster.gpus_per_node=8", "train.batch_size=null", gpus=8,
    )  # fmt: skip
    assert {"--partition=cheap", "--nodes=1", "--gpus-per-node=2"} <= directives(before)
    assert {"--nodes=2", "--gpus-per-node=8"} <= directives(behind)
    assert (before.after_previous, behind.after_previous) == (False, True)
    shown = slurm.printed((before, behind))
    assert not shown.startswith("#!"), "sbatch would take the first for all"
    assert shown.count("--dependency=afterok:<job 1>") == 1 and before.script in shown and behind.script in shown
    assert slurm.printed([behind]) == behind.script
    ours, theirs = arguments_of(before), arguments_of(behind)
    assert "stages=[plan,precache]" in ours and "stages=[plan,train,validate,export]" in theirs
    # One run: the batch of the training's 16 workers for both, and what the first has left is not removed.
    assert ours[-1] == theirs[-1] == "train.batch_size=16"
    assert "resume=auto" in theirs and "resume=auto" not in ours


def test_a_container_runs_ray_and_the_driver() -> None:
    (job,) = jobs("slurm.container=k5.sqsh", "slurm.container_kind=apptainer", "slurm.container_mounts=['/data:/data']")
    lines = job.script.splitlines()
    assert "export K5DIST_CONTAINER=k5.sqsh" in lines and "export K5DIST_CONTAINER_KIND=apptainer" in lines
    assert "export K5DIST_CONTAINER_MOUNTS=/data:/data" in lines
    assert not any(line.startswith("export K5DIST_PYTHON=") for line in lines), "the image has a Python of its own"


# What the script calls, each as the real one in what matters to it. The nodes' Python only listens, or waits.
STAND_INS = {
    "srun": """
name=
while [[ $1 == -* ]]; do case $1 in --job-name=*) name=${1#*=} ;; -w) shift ;; esac; shift; done
if [[ $name == k5dist-driver ]]; then echo $$ >"$K5_TEST/driver.pid"; fi
exec "$@" """,
    "squeue": "printf '%s\\n' '7.0 bash' '7.1 k5dist-ray' '7.3 k5dist-driver'",
    "scancel": """echo "scancel $*" >>"$K5_TEST/calls"; kill -USR1 "$(cat "$K5_TEST/driver.pid")" """,
    "scontrol": """echo "scontrol $*" >>"$K5_TEST/calls"; kill -KILL $PPID""",
    "python": f"""
case "$*" in
  *get_node_ip*) echo 127.0.0.1 ;;
  *ray.scripts*) touch "$K5_TEST/ray"; until [[ -e $K5_TEST/listen ]]; do sleep 0.05; done
    exec {sys.executable} -c "import os,signal,socket
s = socket.create_server(('127.0.0.1', int(os.environ['K5DIST_RAY_PORT'])))
signal.pause()" ;;
  *) trap 'exit 130' USR1; touch "$K5_TEST/began"; while :; do sleep 0.05; done ;;
esac""",
}


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_signal_reaches_the_driver_alone_and_the_job_queues_again(
    container: bool, begun: bool, tmp_path: Path
) -> None:
    """Also where it comes before there is a driver."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (job,) = jobs("cluster.nodes=1", *(["slurm.container=k5.sqsh"] if container else []))
    script = re.sub("^export K5DIST_PYTHON=.*$", "", job.script, flags=re.MULTILINE)
    number = str(os.getpid())  # the port is made of it
    allocation = {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1", "SLURM_NODEID": "0"}
    environment = {
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "K5_TEST": str(tmp_path), "SLURM_CPUS_ON_NODE": "1"},
        **allocation,
    }
    if begun:
        (tmp_path / "listen").touch()
    process = subprocess.Popen(
        ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until_there(tmp_path / ("began" if begun else "ray"))
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "queued again" in said
    signalled = ["scancel --signal=USR1 7.3"] if container and begun else []
    assert (tmp_path / "calls").read_text().splitlines() == [*signalled, f"scontrol requeue {number}"]
    assert (tmp_path / "began").exists() == begun


def until_there(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_steps_in_containers_share_what_ray_and_the_driver_meet_in(tmp_path: Path) -> None:
    """Pyxis gives each step a /tmp of its own."""
    (job,) = jobs("slurm.container=k5.sqsh", "slurm.container_mounts=['/data:/data']")
    head = job.script.partition("\nif [[ -n ${K5DIST_SWEEP")[0] + "\nprintf '%s\\n' \"${srun_options[@]}\"\n"
    done = subprocess.run(["bash"], input=head, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *("--container-image=k5.sqsh", f"--container-workdir={tmp_path}"),
        f"--container-mounts=/tmp:/tmp,{tmp_path}:{tmp_path},/data:/data",
    ]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("slurm.time=tomorrow", "slurm.time"),
        ("slurm.options=[-x]", "slurm.options"),
        ("slurm.container_kind=docker", "slurm.container_kind"),
        ("slurm.precache_nodes=0", "slurm.precache_nodes"),
        ("slurm.signal_seconds=0", "slurm.signal_seconds"),
        ("slurm.precache_gpus_per_node=-1", "slurm.precache_gpus_per_node"),
    ],
)
def test_what_slurm_could_not_take_is_refused_before(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose([*TINY, override]))
    assert caught.value.key == key


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch"):
        slurm.submit(jobs())


def test_a_printed_script_runs_when_it_is_submitted() -> None:
    (job,) = jobs("cluster.dry_run=true")
    assert not any("dry_run" in argument for argument in arguments_of(job))


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_what_is_not_submitted_has_no_dry_run(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"stages=\[plan\]"):
        to_run_config(compose(["+flavour=t2v-tiny", f"cluster={kind}", "cluster.dry_run=true"]))
