"""Sources of clips: folders and manifests, what is rejected and what is refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from k5dist.precache.manifest import Rejected, Row, read_source

from k5dist import storage
from k5dist.config import ConfigError

ENTRIES: list[dict[str, Any]] = [
    {"uri": "one.mp4", "caption": " A cat, asleep ", "start": 1.5, "end": 3},
    {"uri": "sub/two.mp4", "caption": "Ein Hündchen", "start": None, "end": None},
    {"uri": "s3://bucket/three.mp4", "caption": "three", "start": None, "end": None},
    {"uri": "/clips/four.mp4", "caption": "four", "start": None, "end": None},
]


def folder(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def manifest(root: Path, name: str, entries: list[dict[str, Any]]) -> str:
    path = root / name
    if name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries), encoding="utf-8")
    elif name.endswith(".csv"):
        cells = [[str("" if entry.get(key) is None else entry[key]) for key in ENTRIES[0]] for entry in entries]
        lines = [",".join(f'"{cell}"' for cell in row) for row in [list(ENTRIES[0]), *cells]]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(entries), path)
    return str(path)


def refusal(source: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_source(source)
    assert caught.value.key == "data.source"
    return caught.value


def test_a_folder_of_clips_with_captions_beside(tmp_path: Path) -> None:
    files = {"b.mp4": "", "b.txt": " second \n", "a/clip.MOV": "", "a/clip.txt": "first", "notes.md": "no clip"}
    rows, rejected = read_source(folder(tmp_path, {**files}))
    assert rows == [Row(f"{tmp_path}/a/clip.MOV", "first"), Row(f"{tmp_path}/b.mp4", "second")]
    assert rejected == []


def test_a_folder_in_an_object_store() -> None:
    root = f"memory://{uuid.uuid4().hex}/clips"
    storage.publish_bytes(f"{root}/sub/clip.mp4", b"")
    storage.publish_bytes(f"{root}/sub/clip.txt", b"caption")
    rows, rejected = read_source(root)
    assert rows == [Row(f"{root}/sub/clip.mp4", "caption")]
    assert rejected == []


def test_clips_without_a_usable_caption_are_rejected_by_name(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"good.mp4": "", "good.txt": "good", "alone.mp4": "", "empty.mp4": ""}
    files |= {"empty.txt": " \n", "latin.mp4": "", "latin.txt": "Hündchen".encode("latin-1")}
    rows, rejected = read_source(folder(tmp_path, files))
    assert [row.caption for row in rows] == ["good"]
    reasons = {Path(row.uri).name: row.reason for row in rejected}
    assert set(reasons) == {"alone.mp4", "empty.mp4", "latin.mp4"}
    assert "alone.txt" in reasons["alone.mp4"]
    assert "empty" in reasons["empty.mp4"]
    assert "UTF-8" in reasons["latin.mp4"]


@pytest.mark.parametrize("name", ["clips.jsonl", "clips.csv", "clips.parquet", "CLIPS.JSONL"])
def test_a_manifest(tmp_path: Path, name: str) -> None:
    source = str(tmp_path / name)
    manifest(tmp_path, name.lower(), ENTRIES)
    (tmp_path / name.lower()).rename(source)
    rows, rejected = read_source(source)
    assert rejected == []
    assert rows == [
        Row(f"{tmp_path}/one.mp4", "A cat, asleep", 1.5, 3.0),
        Row(f"{tmp_path}/sub/two.mp4", "Ein Hündchen"),
        Row("s3://bucket/three.mp4", "three"),
        Row("/clips/four.mp4", "four"),
    ]


def test_a_manifest_beside_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(tmp_path, "clips.jsonl", ENTRIES[:1])
    monkeypatch.chdir(tmp_path)
    rows, _ = read_source("clips.jsonl")
    assert storage.normalise(rows[0].uri) == str(tmp_path / "one.mp4")


@pytest.mark.parametrize("name", ["clips.jsonl", "clips.csv", "clip.txt"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    if name == "clip.txt":
        source = folder(tmp_path, {"clip.mp4": "", "clip.txt": "caption".encode("utf-8-sig")})
    else:
        source = manifest(tmp_path, name, [{**ENTRIES[0], "caption": "caption"}])
        Path(source).write_bytes(b"\xef\xbb\xbf" + Path(source).read_bytes())
    rows, _ = read_source(source)
    assert [row.caption for row in rows] == ["caption"]


@pytest.mark.parametrize("name", ["clips.jsonl", "clips.csv", "clips.parquet"])
def test_rows_that_cannot_be_used_are_rejected_with_the_reason(tmp_path: Path, name: str) -> None:
    start: dict[str, Any] = {"start": None, "end": None}
    entries = [
        {"uri": "good.mp4", "caption": "good", **start},
        {"uri": "silent.mp4", "caption": None, **start},
        {"uri": "blank.mp4", "caption": "  ", **start},
        {"uri": None, "caption": "nowhere", **start},
        {"uri": "../outside.mp4", "caption": "out", **start},
        {"uri": "a/../../outside.mp4", "caption": "out", **start},
    ]
    source = manifest(tmp_path, name, entries)
    rows, rejected = read_source(source)
    assert [row.caption for row in rows] == ["good"]
    assert [(row.uri, row.reason.split()[-1]) for row in rejected] == [
        ("silent.mp4", "caption"),
        ("blank.mp4", "caption"),
        (f"{source}:4", "uri"),
        ("../outside.mp4", ".."),
        ("a/../../outside.mp4", ".."),
    ]


@pytest.mark.parametrize("times", [{"start": "soon"}, {"end": "late"}, {"start": [1]}, {"end": {"at": 3}}])
def test_times_that_are_no_seconds_are_rejected(tmp_path: Path, times: dict[str, Any]) -> None:
    entries = [{"uri": "bad.mp4", "caption": "bad", **times}, {"uri": "good.mp4", "caption": "good"}]
    rows, rejected = read_source(manifest(tmp_path, "clips.jsonl", entries))
    assert [row.caption for row in rows] == ["good"]
    assert rejected == [Rejected("bad.mp4", "start and end must be seconds")]


def test_blank_lines_of_a_manifest_are_skipped(tmp_path: Path) -> None:
    source = manifest(tmp_path, "clips.jsonl", ENTRIES)
    Path(source).write_text(Path(source).read_text(encoding="utf-8").replace("\n", "\n\n") + "\n", encoding="utf-8")
    assert len(read_source(source)[0]) == len(ENTRIES)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    source = manifest(tmp_path, "clips.jsonl", ENTRIES[:1])
    Path(source).write_text(Path(source).read_text() + "\n{'uri': 1}\n")
    error = refusal(source)
    assert error.value == f"{source}:2"
    assert "not JSON" in error.rule


@pytest.mark.parametrize("line", ["[1]", '"clip.mp4"', "3"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    source = manifest(tmp_path, "clips.jsonl", ENTRIES[:1])
    Path(source).write_text(Path(source).read_text() + f"\n{line}\n")
    assert str(refusal(source).value) == f"{source}:2"


def test_a_manifest_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "UTF-8" in refusal(folder(tmp_path, {"clips.csv": b"uri,caption\na.mp4,H\xfcndchen\n"}) + "/clips.csv").rule


def test_a_caption_may_hold_any_character(tmp_path: Path) -> None:
    """JSON allows U+2028, U+0085 and their like inside a string, though Python calls them ends of lines."""
    caption = "one\u2028two\u0085three"
    rows, _ = read_source(manifest(tmp_path, "clips.jsonl", [{"uri": "a.mp4", "caption": caption}]))
    assert [row.caption for row in rows] == [caption]


@pytest.mark.parametrize("name", ["clips.jsonl", "clips.csv", "clips.parquet"])
def test_an_empty_manifest_is_refused(tmp_path: Path, name: str) -> None:
    source = str(tmp_path / name)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"uri": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), source)
    else:
        Path(source).write_text("uri,caption\n" if name.endswith(".csv") else "")
    assert "empty: no rows" in refusal(source).rule


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    error = refusal(folder(tmp_path, {"notes.txt": "no clip"}))
    assert "empty: no videos" in error.rule
    assert ".mp4" in error.rule


def test_a_dataset_without_one_caption_is_refused_with_the_first_clip(tmp_path: Path) -> None:
    error = refusal(folder(tmp_path, {"a.mp4": "", "b.mp4": ""}))
    assert "none of its 2 clips" in error.rule
    assert "a.mp4" in error.rule
    assert ".txt" in error.fix


def test_nothing_at_the_source_is_refused(tmp_path: Path) -> None:
    assert "nothing at this place" in refusal(str(tmp_path / "none")).rule
    assert "nothing at this place" in refusal(str(tmp_path / "none.jsonl")).rule
