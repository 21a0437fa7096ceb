"""The README's tree has one comment a file: a file that is not in it cannot be found by it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tree_names_every_file_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text().split("## The house", 1)[1].split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    here = {path.name for path in (ROOT / "k5dist").rglob("*.py") if path.parent.name != "config"} - {"__init__.py"}
    assert here - named == set(), "not in the tree"
    assert named - here == set(), "in the tree alone"
