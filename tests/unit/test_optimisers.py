"""The optimisers against their reference implementations and plain formulas, and what all of them keep."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor, nn

from k5dist.compose import compose, to_run_config
from k5dist.config import OPTIMIZERS, ConfigError, OptimizerConfig
from k5dist.train.adamw8bit import AdamW8bit, codebook, dequantise, quantise
from k5dist.train.adaptive import ScheduleFreeAdamW
from k5dist.train.muon import orthogonalise, shard_rows
from k5dist.train.optimiser import SHARED, make_optimiser, optimiser_tensors, parameter_groups, set_learning_rate

CPU = torch.device("cpu")
BLOCK = "visual_transformer_blocks"


def config(kind: str, *overrides: str) -> OptimizerConfig:
    base = [f"optimizer.kind={kind}", f"optimizer.lr={1 if kind == 'prodigy' else 1e-2}", "optimizer.warmup_steps=0"]
    return to_run_config(compose(["+flavour=t2v-tiny", "optimizer.weight_decay=0.1", *base, *overrides])).optimizer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = nn.Linear(300, 20, bias=True)  # rows of one block and a part
        self.visual_modulation = nn.Linear(6, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_layer = nn.Linear(8, 6)
        self.visual_transformer_blocks = nn.ModuleList([Block()])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def gradients(model: nn.Module, steps: range) -> Iterator[int]:
    """Each step's number, with gradients of its own set."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        yield step


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for _ in gradients(model, steps):
        torch.manual_seed(0)
        optimiser.step()


def assert_equal(ours: nn.Module, theirs: nn.Module, atol: float) -> None:
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=atol)


def references(model: nn.Module, kind: str, c: OptimizerConfig) -> torch.optim.Optimizer:
    weights = list(model.parameters())
    shared: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
    if kind == "adafactor":
        return torch.optim.Adafactor(weights, lr=c.lr, weight_decay=c.weight_decay)
    if kind == "prodigy":
        return prodigyopt.Prodigy(weights, **shared, use_bias_correction=True, d0=c.prodigy_d0)
    assert kind == "adamw_schedulefree"
    return schedulefree.AdamWScheduleFree(weights, **shared)


@pytest.mark.parametrize("kind", ["adafactor", "prodigy", "adamw_schedulefree"])
def test_an_optimiser_is_its_reference_implementation(kind: str) -> None:
    ours, theirs, c = Model(), Model(), config(kind)
    start = copy.deepcopy(ours)
    optimiser, reference = make_optimiser(ours, c, CPU), references(theirs, kind, c)
    if isinstance(reference, schedulefree.AdamWScheduleFree):
        reference.train()
    train(ours, optimiser, range(12))
    train(theirs, reference, range(12))
    assert_equal(ours, theirs, 2e-6)
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), start.parameters(), strict=True))
    assert moved > (1e-5 if kind == "prodigy" else 1e-3)
    if isinstance(optimiser, ScheduleFreeAdamW) and isinstance(reference, schedulefree.AdamWScheduleFree):
        reference.eval()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(optimiser.average()[parameter], other.detach(), rtol=1e-5, atol=2e-6)
            assert not torch.equal(optimiser.average()[parameter], parameter)


def test_prodigys_estimate_grows_with_gradients_that_agree() -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)  # away from zero, first steps of 1e-6 are rounded by a tenth, each way its own
    theirs = copy.deepcopy(model)
    c = config("prodigy", "optimizer.warmup_steps=5")
    optimiser = make_optimiser(model, c, CPU)
    options: dict[str, Any] = {"betas": c.betas, "weight_decay": c.weight_decay}
    reference = prodigyopt.Prodigy(theirs.parameters(), **options, use_bias_correction=True, safeguard_warmup=True)
    for step in range(1, 40):
        for rates in (optimiser, reference):
            set_learning_rate(rates, min(1.0, step / 5))
        for module, one in ((model, optimiser), (theirs, reference)):
            one.zero_grad()
            (module(torch.ones(1, 4)) - 30).abs().sum().backward()
            one.step()
    assert_equal(model, theirs, 1e-5)
    found = float(optimiser_tensors(model, optimiser)[SHARED]["d"])
    assert found == pytest.approx(reference.param_groups[0]["d"], rel=1e-5)
    assert found > 1e3 * c.prodigy_d0


def test_adafactor_with_a_rate_of_its_own() -> None:
    """The paper's algorithm without relative steps, one weight, one step: U = G / √(R Cᵀ / mean R)."""
    layer = nn.Linear(5, 3, bias=False)
    before = layer.weight.detach().clone()
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    layer.weight.grad = gradient
    c = config("adafactor", "optimizer.adafactor_relative_lr=false", "optimizer.weight_decay=0")
    make_optimiser(layer, c, CPU).step()
    row, column = gradient.square().mean(1, keepdim=True), gradient.square().mean(0, keepdim=True)
    update = gradient / (row * column / row.mean()).sqrt()
    expected = before - c.lr * update / max(1.0, float(update.square().mean().sqrt()))
    torch.testing.assert_close(layer.weight.detach(), expected)


