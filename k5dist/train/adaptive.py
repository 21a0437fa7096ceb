"""AdamW without a schedule, and AdamW without a learning rate: schedule-free AdamW and Prodigy, for FSDP2's shards.

The libraries `schedulefree` and `prodigyopt` are what these are tested against. The first keeps its counters and sums
where no checkpoint of tensors sees them, and comes back from its averaged weights by arithmetic, which leaves other
weights than before; the second cannot take DTensors of uneven shards, sums over the wrong workers under HSDP, and waits
for the device twice a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from k5dist.train.sharded import Group, ShardedOptimizer, local


class ScheduleFreeAdamW(ShardedOptimizer):
    """Defazio et al., arXiv 2405.15682, as in the library: weights hold y, where gradients are taken.

    z ← z − lr u, x ← (1 − c) x + c z with c = lr²ₘₐₓ / Σ lr²ₘₐₓ, y = β1 x + (1 − β1) z; u is AdamW's step at y without
    the first moment. x, the average, is never stored: x = (y − (1 − β1) z) / β1.
    """

    def __init__(
        self, groups: Sequence[Group], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "lr_scale": 1.0, "eps": eps, "weight_decay": weight_decay})
        self.betas = betas

    def new_state(self, parameter: nn.Parameter, group: Group) -> dict[str, Tensor]:
        return {"z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}

    def new_shared(self) -> dict[str, Tensor]:
        return super().new_shared() | {name: torch.zeros((), dtype=torch.float64) for name in ("lr_max", "weight_sum")}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        step, (beta1, beta2) = self.next_step(), self.betas
        # A group's factor falls out of c.
        rate = max((g["lr"] / g["lr_scale"] for g in self.param_groups if g["lr_scale"]), default=0.0)
        self.shared["lr_max"].fill_(largest := max(rate, float(self.shared["lr_max"])))
        self.shared["weight_sum"] += largest**2
        share = largest**2 / total if (total := float(self.shared["weight_sum"])) else 0.0
        for parameter, group, state in self.weights():
            y, z = local(parameter), local(state["z"])
            square, gradient = local(state["exp_avg_sq"]), local(parameter.grad).float()  # type: ignore[arg-type]
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            change = gradient / (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            change.add_(y, alpha=group["weight_decay"])
            y.lerp_(z, share).add_(change, alpha=group["lr"] * (beta1 * (1 - share) - 1))
            z.sub_(change, alpha=group["lr"])

    @torch.no_grad()
    def average(self) -> dict[nn.Parameter, Tensor]:
        self.allocate()
        return {
            parameter: averaged(local(parameter), local(self.state[parameter]["z"]), self.betas[0])
            for group in self.param_groups
            for parameter in group["params"]
        }


def averaged(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """The x of a schedule-free optimiser's y and z."""
    return y.detach().lerp(z, 1 - 1 / beta1)


class Prodigy(ShardedOptimizer):
    """Mishchenko and Defazio, arXiv 2306.06101, algorithm 4, as in the library with bias correction, decoupled decay
    and, where there is a warm-up, its safeguard.

    d, the estimate of the distance to the solution, is d_coef · Σ⟨g, p0 − p⟩ / ‖s‖₁ over all weights of all shards.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        d0: float,
        d_coef: float,
        safeguard_warmup: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self.betas, self.d0, self.d_coef, self.safeguard = betas, d0, d_coef, safeguard_warmup

    def new_state(self, parameter: nn.Parameter, group: Group) -> dict[str, Tensor]:
        zeros = {name: torch.zeros_like(parameter) for name in ("s", "exp_avg", "exp_avg_sq")}
        return {"p0": parameter.detach().clone(), **zeros}

    def new_shared(self) -> dict[str, Tensor]:
        start = torch.tensor(self.d0, dtype=torch.float64)
        return super().new_shared() | {"d": start, "d_max": start.clone(), "d_numerator": torch.zeros_like(start)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        step, (beta1, beta2) = self.next_step(), self.betas
        beta3, d, rate = math.sqrt(beta2), float(self.shared["d"]), self.param_groups[0]["lr"]
        scaled = d * rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        weights = list(self.weights())
        sums: list[Tensor] = []
        for parameter, _, state in weights:
            own, gradient = local(parameter), local(parameter.grad).float()  # type: ignore[arg-type]
            away = torch.sum(gradient * (local(state["p0"]) - own))
            local(state["exp_avg"]).mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
            local(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
            s = local(state["s"])
            s.mul_(beta3).add_(gradient, alpha=d / self.d0 * (d if self.safeguard else scaled))
            sums.append(torch.stack([away, s.abs().sum()]))
        away, length = self.total(torch.stack(sums).double().sum(0)).tolist()
        if length == 0:
            return
        self._estimate(d / self.d0 * scaled * away, length, beta3)
        d = float(self.shared["d"])
        for parameter, group, state in weights:
            own = local(parameter)
            own.mul_(1 - group["weight_decay"] * scaled)
            own.addcdiv_(
                local(state["exp_avg"]), local(state["exp_avg_sq"]).sqrt().add_(d * group["eps"]), value=-scaled
            )

    def _estimate(self, gained: float, length: float, beta3: float) -> None:
        shared = self.shared
        shared["d_numerator"].mul_(beta3).add_(gained)
        found = self.d_coef * float(shared["d_numerator"]) / length
        largest = max(float(shared["d_max"]), found)
        shared["d_max"].fill_(largest)
        shared["d"].fill_(largest)
