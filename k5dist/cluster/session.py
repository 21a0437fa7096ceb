"""A Ray session for the length of a run: one of our own on this machine, or a cluster that already runs."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from k5dist.config import ClusterConfig, ConfigError
from k5dist.config.cluster import is_secret_name

_ATTACH_SECONDS = 30
_NODES_SECONDS = 120
WAIT_NODES_VARIABLE = "K5DIST_WAIT_NODES"  # set where the nodes of an allocation come up one by one
_LONGEST_TEMPORARY = 30  # characters; Ray adds 73
_PROPAGATED = ("K5DIST_", "AWS_", "S3_", "FSSPEC_", "HF_", "CUDA_", "NCCL_", "GLOO_", "TORCH_", "OMP_")


@contextlib.contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Ray, initialised; on the way out it is shut down, and a session of our own leaves no process behind.

    Raises:
        ConfigError: when a cluster's address does not answer.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would otherwise pack the whole working folder when it finds a project file in it.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if config.kind == "local" and not config.address:
        cores = max(2, os.cpu_count() or 1)  # precache streams through at least two workers
        ray.init(address="local", include_dashboard=False, num_cpus=cores, _temp_dir=_short_folder(), **quiet)
    else:
        _attach(config.address or os.environ.get("RAY_ADDRESS", "auto"), quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _short_folder() -> str | None:
    """Ray puts sockets below the temporary folder, and a socket's path has at most 107 bytes."""
    if len(tempfile.gettempdir()) <= _LONGEST_TEMPORARY:
        return None
    folder = f"/tmp/ray-{os.getuid()}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def _attach(address: str, options: dict[str, Any]) -> None:
    """`ray.init` on an address that does not answer retries for minutes; a person wants to know sooner."""
    failure: list[BaseException] = []

    def reach() -> None:
        try:
            from ray._private.services import canonicalize_bootstrap_address_or_die
            from ray._raylet import GcsClient

            GcsClient(address=canonicalize_bootstrap_address_or_die(address)).get_all_node_info(timeout=10)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=reach, daemon=True)
    thread.start()
    thread.join(_ATTACH_SECONDS)
    if thread.is_alive() or failure:
        reason = str(failure[0]).splitlines()[0] if failure else f"no answer in {_ATTACH_SECONDS} s"
        fix = "start one with `ray start --head`, or set cluster.address=<host:port>, or cluster=local"
        if failure and type(failure[0]).__name__ == "AuthenticationError":
            fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file with the cluster's token>"
        raise ConfigError("cluster.address", address, f"a Ray cluster must run there ({reason})", fix)
    import ray

    # Ray stores and logs a job's environment: what is secret stays in the nodes' own environment or profile.
    # A job of the Jobs API has one of its own, of which ours says the same.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    environment = {k: v for k, v in os.environ.items() if k.startswith(_PROPAGATED) and not is_secret_name(k)}
    ray.init(address=address, runtime_env={"env_vars": environment}, **options)
    _wait_for_nodes(int(os.environ.get(WAIT_NODES_VARIABLE, "1")))


def _wait_for_nodes(wanted: int) -> None:
    """Precache sizes itself by what is there, so it begins when all nodes are."""
    import ray

    deadline = time.monotonic() + _NODES_SECONDS
    while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            rule = f"the allocation has {wanted} nodes, and Ray came up on {alive} of them in {_NODES_SECONDS} s"
            raise ConfigError("cluster.nodes", wanted, rule, "look for Ray's last lines below; try again")
        time.sleep(0.2)