# Muon


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((6, 20), (20, 6), (8, 8)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        found = torch.linalg.svd(orthogonalise(matrix, torch.float64), full_matrices=False)
        assert float(found.S.min()) > 0.6 and float(found.S.max()) < 1.25, s
        turned = u.T @ orthogonalise(matrix, torch.float64) @ vh.T  # by odd powers: the singular vectors stay
        torch.testing.assert_close(turned, turned.diag().diag(), rtol=0, atol=1e-8)


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere() -> None:
    ours, theirs, c = Model(), Model(), config("muon")
    matrix = theirs.get_parameter(f"{BLOCK}.0.feed_forward.weight")
    rest = [parameter for parameter in theirs.parameters() if parameter is not matrix]
    options: dict[str, Any] = {"lr": c.lr, "weight_decay": c.weight_decay}
    muon = torch.optim.Muon([matrix], **options, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, **options, betas=(0.9, 0.99))
    optimiser = make_optimiser(ours, c, CPU, torch.bfloat16)
    for _ in range(3):
        for module, optimisers in ((ours, [optimiser]), (theirs, [muon, adamw])):
            for _ in gradients(module, range(4)):
                for one in optimisers:
                    one.step()
    assert_equal(ours, theirs, 3e-5)  # torch divides by the norm after rounding to bf16
    tensors = optimiser_tensors(ours, optimiser)
    assert set(tensors[f"{BLOCK}.0.feed_forward.weight"]) == {"momentum"}
    for name in ("out_layer.weight", f"{BLOCK}.0.visual_modulation.weight", f"{BLOCK}.0.feed_forward.bias"):
        assert set(tensors[name]) == {"exp_avg", "exp_avg_sq"}


def test_muon_without_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="Muon orthogonalises matrices"):
        make_optimiser(nn.Linear(4, 4), config("muon"), CPU)


@pytest.mark.parametrize(("rows", "size"), [(7, 2), (8, 4), (3, 4), (5, 4), (1, 1)])
def test_rows_are_shared_as_torch_chunks_them(rows: int, size: int) -> None:
    chunks = [len(chunk) for chunk in torch.zeros(rows, 2).chunk(size)]
    assert shard_rows(rows, size) == chunks + [0] * (size - len(chunks))


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebook_is_the_dynamic_map(signed: bool) -> None:
    book = codebook(signed, CPU)
    assert len(book) == 256 == len(book.unique())
    assert torch.equal(book, book.sort().values)
    assert (float(book[-1]), float(book.abs().min())) == (1.0, 0.0)
    # 64 fractions between 0.1 and 1 (128 without a sign), the first half a step above 0.1; half as many a power below.
    top = book[(book > 0.1) & (book < 1)]
    assert len(top) == (64 if signed else 128)
    torch.testing.assert_close(top[0], torch.tensor(0.1 + 0.45 / len(top)))
    assert int(((book > 0.01) & (book < 0.1)).sum()) == len(top) // 2
    assert (float(book[0]) < -0.9) == signed


