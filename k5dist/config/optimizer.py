"""The optimiser, its groups of weights, and the moving average of the weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from k5dist.schema import ConfigError, check_names, one_of, positive

OPTIMIZERS = ("adamw", "adamw_bf16", "adamw_8bit", "adamw_schedulefree", "adafactor", "prodigy", "muon")
# Of the blocks' attention and feed-forward layers, adapters' among them; what is no matrix is told by its shape.
_MATRIX = re.compile(r"_transformer_blocks\.\d+\.((self|cross)_attention|feed_forward)\..*weight$")
# A fresh LoRA's B is zero and counts as 1e-3 there: with a rate made for AdamW it would move by 1e-7 a step.
MIN_RELATIVE_LR = 1e-3
_GROUP_KEYS = ("match", "lr_scale", "weight_decay")


@dataclasses.dataclass(frozen=True)
class GroupRule:
    """What weights whose name a pattern finds have of their own; None: as all others."""

    match: str
    lr_scale: float
    weight_decay: float | None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    kind: str
    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    max_grad_norm: float
    schedule: str
    warmup_steps: int
    decay_norms_and_biases: bool
    groups: tuple[Mapping[str, Any], ...]
    muon_momentum: float
    adafactor_relative_lr: bool
    prodigy_d0: float
    prodigy_d_coef: float

    def __post_init__(self) -> None:
        one_of("optimizer.kind", self.kind, OPTIMIZERS)
        for name in ("lr", "max_grad_norm", "prodigy_d0", "prodigy_d_coef"):
            positive(f"optimizer.{name}", getattr(self, name))
        one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optimizer.betas", self.betas, "two numbers, 0 ≤ β < 1", "optimizer.betas=[0.9,0.99]")
        if self.warmup_steps < 0:
            raise ConfigError("optimizer.warmup_steps", self.warmup_steps, "steps ≥ 0", "optimizer.warmup_steps=0")
        if not 0 <= self.muon_momentum < 1:
            rule = "the share of the momentum that stays, 0 ≤ μ < 1"
            raise ConfigError("optimizer.muon_momentum", self.muon_momentum, rule, "optimizer.muon_momentum=0.95")
        self._check_kind(self.rules)

    def _check_kind(self, rules: tuple[GroupRule, ...]) -> None:
        """What one kind alone asks for."""
        if self.kind == "prodigy":
            if self.lr != 1:
                rule = "Prodigy finds the step size itself; lr is a factor of it and belongs to 1"
                raise ConfigError("optimizer.lr", self.lr, rule, "optimizer.lr=1")
            if any(group.lr_scale != 1 for group in rules):
                rule = "Prodigy finds one step size for all weights: no lr_scale but 1"
                raise ConfigError("optimizer.groups", list(self.groups), rule, "optimizer.kind=adamw")
        if self.kind == "adafactor" and self.adafactor_relative_lr and self.lr < MIN_RELATIVE_LR:
            share = f"a share of each weight's root mean square, {MIN_RELATIVE_LR:g} or more"
            rule = f"{share} (without optimizer.adafactor_relative_lr as AdamW's)"
            fix = "optimizer.lr=1e-2"
            raise ConfigError("optimizer.lr", self.lr, rule, fix)
        if self.kind == "adamw_schedulefree":
            if self.schedule != "constant":
                rule = "a schedule-free optimiser averages its weights in place of a falling rate"
                raise ConfigError("optimizer.schedule", self.schedule, rule, "optimizer.schedule=constant")
            if not self.betas[0]:
                rule = "β1 is the share of the average in the weights that gradients are taken at, 0 < β1 < 1"
                raise ConfigError("optimizer.betas", self.betas, rule, "optimizer.betas=[0.9,0.99]")

    @property
    def rules(self) -> tuple[GroupRule, ...]:
        """`groups`, checked. The first that finds a name counts for it."""
        return tuple(_rule(f"optimizer.groups[{i}]", group) for i, group in enumerate(self.groups))

    def rule_of(self, name: str) -> int | None:
        """Position of the rule that counts for a weight: the first that finds its name."""
        return next((at for at, rule in enumerate(self.rules) if re.search(rule.match, name)), None)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a rule that counts for none of the weights' names, and where Muon has no matrix."""
        names = tuple(names) if self.groups or self.kind == "muon" else ()
        rules, found = self.rules, [self.rule_of(name) for name in names]
        for at, rule in enumerate(rules):
            if at not in found:
                text = "no trained weight has such a name, or earlier rules found them all"
                fix = "a part of a name, like cross_attention"
                raise ConfigError(f"optimizer.groups[{at}].match", rule.match, text, fix)
        if self.kind == "muon" and not any(
            _MATRIX.search(name) and (at is None or rules[at].lr_scale) for name, at in zip(names, found, strict=True)
        ):
            text = "Muon orthogonalises matrices of attention and feed-forward layers, and none of them is trained"
            raise ConfigError("optimizer.kind", self.kind, text, "optimizer.kind=adamw")


def _rule(key: str, group: Mapping[str, Any]) -> GroupRule:
    check_names(group, _GROUP_KEYS, f"{key}.")
    match, scale, decay = group.get("match"), group.get("lr_scale", 1.0), group.get("weight_decay")
    fix = "optimizer.groups=[{match:self_attention,lr_scale:0.1}]"
    try:
        re.compile(match or "(")
    except (re.error, TypeError) as error:
        raise ConfigError(f"{key}.match", match, "a regular expression of weights' names", fix) from error
    for name, value in (("lr_scale", scale), ("weight_decay", decay)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not number and not (name == "weight_decay" and value is None):
            raise ConfigError(f"{key}.{name}", value, "a finite number, 0 or more", fix)
    return GroupRule(str(match), float(scale), None if decay is None else float(decay))


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    enabled: bool
    decay: float
    update_after: int
    every: int
    device: str
    export: bool

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ConfigError("ema.decay", self.decay, "the share of the average that stays a step", "ema.decay=0.999")
        if self.update_after < 0:
            raise ConfigError("ema.update_after", self.update_after, "steps ≥ 0", "ema.update_after=0")
        positive("ema.every", self.every)
        one_of("ema.device", self.device, ("device", "host"))
