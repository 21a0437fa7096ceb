"""The run's held-out losses by step, and what hangs on them: the best checkpoint, and whether it is time to stop.

`validation/losses.json` of the run's folder holds them; rank 0 publishes it once a validation is through, its videos
included. Whoever resumes at a step reads what was measured up to it, so that the best step and an early stop are
functions of the losses alone, and a validation that was cut off is done again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from k5dist import storage
from k5dist.config import ValidationConfig
from k5dist.plan import RunPlan

FILE = "validation/losses.json"


@dataclass
class LossHistory:
    """Losses by step and name. Step 0 is no checkpoint, so it is neither the best nor a round of patience."""

    settings: dict[str, Any]
    losses: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, plan: RunPlan, until: int | None = None) -> LossHistory:
        """What was measured up to step `until`; nothing where other settings measured it: they do not compare."""
        settings, uri = _settings(plan.config.validation), storage.join(plan.run_uri, FILE)
        if not storage.exists(uri):
            return cls(settings)
        body = json.loads(storage.read_text(uri))
        if body["settings"] != settings:
            return cls(settings)
        losses = {int(step): losses for step, losses in body["losses"].items()}
        return cls(settings, {step: known for step, known in losses.items() if until is None or step <= until})

    def publish(self, plan: RunPlan) -> None:
        body = {"settings": self.settings, "losses": {str(step): self.losses[step] for step in sorted(self.losses)}}
        storage.publish_bytes(storage.join(plan.run_uri, FILE), json.dumps(body, indent=1).encode())

    @property
    def best_step(self) -> int | None:
        """The step with the least loss (of the averaged weights where both are measured), the first of equal ones."""

        def loss(step: int) -> float:
            return self.losses[step].get("ema/loss", self.losses[step]["loss"])

        return min((step for step in self.losses if step), key=lambda step: (loss(step), step), default=None)

    def exhausted(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no loss below the best."""
        best = self.best_step
        return patience is not None and best is not None and sum(step > best for step in self.losses) >= patience


def _settings(validation: ValidationConfig) -> dict[str, Any]:
    return {"timesteps": validation.timesteps}


def is_complete(plan: RunPlan, probed: int | None, newest: int | None) -> bool:
    """Whether a training has ended: the step of its probe and that of its newest checkpoint are its last step, or the
    one at which it stopped early."""
    if probed is None or newest != probed:
        return False
    config = plan.config
    return probed == config.train.steps or LossHistory.read(plan, probed).exhausted(config.validation.patience)