@pytest.mark.parametrize("columns", [40, 256, 300, 512])
def test_codes_are_the_nearest_and_blocks_stay_in_their_row(columns: int) -> None:
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-6, 1, 0, 3, 1e4, 1]
    ).view(-1, 1)
    book = codebook(True, CPU)
    codes, scales = quantise(x, book)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert scales.shape == (6, -(-columns // 256))
    unit = x.double() / scales.double().repeat_interleave(256, 1)[:, :columns].clamp(min=1e-30)
    nearest = (unit[..., None] - book.double()).abs().min(-1).values
    torch.testing.assert_close((unit - book.double()[codes.int()]).abs(), nearest, rtol=0, atol=1e-6)
    back = dequantise(codes, scales, book)
    assert torch.equal(back[2], torch.zeros(columns))
    assert float((back - x).abs().div(scales.repeat_interleave(256, 1)[:, :columns].clamp(min=1e-30)).max()) < 0.01
    for part in (slice(0, 4), slice(4, 6)):
        assert torch.equal(quantise(x[part], book)[0], codes[part]), "rows can be sharded anywhere"


def test_8_bit_moments_stay_near_adamws() -> None:
    ours, theirs, c = Model(), Model(), config("adamw_8bit")
    optimiser, reference = make_optimiser(ours, c, CPU), make_optimiser(theirs, config("adamw"), CPU)
    assert isinstance(optimiser, AdamW8bit)
    start = copy.deepcopy(ours)
    train(ours, optimiser, range(10))
    train(theirs, reference, range(10))
    name = f"{BLOCK}.0.feed_forward.weight"
    moved = theirs.get_parameter(name) - start.get_parameter(name)
    error = (ours.get_parameter(name) - theirs.get_parameter(name)).norm() / moved.norm()
    assert 1e-5 < float(error.detach()) < 0.05
    state = optimiser_tensors(ours, optimiser)
    assert state[name]["exp_avg"].dtype == torch.uint8
    torch.testing.assert_close(ours.out_layer.weight, theirs.out_layer.weight, rtol=1e-5, atol=1e-6)
    assert state["out_layer.weight"]["exp_avg"].dtype == torch.float32, "few numbers are kept exactly"


# Every kind


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_making_the_state_moves_no_weight_and_a_loaded_one_goes_on_to_the_bit(kind: str) -> None:
    c = config(kind)
    through, stopped = Model(), Model()
    if kind == "adamw_bf16":
        through, stopped = through.bfloat16(), stopped.bfloat16()
    untouched = copy.deepcopy(stopped)
    optimiser = make_optimiser(stopped, c, CPU)
    optimiser_tensors(stopped, optimiser)
    for before, after in zip(untouched.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(before, after) and after.grad is None
    undisturbed = make_optimiser(through, c, CPU)

    def take(model: nn.Module, one: torch.optim.Optimizer, steps: range) -> None:
        for step in gradients(model, steps):
            torch.manual_seed(step)
            one.step()

    take(through, undisturbed, range(6))
    take(stopped, optimiser, range(3))
    resumed_model = copy.deepcopy(stopped)
    saved = copy.deepcopy(optimiser_tensors(stopped, optimiser))
    resumed = make_optimiser(resumed_model, c, CPU)
    for name, state in optimiser_tensors(resumed_model, resumed).items():
        assert set(state) == set(saved[name])
        for key, value in state.items():
            value.copy_(saved[name][key])
    take(resumed_model, resumed, range(3, 6))
    for ours, theirs in zip(resumed_model.parameters(), through.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(untouched.parameters(), through.parameters(), strict=True))


# Groups


def grouped(*overrides: str) -> dict[str, tuple[float, float]]:
    """Rate and decay by name."""
    model, c = Model(), config("adamw", *overrides)
    optimiser = make_optimiser(model, c, CPU)
    set_learning_rate(optimiser, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}


def test_groups_have_rates_and_decays_of_their_own() -> None:
    assert set(grouped().values()) == {(0.5, 0.1)}
    bare = grouped("optimizer.decay_norms_and_biases=false")
    assert {name: decay for name, (_, decay) in bare.items()} == {
        name: 0.0 if name.endswith("bias") else 0.1 for name in bare
    }
    rules = "[{match: feed_forward, lr_scale: 0.1, weight_decay: 0.2}, {match: 'weight$', lr_scale: 2}]"
    ruled = grouped(f"optimizer.groups={rules}", "optimizer.decay_norms_and_biases=false")
    assert ruled[f"{BLOCK}.0.feed_forward.weight"] == (pytest.approx(0.05), 0.2), "the first rule that finds it"
    assert ruled[f"{BLOCK}.0.feed_forward.bias"] == (pytest.approx(0.05), 0.2), "a rule is more than the bias's default"
    assert ruled["out_layer.weight"] == (1.0, 0.1)
    assert ruled["out_layer.bias"] == (0.5, 0.0)


def test_a_rule_that_finds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trained weight has such a name") as error:
        parameter_groups(Model(), config("adamw", "optimizer.groups=[{match: out_layer}, {match: cross_atention}]"))
    assert error.value.key == "optimizer.groups[1].match"


def test_a_group_at_a_rate_moves_by_it() -> None:
    model = Model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    c = config("adamw_schedulefree", "optimizer.weight_decay=0", "optimizer.groups=[{match: out_layer, lr_scale: 0.1}]")
    optimiser = make_optimiser(model, c, CPU)
    for step in gradients(model, range(1, 4)):
        set_learning_rate(optimiser, c.lr * step)
        optimiser.step()
    plain = Model()
    other = make_optimiser(plain, dataclasses.replace(c, groups=()), CPU)
    for step in gradients(plain, range(1, 4)):
        set_learning_rate(other, c.lr * step)
        other.step()
    ours, theirs = (
        model.out_layer.weight - start["out_layer.weight"],
        plain.out_layer.weight - start["out_layer.weight"],
    )
    torch.testing.assert_close(10 * ours, theirs, rtol=1e-3, atol=1e-5)
    name = f"{BLOCK}.0.feed_forward.weight"
    assert torch.equal(model.get_parameter(name), plain.get_parameter(name))


def tensors_of(kind: str) -> dict[str, dict[str, Tensor]]:
    model = Model()
    return optimiser_tensors(model, make_optimiser(model, config(kind), CPU))


def test_what_is_kept_is_as_small_as_is_said() -> None:
    name, count = f"{BLOCK}.0.feed_forward.weight", 6000
    sizes = {k: sum(t.nbytes for t in tensors_of(k)[name].values()) for k in OPTIMIZERS if k != "adamw_bf16"}
    assert sizes["adafactor"] == 4 * (20 + 300)
    assert sizes["adamw_8bit"] == 2 * (count + 4 * 20 * 2)
    assert sizes["muon"] == 4 * count
    assert sizes["prodigy"] == 16 * count
    assert sizes["adamw_schedulefree"] == 8 * count
