"""What is exported."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    merge: bool
