"""The training gang: one torchrun agent a node on a Ray placement group, its output streamed to the driver.

torchrun itself restarts nothing. When a worker or a node dies the whole gang is stopped and started again, under a new
rendezvous, from the newest checkpoint: one policy that is right whichever node died.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from k5dist.cluster.load import node_load
from k5dist.cluster.network import VARIABLES, socket_variables
from k5dist.config import ConfigError
from k5dist.events import line_of
from k5dist.plan import RunPlan

WORKER_MODULE = "k5dist.train.worker"
_BATCH_SECONDS = 0.1
_LOAD_SECONDS = 5
_STOPPED = 130  # exit status of an agent that was asked to stop before it began
# What Ray and an outer torchrun leave in the environment would mislead the inner one.
_STRIPPED = ("RAY_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_")


@dataclass(frozen=True)
class Launch:
    """What every agent of one attempt is told."""

    plan_uri: str
    nodes: int
    workers_per_node: int
    endpoint: str
    attempt_id: str
    interface: str | None


@ray.remote
class Agent:
    """A node's torchrun agent: starts it, streams its lines, passes on signals."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.stopping = False
        self.logs = tempfile.TemporaryDirectory(prefix="k5dist-torchrun-")

    def endpoint(self) -> str:
        import socket

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, launch: Launch, is_host: bool) -> Iterator[list[str] | int]:
        """Yields lists of lines as they come, and the exit status last."""
        address = ray.util.get_node_ip_address()
        environment = _environment(launch, address)
        if launch.nodes > 1:
            chosen = ", ".join(f"{name}={environment[name]}" for name in VARIABLES if name in environment)
            network = chosen or "no interface has this address: set cluster.interface"
            yield [line_of("node", node=address, network=network)]
        if self.stopping:
            yield _STOPPED
            return
        self.process = subprocess.Popen(
            _torchrun(launch, is_host, address, self.logs.name),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 (no other thread holds a lock that it needs)
        )
        if self.stopping:  # asked in between
            self._end()
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(self.process.stdout, lines), daemon=True).start()
        ended = False
        while not ended:
            batch = []
            line = lines.get()
            deadline = time.monotonic() + _BATCH_SECONDS
            while line is not None:
                batch.append(line)
                try:
                    line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
            else:
                ended = True
            if batch:
                yield batch
        yield self.process.wait()

    def ask_to_stop(self) -> None:
        """Signal the workers (not torchrun, which would kill them): they save and end at the next step. Before there
        are any, there is nothing to save, and none shall begin."""
        self.stopping = True
        workers = self._workers()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGUSR1)
        if not workers:
            self._end()

    def kill(self) -> None:
        """End everything this agent started."""
        self.logs.cleanup()
        self._end()

    def _end(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            for process in [*agent.children(recursive=True), agent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def load(self) -> dict[str, Any]:
        return {"node": ray.util.get_node_ip_address(), **node_load()}

    def _workers(self) -> list[psutil.Process]:
        if self.process is None or self.process.poll() is not None:
            return []
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if WORKER_MODULE in " ".join(_command_line(child))]


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _die_with_parent() -> None:
    from k5dist.train.signals import die_with_parent

    # Ray blocks SIGINT in what it starts, and a blocked signal stays blocked in children.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_parent()


def _pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _torchrun(launch: Launch, is_host: bool, address: str, log_folder: str) -> list[str]:
    options = [
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={launch.workers_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.endpoint}",
        f"--rdzv-id={launch.attempt_id}",
        f"--rdzv-conf=is_host={'true' if is_host else 'false'},join_timeout=120,last_call_timeout=5",
        f"--local-addr={address}",
        "--max-restarts=0",
        "--monitor-interval=0.2",
        "--tee=3",
        f"--log-dir={log_folder}",
    ]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", WORKER_MODULE, launch.plan_uri]


def _environment(launch: Launch, address: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_STRIPPED)}
    # Workers that each take every core would only wait for each other; a job's share may be less than the machine.
    threads = max(1, len(os.sched_getaffinity(0)) // launch.workers_per_node)
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a shared store keeps stale keys over restarts
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
    }
    return {**kept, **fixed, **socket_variables(launch.nodes, address, launch.interface, kept)}


