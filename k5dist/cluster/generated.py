"""The tiny flavours' checkpoint, which nobody can download."""

from __future__ import annotations

from k5dist import storage
from k5dist.console import say
from k5dist.model.pretrained import VISION_FOLDER
from k5dist.plan import RunPlan


def ensure_generated(plan: RunPlan) -> None:
    """Make the tiny flavours' checkpoint where the plan expects it, once."""
    config = plan.config
    wanted = ("model_index.json", f"{VISION_FOLDER}/config.json")
    if not config.flavour.generated or all(storage.exists(storage.join(plan.pretrained, name)) for name in wanted):
        return
    from transformers.utils import logging as transformers_logging

    from k5dist.model.tiny import build_tiny_checkpoint

    transformers_logging.disable_progress_bar()
    with storage.scratch_folder("tiny") as folder:
        architecture = config.to_mapping()["model"]
        build_tiny_checkpoint(folder / "checkpoint", task=config.flavour.task, architecture=architecture)
        storage.publish_folder(folder / "checkpoint", plan.pretrained, last="model_index.json")
    say(f"made the checkpoint of {config.flavour.name}: {plan.pretrained}")
