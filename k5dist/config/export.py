"""What is exported."""

from __future__ import annotations

import dataclasses

from k5dist.schema import one_of


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    checkpoint: str
    merge: bool

    def __post_init__(self) -> None:
        one_of("export.checkpoint", self.checkpoint, ("last", "best"))
