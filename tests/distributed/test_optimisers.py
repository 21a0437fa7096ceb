"""Every optimiser on FSDP2's shards: two workers are one, and what is saved goes on to the bit.

One start of two workers trains all kinds one after the other, on a model whose rows do not divide evenly; one worker
does the same here. Whole runs of single kinds are beside them.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from k5dist import export
from k5dist.compose import compose, to_run_config
from k5dist.config import OPTIMIZERS, OptimizerConfig
from k5dist.plan import RunPlan
from k5dist.train.optimiser import make_optimiser, optimiser_tensors
from k5dist.train.validate import probe_uri, read_tensors
from tests.distributed.gangs import Result, assert_close, make_run
from tests.distributed.gangs import train as train_runs
from tests.distributed.test_training import continued

pytestmark = pytest.mark.timeout(300)

KINDS = [kind for kind in OPTIMIZERS if kind != "adamw_bf16"]  # whose rounding draws by shard
STEPS = 4
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = nn.Linear(300, 17), nn.Linear(17, 300, bias=False)
        self.tiny = nn.Linear(4, 1)  # one row: a worker is left without any


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.visual_transformer_blocks = nn.Linear(3, 5), nn.ModuleList([Block()])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def optimizer_config(kind: str) -> OptimizerConfig:
    rate = 1 if kind == "prodigy" else 1e-2
    base = ["+flavour=t2v-tiny", f"optimizer.kind={kind}", f"optimizer.lr={rate}", "optimizer.prodigy_d0=1e-3"]
    return to_run_config(compose([*base, "optimizer.warmup_steps=0", "optimizer.weight_decay=0.1"])).optimizer


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return gradient
    mesh = parameter.device_mesh
    part, rank = list(gradient.chunk(mesh.size(mesh.ndim - 1))), mesh.get_local_rank(mesh.ndim - 1)
    own = part[rank] if rank < len(part) else gradient[:0]
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def take(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = like(torch.randn(parameter.shape, generator=generator), parameter)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def trained(kind: str, folder: Path) -> dict[str, Tensor]:
    """Weights (and an average's) after STEPS steps; in a group of workers sharded, saved half-way and gone on from."""
    config = optimizer_config(kind)
    model = sharded(Model())
    optimiser = make_optimiser(model, config, CPU)
    take(model, optimiser, range(STEPS // 2))
    state = {"model": dict(model.named_parameters()), "optimizer": optimiser_tensors(model, optimiser)}
    if dist.is_initialized():
        dcp.save(state, checkpoint_id=folder / kind)
    take(model, optimiser, range(STEPS // 2, STEPS))
    result = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if dist.is_initialized():
        assert_resumed(kind, folder / kind, result)
    average = getattr(optimiser, "average", lambda: None)()
    if average is not None:
        with torch.no_grad():
            for parameter, value in average.items():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(value)
        result |= {f"average {name}": whole(parameter) for name, parameter in model.named_parameters()}
    return result


def sharded(model: nn.Module) -> nn.Module:
    if dist.is_initialized():
        size = dist.get_world_size()
        # Of four, two replicas of two shards.
        mesh = init_device_mesh("cpu", (2, 2)[: size // 2], mesh_dim_names=("replicate", "shard")[-(size // 2) :])
        for block in model.get_submodule("visual_transformer_blocks").children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def assert_resumed(kind: str, folder: Path, result: dict[str, Tensor]) -> None:
    model = sharded(Model())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimiser = make_optimiser(model, optimizer_config(kind), CPU)
    state = {"model": dict(model.named_parameters()), "optimizer": optimiser_tensors(model, optimiser)}
    dcp.load(state, checkpoint_id=folder)
    take(model, optimiser, range(STEPS // 2, STEPS))
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), result[name]), f"{kind}: {name} after a resume"


def _worker(rank: int, folder: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
    results = {kind: trained(kind, Path(folder) / str(size)) for kind in KINDS}
    if rank == 0:
        torch.save(results, Path(folder) / str(size) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("optimisers")
    mp.spawn(_worker, (str(folder), 2), nprocs=2)
    return folder / "2", torch.load(folder / "2" / "results.pt")


def test_replicas_of_shards_update_as_shards_alone(
    tmp_path: Path, on_two: tuple[Path, dict[str, dict[str, Tensor]]]
) -> None:
    """Two by two workers: sums are over the shards, and what replicas hold alike counts once."""
    mp.spawn(_worker, (str(tmp_path), 4), nprocs=4)
    for kind, tensors in torch.load(tmp_path / "4" / "results.pt").items():
        for name, value in tensors.items():
            assert torch.equal(value, on_two[1][kind][name]), f"{kind}: {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_update_as_one(kind: str, on_two: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    folder, results = on_two
    alone, start = trained(kind, folder), dict(Model().named_parameters())
    assert set(alone) == set(results[kind])
    assert ("average embedding.weight" in alone) == (kind == "adamw_schedulefree")
    for name, value in alone.items():
        torch.testing.assert_close(results[kind][name], value, rtol=1e-5, atol=1e-6)
        before = start[name.removeprefix("average ")]
        assert not torch.allclose(value, before, rtol=0, atol=1e-4), f"{name} moved"


@pytest.mark.parametrize("kind", KINDS)
def test_one_worker_goes_on_from_two(kind: str, on_two: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    folder, results = on_two
    model = Model()
    optimiser = make_optimiser(model, optimizer_config(kind), CPU)
    state = {"model": dict(model.named_parameters()), "optimizer": optimiser_tensors(model, optimiser)}
    dcp.load(state, checkpoint_id=folder / kind, no_dist=True)
    take(model, optimiser, range(STEPS // 2, STEPS))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), results[kind][name], rtol=1e-5, atol=1e-6)


# Whole runs

FULL = ("adapter=full", "checkpoint.every=4", "checkpoint.keep=2", "stages=[train,validate]", "data.held_out=0.2")
FULL += ("validation.every=4", "validation.prompts=[]", "validation.timesteps=2")
RUNS = {
    "ema": (
        *("ema.enabled=true", "ema.decay=0.5", "ema.update_after=1", "ema.device=host", "optimizer.lr=3e-3"),
        *("train.timestep_sampling=uniform", "train.loss_weighting=cosmap", "train.timestep_shift=3"),
    ),
    "schedulefree": (
        *("optimizer.kind=adamw_schedulefree", "optimizer.lr=3e-3", "train.timestep_sampling=beta"),
        "optimizer.groups=[{match:cross_attention,lr_scale:0.5},{match:modulation,weight_decay:0}]",
    ),
    "muon": (
        *("optimizer.kind=muon", "optimizer.lr=3e-3", "train.timestep_stratified=true", "train.timestep_sampling=mode"),
        *("train.timestep_shift=resolution", "train.timestep_shift_reference=[61,64,96]", "train.loss=huber"),
        *("train.loss_weighting=min_snr", "train.caption_dropout=0.5", "train.unconditional=negative"),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(root: Path, tiny_t2v: Path) -> dict[str, tuple[RunPlan, Result]]:
    plans = [make_run(root, tiny_t2v, name, *FULL, *settings) for name, settings in RUNS.items()]
    return dict(zip(RUNS, zip(plans, train_runs(*plans), strict=True), strict=True))


def test_what_a_rule_freezes_counts_for_no_norm(root: Path, tiny_t2v: Path) -> None:
    """Of the first step, taken at the same weights: what is frozen in one run and what is in the other make up all."""
    settings = ("adapter=full", "train.steps=1", "data.held_out=0", "stages=[train]", "validation.every=0")
    rules = {"all": "[]", "attention": "[{match:attention,lr_scale:0}]"}
    rules["others"] = "[{match:attention,lr_scale:1},{match:'.',lr_scale:0}]"
    plans = [
        make_run(root, tiny_t2v, f"frozen-{name}", *settings, f"optimizer.groups={rule}")
        for name, rule in rules.items()
    ]
    whole_norm, without, alone = (result.norms[1] for result in train_runs(*plans))
    assert 0 < without < whole_norm and 0 < alone < whole_norm
    assert without**2 + alone**2 == pytest.approx(whole_norm**2, rel=1e-4)


def validation_losses(result: Result) -> dict[int, float]:
    return {event["step"]: event["losses"]["loss"] for event in result.events("validation")}


def test_runs_on_two_workers_validate_as_on_one(
    root: Path, tiny_t2v: Path, runs: dict[str, tuple[RunPlan, Result]]
) -> None:
    plans = [make_run(root, tiny_t2v, f"{name}-2", *FULL, *settings, workers=2) for name, settings in RUNS.items()]
    # One after the other: two workers each are enough for the machines that run this.
    for (plan, alone), (sharded_run,) in zip(runs.values(), map(train_runs, plans), strict=True):
        assert sorted(alone.losses) == [1, 2, 3, 4, 5, 6], plan.name
        assert_close(sharded_run.losses, alone.losses, 1e-4)
        assert_close(validation_losses(sharded_run), validation_losses(alone), 1e-4)
        assert sorted(validation_losses(alone)) == [0, 4, 6]


def test_runs_go_on_to_the_bit(root: Path, tiny_t2v: Path, runs: dict[str, tuple[RunPlan, Result]]) -> None:
    plans = [
        continued(runs[name][0], make_run(root, tiny_t2v, f"{name}-on", *FULL, *settings), [4])
        for name, settings in RUNS.items()
    ]
    for (_, undisturbed), resumed in zip(runs.values(), train_runs(*plans), strict=True):
        assert resumed.losses == {step: undisturbed.losses[step] for step in (5, 6)}
        assert validation_losses(resumed)[6] == validation_losses(undisturbed)[6]


def test_what_is_exported_is_what_was_validated(runs: dict[str, tuple[RunPlan, Result]]) -> None:
    """The probe is sampled with the average's weights, and the raw ones would not give it."""
    for name, weights in (("ema", "ema"), ("schedulefree", "average"), ("muon", "raw")):
        plan = runs[name][0]
        report = export.export_run(plan)
        assert report.weights == weights
        assert report.error <= report.tolerance < report.difference_to_base
    plan = runs["ema"][0]
    raw = dataclasses.replace(plan.config.ema, export=False)
    report = export.export_run(dataclasses.replace(plan, config=dataclasses.replace(plan.config, ema=raw)))
    assert report.weights == "raw"
    assert report.error <= report.tolerance
    probe = read_tensors(probe_uri(plan))
    distance = (probe["latents"] - probe["latents.raw"]).norm() / probe["latents"].norm()
    assert float(distance) > 3 * report.tolerance, "each export is told from the other"


def test_losses_are_those_of_the_averages_weights(
    root: Path, tiny_t2v: Path, runs: dict[str, tuple[RunPlan, Result]]
) -> None:
    """With all of the average's updates to come, the average is the base: its validation losses are step 0's."""
    still = ("ema.enabled=true", "ema.decay=0.999999", "optimizer.lr=3e-3")
    (result,) = train_runs(make_run(root, tiny_t2v, "still", *FULL, *still, workers=2))
    losses = validation_losses(result)
    assert losses[6] == pytest.approx(losses[0], rel=1e-4)
    assert abs(validation_losses(runs["ema"][1])[6] / losses[0] - 1) > 1e-3
