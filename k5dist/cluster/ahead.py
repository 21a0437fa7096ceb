"""The next run's precache beside a training, on what the training's gang leaves free (`cluster.overlap`).

It lives as long as a gang is in its place and not a moment longer: it begins once the gang's placement group is held,
so that it can take nothing of that, and is ended before the gang is placed anew or the run goes on, so that nobody
waits for it. Ending is killing: precache is idempotent, and the next run's own precache, on all GPUs, goes on from what
is there. For the same reason a failure is only told here; the run's own turn meets it again and deals with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from k5dist.cluster.generated import ensure_generated
from k5dist.cluster.record import refuse_second
from k5dist.cluster.session import ray_session
from k5dist.config import ConfigError
from k5dist.console import say
from k5dist.plan import RunPlan
from k5dist.precache.pipeline import check_source, precache
from k5dist.retry import one_line

_LEAST_CPUS = 2  # an encoder (or what feeds it) and a decoder


@dataclasses.dataclass(frozen=True)
class Room:
    """CPU cores and GPUs of a Ray cluster: a training's, and those beside it."""

    taken_cpus: int
    taken_gpus: int
    spare_cpus: int
    spare_gpus: int

    @classmethod
    def beside(cls, training: RunPlan) -> Room:
        """By what the cluster has now. Ray counts a core for a gang's node; a worker keeps at least one busy."""
        total, size = ray.cluster_resources(), training.world.size
        gpus = size if training.world.device == "cuda" else 0
        cpus = size + 1  # and one for the decoder of validation videos
        return cls(cpus, gpus, max(0, int(total.get("CPU", 0)) - cpus), max(0, int(total.get("GPU", 0)) - gpus))

    def suffices(self, plan: RunPlan) -> bool:
        return self.spare_cpus >= _LEAST_CPUS and (plan.world.device == "cpu" or self.spare_gpus >= 1)


def check_room_beside(training: RunPlan, plan: RunPlan) -> None:
    """Raises ConfigError where the cluster has nothing to spare for the precache of `plan` while `training` trains."""
    with ray_session(training.config.cluster):
        room = Room.beside(training)
    if room.suffices(plan):
        return
    wanted = "a GPU and " if plan.world.device == "cuda" else ""
    rule = (
        f"beside the training ({room.taken_gpus} GPUs, {room.taken_cpus} cores) the Ray cluster has {room.spare_gpus} "
        f"GPUs and {room.spare_cpus} cores; a precache needs {wanted}{_LEAST_CPUS} cores"
    )
    fix = "cluster.overlap=false, a larger cluster, or a smaller training (cluster.nodes, cluster.workers_per_node)"
    raise ConfigError("cluster.overlap", True, rule, fix)


@ray.remote(num_cpus=0)
class _Precache:
    def run(self, plan: RunPlan, room: Room) -> str:
        """What it saw and did, in a line."""
        from ray.data import DataContext, ExecutionResources

        # Ray Data would plan with the whole cluster, and share out what others hold.
        options = DataContext.get_current().execution_options
        options.exclude_resources = ExecutionResources(cpu=room.taken_cpus, gpu=room.taken_gpus)
        refuse_second(plan.run_uri)  # it may have been begun by itself
        ensure_generated(plan)
        return precache(plan, check_source(plan)).rows()[0][1]


class Ahead:
    """The precache of `plan`, if there is one, beside the gang of `training`. From one thread."""

    def __init__(self, plan: RunPlan | None, training: RunPlan) -> None:
        self.plan, self.training = plan, training
        self._actor: Any = None
        self._end: Any = None

    @contextlib.contextmanager
    def beside_gang(self) -> Iterator[None]:
        """Within, the gang is in its place. Once the precache has come to its end it is not begun again."""
        self._start()
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # a session that is lost is the gang's affair
                self.tell()
            self.stop()

    def _start(self) -> None:
        if self.plan is None:
            return
        room = Room.beside(self.training)
        if not room.suffices(self.plan):  # the cluster is not what it was
            say(f"no room for the precache of {self.plan.name} beside this training")
            return
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._actor = _Precache.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._end = self._actor.run.remote(resized(self.plan, room.spare_gpus), room)
        what = f"{room.spare_gpus} GPUs" if self.plan.world.device == "cuda" else f"{room.spare_cpus} cores"
        say(f"meanwhile, on {what} beside the training: precache of {self.plan.name}")

    def tell(self) -> None:
        """Say how it ended, once it has; does not wait."""
        if self._end is None or not ray.wait([self._end], timeout=0)[0]:
            return
        assert self.plan is not None
        try:
            said = f"meanwhile, done: precache of {self.plan.name}: {ray.get(self._end)}"
        except Exception as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            said = f"meanwhile, the precache of {self.plan.name} failed, which its own turn deals with: "
            said += one_line(cause) if isinstance(cause, BaseException) else str(error).splitlines()[0]
        say(said)
        self.plan, self._end = None, None

    def stop(self) -> None:
        """End it and all that it started: Ray ends the tasks and actors of an actor that is gone."""
        if self._actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._actor)
            self._actor = self._end = None


def resized(plan: RunPlan, gpus: int) -> RunPlan:
    """The same with as many precache workers as the spare GPUs have room for. What is encoded, and how it lies in the
    cache, does not depend on that."""
    if plan.world.device != "cuda":
        return plan
    world = dataclasses.replace(plan.world, nodes=1, workers_per_node=gpus)
    config = plan.config.precache
    fewer = {
        name: min(workers, int(1 / share + 1e-9) * gpus)
        for name, workers, share in (
            ("vae_workers", config.vae_workers, config.vae_gpus),
            ("text_workers", config.text_workers, config.text_gpus),
        )
        if workers is not None
    }
    config = dataclasses.replace(config, **fewer)
    return dataclasses.replace(plan, world=world, config=dataclasses.replace(plan.config, precache=config))
