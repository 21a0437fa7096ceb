"""AdamW in bf16 with stochastic rounding: AdamW where nothing is rounded, and AdamW in the mean where it is."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from k5dist.compose import compose, to_run_config
from k5dist.config import OptimizerConfig
from k5dist.config.names import adapter_names, weight_names
from k5dist.model.dit import FP32_MODULES
from k5dist.model.transformer import build_transformer
from k5dist.model.weights import is_adapter
from k5dist.train.optimiser import make_optimiser, optimiser_tensors, set_learning_rate, trained_dtype
from k5dist.train.stochastic import StochasticAdamW, round_by_chance
from tests.unit.models import lora_config

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
CONFIG: OptimizerConfig = dataclasses.replace(
    to_run_config(compose(["+flavour=t2v-tiny", "optimizer.kind=adamw_bf16"])).optimizer,
    lr=1e-2,
    betas=(0.9, 0.99),
    eps=1e-8,
    weight_decay=0.1,
    warmup_steps=0,
)
SIGMAS = 5.0  # of the binomial's standard error; draws are seeded, so a test either holds always or never
DRAWS = 40_000


class Weights(nn.Module):
    """A matrix and a vector, of one type or of two."""

    def __init__(self, matrix: torch.dtype, vector: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(6, 5, generator=generator).to(matrix))
        self.vector = nn.Parameter(torch.randn(7, generator=generator).to(vector))


def update(model: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> None:
    """Update `number` with gradients and draws of its own, as a training step seeds them."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    set_learning_rate(optimiser, CONFIG.lr / number)
    torch.manual_seed(number)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def bits(tensor: Tensor) -> Tensor:
    """To compare by: zeros of either sign differ, and so would two NaNs' payloads."""
    return tensor.detach().clone().view(torch.int16 if tensor.dtype == BF16 else torch.int32)


