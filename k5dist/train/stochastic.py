"""AdamW whose weights and moments are bf16, rounded up or down by chance: half the memory of fp32's.

Rounded to the nearest, most updates would be lost: they are smaller than half of a bf16 weight's last digit. Rounded up
with the probability that their rest says, they arrive in the mean (Gupta et al., arXiv 1502.02551; for this use
arXiv 2010.06192). Modules that stay in fp32 are updated as plain AdamW updates them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class StochasticAdamW(torch.optim.Optimizer):
    """Draws come from torch's own generator: seed it before a step, alike where copies of a shard must stay equal."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            scalars: dict[int, Tensor] = {}  # by the number of updates: one copy to the device for all weights
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # Counted on the CPU: reading it must not wait for the device.
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                count = int(state["step"])
                if count not in scalars:
                    scalars[count] = _scalars(group, count, parameter.device)
                self._update(parameter, parameter.grad, scalars[count])

    def _update(self, parameter: nn.Parameter, gradient: Tensor, scalars: Tensor) -> None:
        state = self.state[parameter]
        tensors = [
            _local(tensor).view(-1) for tensor in (parameter.detach(), gradient, state["exp_avg"], state["exp_avg_sq"])
        ]
        if tensors[0].numel():
            update = _compiled_update if tensors[0].is_cuda else adamw_update
            weight, grad, mean, square = tensors
            update(weight, grad, mean, square, scalars)


def _scalars(group: dict[str, Any], count: int, device: torch.device) -> Tensor:
    """What `adamw_update` takes, on the device, without waiting for it."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    values = [1 - beta1, 1 - beta2, 1 - rate * group["weight_decay"]]
    values += [rate / (1 - beta1**count), (1 - beta2**count) ** -0.5, group["eps"]]
    scalars = torch.tensor(values, dtype=torch.float32)
    return scalars.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else scalars


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adamw_update(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, scalars: Tensor) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2) in fp32 on flat tensors, in place.

    `scalars`: 1 − β1, 1 − β2, 1 − lr·decay, lr / (1 − β1^t), (1 − β2^t)^−½, ε.
    """
    gradient = gradient.float()
    new_mean = torch.lerp(mean.float(), gradient, scalars[0])
    new_square = torch.lerp(square.float(), gradient * gradient, scalars[1])
    change = scalars[3] * new_mean / (new_square.sqrt() * scalars[4] + scalars[5])
    weight.copy_(round_by_chance(weight.float() * scalars[2] - change, weight.dtype))
    mean.copy_(round_by_chance(new_mean, mean.dtype))
    square.copy_(round_by_chance(new_square, square.dtype))


# One kernel for all sizes, which draws its noise as it goes; eagerly the update would pass 20 times over the weights.
_compiled_update = torch.compile(adamw_update, dynamic=True, fullgraph=True)


def round_by_chance(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 as bf16, up or down so that the mean is `x`; unchanged where `dtype` is fp32.

    A bf16 is the upper half of an fp32: noise in the lower half carries into the upper as often as that half is large.
    """
    if dtype == torch.float32:
        return x
    assert dtype == torch.bfloat16, "the upper half of an fp32"
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(dtype)  # a GPU's NaN has all bits set: noise would make it a zero
