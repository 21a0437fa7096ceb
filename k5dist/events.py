"""What a worker tells the driver: one JSON object a line on standard output, between ordinary log lines.

The driver alone speaks to the tracking server and owns the terminal, so workers need no credentials and no address.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "@k5dist "


def emit(kind: str, **facts: Any) -> None:
    """Send one event; safe to interleave with prints, since a line is written at once."""
    sys.stdout.write(line_of(kind, **facts) + "\n")
    sys.stdout.flush()


def line_of(kind: str, **facts: Any) -> str:
    return f"{MARK}{json.dumps({'kind': kind, **facts})}"


def parse(line: str) -> dict[str, Any] | None:
    """The event in a log line (whatever prefix the launcher put in front), or None for an ordinary line."""
    _, mark, body = line.partition(MARK)
    if not mark:
        return None
    try:
        event = json.loads(body)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