def every_bf16() -> Tensor:
    """All 2¹⁶ but the NaNs."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(BF16)
    return values[~values.isnan()]


# The update


def test_fp32_weights_are_updated_as_by_torchs_adamw() -> None:
    ours, theirs = Weights(FP32, FP32), Weights(FP32, FP32)
    optimiser = make_optimiser(ours, CONFIG, CPU)
    assert isinstance(optimiser, StochasticAdamW)
    reference = make_optimiser(theirs, dataclasses.replace(CONFIG, kind="adamw"), CPU)
    assert isinstance(reference, torch.optim.AdamW)
    start = ours.matrix.detach().clone()
    for number in range(1, 9):
        update(ours, optimiser, number)
        update(theirs, reference, number)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    assert float((ours.matrix.detach() - start).abs().min()) > 1e-4, "every weight moved"


def test_bf16_weights_stay_near_torchs_adamw_and_keep_bf16_moments() -> None:
    ours, theirs = Weights(BF16, FP32), Weights(BF16, FP32).float()
    optimiser = make_optimiser(ours, CONFIG, CPU)
    reference = make_optimiser(theirs, dataclasses.replace(CONFIG, kind="adamw"), CPU)
    for number in range(1, 9):
        update(ours, optimiser, number)
        update(theirs, reference, number)
    # Eight roundings, each by less than a digit of 2⁻⁷; moments as exact as the rest.
    torch.testing.assert_close(ours.matrix.float(), theirs.matrix, rtol=8 * 2**-7, atol=1e-3)
    tensors = optimiser_tensors(ours, optimiser)
    assert {(name, key): value.dtype for name, state in tensors.items() for key, value in state.items()} == {
        **{("matrix", "step"): FP32, ("matrix", "exp_avg"): BF16, ("matrix", "exp_avg_sq"): BF16},
        **{("vector", "step"): FP32, ("vector", "exp_avg"): FP32, ("vector", "exp_avg_sq"): FP32},
    }
    assert int(tensors["matrix"]["step"]) == 8
    for name, expected in optimiser_tensors(theirs, reference).items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(tensors[name][key].float(), expected[key], rtol=8 * 2**-7, atol=5e-3)


def test_updates_below_half_a_digit_arrive_in_the_mean() -> None:
    rate, steps = 1e-4, 100
    start = torch.tensor([1.0, -1.0]).repeat_interleave(4096).to(BF16)
    nearest = start.clone()
    parameter = nn.Parameter(start.clone())
    optimiser = StochasticAdamW([parameter], lr=rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    torch.manual_seed(0)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)  # so that AdamW takes the rate itself from every weight
        optimiser.step()
        nearest -= rate
    assert torch.equal(nearest, start), "rounded to the nearest, each of them is lost"
    # Digits are 2⁻⁸ just below 1 and 2⁻⁷ above it; noise of the moments is well within the margin.
    for moved, digit in zip((start - parameter.detach()).float().split(4096), (2**-8, 2**-7), strict=True):
        error = math.sqrt(steps * (rate / digit) * (1 - rate / digit) / 4096) * digit
        assert abs(float(moved.mean()) - steps * rate) <= SIGMAS * error + 0.01 * steps * rate


# Rounding


def test_what_a_bf16_holds_is_never_changed() -> None:
    values = every_bf16()
    assert len(values) == (1 << 16) - 2 * 127, "zeros, subnormals and infinities among them"
    torch.manual_seed(0)
    for _ in range(4):
        assert torch.equal(bits(round_by_chance(values.float(), BF16)), bits(values))


def test_fp32_is_left_alone() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(round_by_chance(x, FP32)), bits(x))


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(0x7FC00000, id="a CPU's"),
        pytest.param(0x7FFFFFFF, id="a GPU's"),
    ],
)
def test_not_a_number_stays_one(pattern: int) -> None:
    x = torch.tensor([pattern], dtype=torch.int32).view(FP32)
    assert x.isnan().all()
    torch.manual_seed(0)
    assert round_by_chance(x.repeat(DRAWS), BF16).isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize(
    "magnitude",
    [1.001, 2 - 2**-10, 0.3, 1e-3, 3.3e38, 1.2e-38, 1e-40, 1e-45],
    ids=["one", "below two", "0.3", "small", "large", "least normal", "subnormal", "least subnormal"],
)
def test_rounding_goes_to_both_neighbours_and_is_right_in_the_mean(magnitude: float, sign: float) -> None:
    x = torch.tensor(sign * magnitude, dtype=FP32)
    grid = every_bf16().double().unique()
    above = int(torch.searchsorted(grid, x.double()))
    low, high = grid[above - 1], grid[above]
    assert low < x < high
    torch.manual_seed(0)
    rounded = round_by_chance(x.repeat(DRAWS), BF16)
    assert rounded.dtype == BF16
    chance = float((x.double() - low) / (high - low))
    ups = int((rounded.double() == high).sum())
    downs = int((rounded.double() == low).sum())
    assert ups + downs == DRAWS, "nowhere but to a neighbour"
    assert abs(ups - chance * DRAWS) <= SIGMAS * math.sqrt(DRAWS * chance * (1 - chance))
    assert (ups and downs) or min(chance, 1 - chance) < 10 / DRAWS, "to both"


# The state


def test_making_the_state_moves_no_weight() -> None:
    model, fresh = Weights(BF16, FP32), Weights(BF16, FP32)
    with torch.no_grad():
        for parameter in (*model.parameters(), *fresh.parameters()):
            parameter.flatten()[:2] = torch.tensor([-0.0, 1e-40])
    before = {name: bits(parameter) for name, parameter in model.named_parameters()}
    optimiser = make_optimiser(model, CONFIG, CPU)
    tensors = optimiser_tensors(model, optimiser)
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter), before[name])
        assert parameter.grad is None
    assert [sorted(state) for state in tensors.values()] == [["exp_avg", "exp_avg_sq", "step"]] * 2
    assert not any(value.any() for state in tensors.values() for value in state.values())
    assert optimiser.param_groups[0]["lr"] == CONFIG.lr
    update(model, optimiser, 1)
    update(fresh, make_optimiser(fresh, CONFIG, CPU), 1)
    for own, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(bits(own), bits(other)), "the first update is the first"


def test_a_loaded_state_goes_on_to_the_bit() -> None:
    model, other = Weights(BF16, FP32), Weights(BF16, FP32)
    optimiser, resumed = make_optimiser(model, CONFIG, CPU), make_optimiser(other, CONFIG, CPU)
    for number in (1, 2, 3):
        update(model, optimiser, number)
    saved = optimiser_tensors(model, optimiser)
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        for name, state in optimiser_tensors(other, resumed).items():  # in place, as a checkpoint is loaded
            for key, value in state.items():
                value.copy_(saved[name][key])
    for number in (4, 5, 6):
        update(model, optimiser, number)
        update(other, resumed, number)
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter), bits(other.get_parameter(name)))
    ours, theirs = optimiser_tensors(model, optimiser), optimiser_tensors(other, resumed)
    for name, state in ours.items():
        for key, value in state.items():
            assert torch.equal(bits(value), bits(theirs[name][key]))


def test_draws_are_those_of_the_seed() -> None:
    models = [Weights(BF16, BF16) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        optimiser = make_optimiser(model, CONFIG, CPU)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        torch.manual_seed(seed)
        optimiser.step()
    first, same, other = (bits(model.matrix) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# What is stored how


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_trained_weights_are_stored_in_bf16_but_for_the_modules_in_fp32(tmp_path: Path, adapter: str) -> None:
    model = to_run_config(compose(["+flavour=t2v-tiny"])).model
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(dataclasses.asdict(model)))
    lora = lora_config(2, 2.0, "attention+ffn") if adapter == "lora" else None
    # Where adapters are trained, the base has a type of its own: told apart by fp32 here.
    transformer = build_transformer(str(tmp_path), model, lora=lora, dtype=FP32, trained=trained_dtype(CONFIG))
    kept, stored = set(), {}
    for name, parameter in transformer.named_parameters():
        parts = name.split(".")
        if not parameter.requires_grad:
            assert adapter == "lora" and not is_adapter(name) and parameter.dtype == FP32, name
            continue
        assert is_adapter(name) == (adapter == "lora"), name
        kept |= set(FP32_MODULES) & set(parts)
        stored[name] = (parameter.dtype, FP32 if set(FP32_MODULES) & set(parts) else BF16)
    assert stored and all(found == wanted for found, wanted in stored.values()), stored
    assert kept == (set(FP32_MODULES) if adapter == "full" else set())


def test_plain_adamw_trains_fp32() -> None:
    assert trained_dtype(dataclasses.replace(CONFIG, kind="adamw")) == FP32


@pytest.mark.parametrize(("adapter", "blocks"), [("full", ""), ("lora", ""), ("lora", "visual"), ("dora", "")])
def test_the_names_that_the_plan_knows_are_the_models(tmp_path: Path, adapter: str, blocks: str) -> None:
    model = to_run_config(compose(["+flavour=t2v-tiny"])).model
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(dataclasses.asdict(model)))
    lora = lora_config(2, 2.0, "attention+ffn", use_dora=adapter == "dora", blocks="visual" if blocks else "all")
    transformer = build_transformer(str(tmp_path), model, lora=None if adapter == "full" else lora, dtype=FP32)
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    if adapter == "full":
        assert sorted(weight_names(model)) == sorted(trained)
    else:
        assert sorted(adapter_names(model, lora)) == sorted(trained)
