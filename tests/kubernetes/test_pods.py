"""A rendered RayJob's own command on real Ray: two raylets in the place of two pods."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from k5dist.cluster import manifests
from tests.kubernetes.plans import DEV, rayjob_of

HOME = Path(__file__).parents[2]
MISSING = [name for name in ("unshare", "ip") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)} (Debian: util-linux iproute2)"),
    pytest.mark.skipif(os.getuid() != 0, reason="name spaces need root"),
]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie below it, and their paths are bounded."""
    with tempfile.TemporaryDirectory(prefix="k5-", dir="/tmp") as folder:
        yield Path(folder)


def test_the_entrypoint_trains_and_ending_pods_save_a_checkpoint(short_folder: Path) -> None:
    root = short_folder / "runs"
    typed = [
        *(override for override in DEV if not override.startswith(("storage.root", "kubernetes.volumes"))),
        f"storage.root={root}", f"kubernetes.volumes=[runs:{root}]", "name=a-run", "stages=[plan,precache,train]",
        "train.steps=2000", "checkpoint.every=10000", """validation.prompts=["it's $HOME `a`"]""",
    ]  # fmt: skip
    rayjob = rayjob_of(*typed)
    cluster = rayjob["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    arguments = short_folder / "arguments.json"
    arguments.write_text(head["template"]["metadata"]["annotations"][manifests.ARGUMENTS_ANNOTATION])
    variables = [f"{v['name']}={v['value']}" for v in head["template"]["spec"]["containers"][0]["env"]]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HOME),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "K5DIST_TEST_HEAD": flags(head["rayStartParams"]),
        "K5DIST_TEST_HEAD_ENV": " ".join(variables),
        # KubeRay takes the cores from the pod's limits.
        "K5DIST_TEST_WORKER": flags({**workers["rayStartParams"], "num-cpus": limits["cpu"]}),
        "K5DIST_PROGRESS_SECONDS": "0",
    }
    entrypoint = rayjob["spec"]["entrypoint"].replace(manifests.ARGUMENTS_FILE, str(arguments))
    script = HOME / "tests" / "kubernetes" / "pods.sh"
    command = ["bash", script, short_folder, entrypoint, r"train: [0-9]*[5-9]/2000"]
    done = subprocess.run(
        command, cwd=short_folder, env=environment, capture_output=True, text=True, timeout=560, check=False
    )
    everything = f"{done.stdout}\n{done.stderr}\n{(short_folder / 'job.log').read_text()}"
    assert done.returncode == 0, everything
    assert "head: 0" in done.stdout, everything
    assert "worker: 0" in done.stdout, everything
    assert "stopped" in done.stdout.lower(), everything
    assert done.stdout.splitlines()[-1] == "0", f"no training worker is left:\n{everything}"
    saved = list((root / "runs" / "a-run" / "checkpoints").glob("step-*/COMMITTED"))
    assert len(saved) == 1, everything
    plan = json.loads((root / "runs" / "a-run" / "plan.json").read_text())
    assert plan["config"]["validation"]["prompts"] == ["it's $HOME `a`"]


def flags(parameters: dict[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in parameters.items())
