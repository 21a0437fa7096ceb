"""Rows of a file by number and by key."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from k5dist import storage
from k5dist.cache import rows


@pytest.fixture(params=[1, 999, 1024, 5000])
def numbered(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[rows.Rows, int]:
    """Keys 0000, 0002, … with their number, in row groups."""
    uri, count = str(tmp_path / "rows.parquet"), request.param
    keys = [f"{2 * at:05d}" for at in range(count)]
    table = pa.table({"key": keys, "number": list(range(count)), "other": [0] * count})
    storage.publish_bytes(uri, rows.rows_file(table))
    return rows.Rows(uri, ["number"]), count


def test_rows_by_number_and_by_key(numbered: tuple[rows.Rows, int]) -> None:
    found, count = numbered
    assert found.num_rows == count
    for at in {0, count // 2, count - 1, min(count - 1, 1023), min(count - 1, 1024)}:
        expected = {"key": f"{2 * at:05d}", "number": at}
        assert found.row(at) == found.find(f"{2 * at:05d}") == expected
        assert found.find(f"{2 * at + 1:05d}") is None
    assert found.find("") is None


def test_nothing_is_found_in_an_empty_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "rows.parquet")
    storage.publish_bytes(uri, rows.rows_file(pa.table({"key": pa.array([], pa.string())})))
    assert rows.Rows(uri, []).find("a") is None


def test_few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "GROUP_ROWS", 2)
    monkeypatch.setattr(rows, "_KEPT_GROUPS", 3)
    uri = str(tmp_path / "rows.parquet")
    storage.publish_bytes(uri, rows.rows_file(pa.table({"key": [f"{at:02d}" for at in range(40)]})))
    found = rows.Rows(uri, [])
    assert [found.row(at)["key"] for at in (39, 0, 20, 39, 8)] == ["39", "00", "20", "39", "08"]
    assert len(found._groups) == 3
