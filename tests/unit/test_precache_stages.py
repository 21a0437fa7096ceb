"""What a stage does with a row whose worker died, with a store that is away, and with work that is too large."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from k5dist import storage
from k5dist.config import ConfigError
from k5dist.precache import stages
from k5dist.precache.attempts import MAX_DEATHS
from k5dist.retry import StorageUnavailable


class Counted:
    """`Attempts` without Ray."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()

    def begin(self, stage: str, row: dict[str, Any]) -> str | None:
        self.begun[f"{stage} {row['key']}"] += 1
        deaths = self.begun[f"{stage} {row['key']}"] - 1
        return f"its worker died {deaths} times" if deaths >= MAX_DEATHS else None

    def end(self, stage: str, row: dict[str, Any]) -> None:
        del self.begun[f"{stage} {row['key']}"]


NOT_ENCODED = {"tiling_error": 0.0, "vae_began": 0.0, "vae_ended": 0.0}
DATASETS: Any = {"main": None}  # asked for only once the clip is open
ROW = {"uri": "s3://b/x.mp4", "start": 0.0, "end": -1.0, "key": "k", "caption": "a", "error": "", "stage": ""} | {
    "frames": 17,
    "height": 64,
    "width": 96,
    "group": 0,
    "dataset": "main",
    "frame_rate": 12.0,
    "crop": "center",
    "crop_seed": 0,
}


def test_a_row_is_given_up_after_three_deaths_and_not_before(tmp_path: Path) -> None:
    attempts, row = Counted(), ROW | {"uri": str(tmp_path / "not there.mp4")}
    for _ in range(MAX_DEATHS - 1):
        attempts.begin("decode", row)
    done = stages.decode_row(row, attempts=attempts)  # type: ignore[arg-type]
    assert done["error"].startswith("FileNotFoundError")
    assert not attempts.begun, "whoever comes to an end is forgotten"
    for _ in range(MAX_DEATHS):
        attempts.begin("decode", row)
    done = stages.decode_row(row, attempts=attempts)  # type: ignore[arg-type]
    assert (done["stage"], done["error"]) == ("decode", "its worker died 3 times")
    assert done["pixels"].shape == stages.NO_FRAMES.shape


def test_padding_goes_through_untouched() -> None:
    padding = ROW | {"key": "", "uri": ""}
    assert stages.decode_row(padding)["error"] == ""


@pytest.mark.parametrize("stage", ["probe", "decode"])
def test_a_store_that_is_away_is_no_fault_of_a_clip(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise StorageUnavailable("s3://b/x.mp4", "503", 300)

    monkeypatch.setattr(storage, "open_read", away)
    monkeypatch.setattr(stages, "content_digest", away)
    work = {
        "probe": partial(stages.probe_clip, datasets=DATASETS, unit=16, facts={"first_frame": False}),
        "decode": stages.decode_row,
    }
    with pytest.raises(StorageUnavailable):
        work[stage](dict(ROW))


def test_a_shard_that_kills_its_writer_names_the_setting(tmp_path: Path) -> None:
    attempts, table = (
        Counted(),
        pa.Table.from_pylist([ROW | {"error": "broken", "stage": "decode"} | NOT_ENCODED]),
    )
    stages.write_samples(table, cache_uri=str(tmp_path), attempts=attempts)  # type: ignore[arg-type]
    for _ in range(MAX_DEATHS):
        attempts.begin("write", ROW)
    with pytest.raises(ConfigError, match=r"precache\.shard_size_mib"):
        stages.write_samples(table, cache_uri=str(tmp_path), attempts=attempts)  # type: ignore[arg-type]
