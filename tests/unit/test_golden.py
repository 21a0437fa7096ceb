"""The resolved configuration of every flavour, as it was when someone last looked at it.

After an intended change: `K5DIST_UPDATE_GOLDEN=1 pytest tests/unit/test_golden.py`, then read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from k5dist.compose import compose, flavours

GOLDEN = Path(__file__).parent.parent / "golden" / "config"
UPDATE = os.environ.get("K5DIST_UPDATE_GOLDEN") == "1"


@pytest.mark.parametrize("flavour", flavours())
def test_a_flavour_resolves_as_recorded(flavour: str) -> None:
    resolved = OmegaConf.to_yaml(compose([f"+flavour={flavour}"]), resolve=True)
    file = GOLDEN / f"{flavour}.yaml"
    if UPDATE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(resolved, encoding="utf-8")
    assert file.exists(), f"{flavour} has no golden file: run with K5DIST_UPDATE_GOLDEN=1"
    assert resolved == file.read_text(encoding="utf-8")


def test_every_golden_file_has_a_flavour() -> None:
    left_over = {file.stem for file in GOLDEN.iterdir()} - set(flavours())
    if UPDATE:
        for name in left_over:
            (GOLDEN / f"{name}.yaml").unlink()
        left_over = set()
    assert left_over == set(), "golden files without a flavour"