def check_room(plan: RunPlan) -> None:
    """Wait for the nodes and GPUs of the training, or of a precache alone, and leave them free again.

    Raises:
        ConfigError: when they are not there within `cluster.wait_seconds`.
    """
    world = plan.world
    trains = "train" in plan.config.stages or "validate" in plan.config.stages
    nodes, workers = (world.nodes, world.workers_per_node) if trains else (1, 1)
    remove_placement_group(_placed(plan, nodes, workers))


def _placed(plan: RunPlan, nodes: int, workers: int) -> PlacementGroup:
    """A bundle a node, each on another; raises ConfigError where the cluster cannot give them in time."""
    bundle: dict[str, float] = {"CPU": 1, **({"GPU": workers} if plan.world.device == "cuda" else {})}
    strategy = "STRICT_SPREAD" if nodes > 1 else "STRICT_PACK"
    seconds = plan.config.cluster.wait_seconds
    group = placement_group([bundle] * nodes, strategy=strategy)
    try:
        if ray.wait([group.ready()], timeout=seconds)[0]:
            return group
        have = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        alive = sum(node["Alive"] for node in ray.nodes())
        wanted = f"{nodes} node(s) with {bundle} each"
        rule = f"the Ray cluster could not give {wanted} within {seconds} s (free: {have} on {alive} nodes)"
        fix = "ask for less, add nodes, or wait longer with cluster.wait_seconds"
        raise ConfigError("cluster.nodes", nodes, rule, fix)
    except BaseException:
        remove_placement_group(group)
        raise


class Gang:
    """The placement group and its agents; a context manager that leaves nothing running."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._group: PlacementGroup | None = None
        self._agents: list[Any] = []
        self._pieces: queue.Queue[Any] = queue.Queue()
        self.started = False  # `output` will come to an end

    def __enter__(self) -> Gang:
        world = self.plan.world
        self._group = _placed(self.plan, world.nodes, world.workers_per_node)
        gpus = world.workers_per_node if world.device == "cuda" else 0
        try:
            for i in range(world.nodes):
                place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i)
                options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 4, "scheduling_strategy": place}
                self._agents.append(Agent.options(**options).remote())  # type: ignore[attr-defined]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self._agents:
            with contextlib.suppress(Exception):
                ray.get(agent.kill.remote(), timeout=10)
            with contextlib.suppress(Exception):
                ray.kill(agent)
        self._agents = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def ask_to_stop(self) -> None:
        ray.get([agent.ask_to_stop.remote() for agent in self._agents], timeout=30)

    def loads(self) -> list[dict[str, Any]]:
        """How busy the nodes are, the first one's first."""
        return ray.get([agent.load.remote() for agent in self._agents], timeout=_LOAD_SECONDS)

    def start(self) -> None:
        """Begin one attempt; `output` follows it."""
        world = self.plan.world
        endpoint: Any = ray.get(self._agents[0].endpoint.remote())
        interface = self.plan.config.cluster.interface
        attempt = uuid.uuid4().hex[:12]
        launch = Launch(self.plan.plan_uri, world.nodes, world.workers_per_node, endpoint, attempt, interface)
        streams = {
            agent.run.options(num_returns="streaming").remote(launch, i == 0): i for i, agent in enumerate(self._agents)
        }
        # On a thread, so that Ctrl-C interrupts the main thread between lines and never within a call into Ray.
        threading.Thread(target=_collect, args=(streams, self._pieces), daemon=True).start()
        self.started = True

    def output(self) -> Iterator[str | int | None]:
        """Every line of every node; the exit status last, and None where nothing comes for half a second.

        May be left and entered again.

        Raises:
            ray.exceptions.RayActorError: when a node or its agent is lost.
        """
        while True:
            try:
                piece = self._pieces.get(timeout=0.5)
            except queue.Empty:
                yield None
                continue
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, int):
                return


def _collect(streams: dict[Any, int], pieces: queue.Queue[Any]) -> None:
    """Put what the agents yield into `pieces`: lines, and in the end the first bad status, 0, or the error."""
    try:
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, fetch_local=False)
            stream: Any
            for stream in ready:
                try:
                    piece: Any = ray.get(next(stream))
                except StopIteration:
                    del streams[stream]
                    continue
                if isinstance(piece, int):
                    if piece:  # the others would wait for the lost ones until their collectives time out
                        pieces.put(abs(piece))
                        return
                else:
                    for line in piece:
                        pieces.put(line)
    except BaseException as error:
        pieces.put(error)
        return
    pieces.put(0)
