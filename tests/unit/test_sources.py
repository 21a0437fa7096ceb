"""Sources of clips: folders and manifests, what is rejected and what is refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k5dist import storage
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.precache.sources import Rejected, Row, read_datasets


def read_source(source: str, **keys: Any) -> tuple[list[Row], list[Rejected]]:
    config = to_run_config(compose(["+flavour=t2v-tiny"])).to_mapping()
    config["data"] |= {"source": source, **keys}
    listing = read_datasets(RunConfig.from_mapping(config).datasets)
    rows = [
        Row(row["uri"], tuple(row["captions"]), row["start"], None if row["end"] < 0 else row["end"])
        for row in listing.rows.to_pylist()
    ]
    return rows, [Rejected(row["uri"], row["reason"]) for row in listing.rejected.to_pylist()]


ENTRIES: list[dict[str, Any]] = [
    {"uri": "one.mp4", "caption": " A cat, asleep ", "start": 1.5, "end": 3},
    {"uri": "sub/two.mp4", "caption": "Ein Hündchen", "start": None, "end": None},
    {"uri": "s3://bucket/three.mp4", "caption": "three", "start": None, "end": None},
]


def folder(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def manifest(root: Path, name: str, entries: list[dict[str, Any]]) -> str:
    path = root / name
    (root / "sub").mkdir(exist_ok=True)
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
    assert rows == [Row(f"{tmp_path}/a/clip.MOV", ("first",)), Row(f"{tmp_path}/b.mp4", ("second",))]
    assert rejected == []


def test_a_folder_in_an_object_store() -> None:
    root = f"memory://{uuid.uuid4().hex}/clips"
    storage.publish_bytes(f"{root}/sub/clip.mp4", b"")
    storage.publish_bytes(f"{root}/sub/clip.txt", b"caption")
    rows, rejected = read_source(root)
    assert rows == [Row(f"{root}/sub/clip.mp4", ("caption",))]
    assert rejected == []


def test_clips_without_a_usable_caption_are_rejected_by_name(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"good.mp4": "", "good.txt": "good", "alone.mp4": "", "empty.mp4": ""}
    files |= {"empty.txt": " \n", "latin.mp4": "", "latin.txt": "Hündchen".encode("latin-1")}
    rows, rejected = read_source(folder(tmp_path, files))
    assert [row.captions[0] for row in rows] == ["good"]
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
        Row(f"{tmp_path}/one.mp4", ("A cat, asleep",), 1.5, 3.0),
        Row(f"{tmp_path}/sub/two.mp4", ("Ein Hündchen",)),
        Row("s3://bucket/three.mp4", ("three",)),
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
    assert [row.captions[0] for row in rows] == ["caption"]


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
    assert [row.captions[0] for row in rows] == ["good"]
    assert [(row.uri, row.reason.split()[-1]) for row in rejected] == [
        ("silent.mp4", "caption"),
        ("blank.mp4", "caption"),
        (f"{source}:4", "uri"),
        ("../outside.mp4", ".."),
        ("a/../../outside.mp4", ".."),
    ]


@pytest.mark.parametrize(
    "times",
    [{"start": "soon"}, {"end": "late"}, {"start": [1]}, {"end": {"at": 3}}, {"start": -1}, {"start": 3, "end": 2}],
)
def test_times_that_are_no_seconds_are_rejected(tmp_path: Path, times: dict[str, Any]) -> None:
    entries = [{"uri": "bad.mp4", "caption": "bad", **times}, {"uri": "good.mp4", "caption": "good"}]
    rows, rejected = read_source(manifest(tmp_path, "clips.jsonl", entries))
    assert [row.captions[0] for row in rows] == ["good"]
    assert rejected == [Rejected("bad.mp4", "start and end must be seconds, 0 ≤ start < end")]


def test_blank_lines_of_a_manifest_are_skipped(tmp_path: Path) -> None:
    source = manifest(tmp_path, "clips.jsonl", ENTRIES)
    Path(source).write_text(Path(source).read_text(encoding="utf-8").replace("\n", "\n\n") + "\n", encoding="utf-8")
    assert len(read_source(source)[0]) == len(ENTRIES)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'uri': 1}", "not JSON"),
        (b"[1]", "no JSON object"),
        (b'"clip.mp4"', "no JSON object"),
        (b'{"uri": "a.mp4", "caption": "H\xfcnd"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"uri": "a.mp4", "caption": "\\ud800"}', "binary"),
        (b'{"uri": "a.mp4", "caption": "\\u0000"}', "binary"),
        (b'{"uri": "a.mp4", "caption": 3}', "not text"),
        (b'{"uri": "a.mp4", "caption": "' + b"x" * 2**20 + b'"}', "1,048,576 characters"),
        (b'{"uri": "a.mp4", "caption": "' + b"x" * 20 * 2**20 + b'"}', "longer than 8 MiB"),
        (b'{"uri": "a\\u0000.mp4", "caption": "x"}', "uri is not"),
        (b'{"uri": "http://10.0.0.1/a.mp4", "caption": "x"}', "may not name http://"),
        (b'{"uri": "file:///etc/a.mp4", "caption": "x"}', "outside"),
        (b'{"uri": "/etc/passwd", "caption": "x"}', "outside"),
        (b'{"uri": "zip://a.mp4::/etc/b.zip", "caption": "x"}', "chain"),
        (b'{"uri": "a\\\\..\\\\..\\\\b.mp4", "caption": "x"}', ".."),
    ],
)
def test_a_line_that_is_no_row_costs_no_other(tmp_path: Path, line: bytes, reason: str) -> None:
    source = manifest(tmp_path, "clips.jsonl", ENTRIES[:1])
    good = Path(source).read_bytes()
    Path(source).write_bytes(good + b"\r\n" + line + b"\r\n" + good + b"\n")
    rows, rejected = read_source(source)
    assert len(rows) == 2
    assert len(rejected) == 1
    assert reason in rejected[0].reason


def test_a_csv_of_hostile_rows(tmp_path: Path) -> None:
    text = (
        b"\xef\xbb\xbfuri,caption\r\na.mp4,good\r\nb.mp4,H\xfcnd\r\nc.mp4,"
        + b"x" * 2**20
        + b'\r\nd.mp4,"two\r\nlines"\r\n'
    )
    rows, rejected = read_source(folder(tmp_path, {"clips.csv": text}) + "/clips.csv")
    assert [row.captions for row in rows] == [("good",), ("two\r\nlines",)]
    assert ["UTF-8" in row.reason or "1,048,576" in row.reason for row in rejected] == [True, True]


def test_nothing_outside_the_source_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    files: dict[str, str | bytes] = dict.fromkeys(("good.mp4", "linked.mp4", "real/inside.mp4"), "")
    root = Path(folder(tmp_path / "data", {**files, "good.txt": "good", "real/inside.txt": "inside"}))
    (root / "linked.txt").symlink_to(secret)
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "out.mp4").symlink_to(secret)
    (root / "again").symlink_to(root)
    (root / "within.mp4").symlink_to("good.mp4")
    (root / "within.txt").write_text("within")
    rows, rejected = read_source(str(root))
    assert [row.captions[0] for row in rows] == ["good", "inside", "within"]
    assert {Path(row.uri).name for row in rejected} == {"linked.mp4", "loop.mp4", "out.mp4"}
    assert "secret" not in {row.captions[0] for row in rows}
    entries = [{"uri": name, "caption": "x"} for name in ("out.mp4", "loop.mp4", "again/good.mp4", str(secret))]
    rows, rejected = read_source(manifest(root, "clips.jsonl", entries))
    assert [Path(row.uri).name for row in rows] == ["good.mp4"]
    assert len(rejected) == 3


def test_a_remote_manifest_names_no_local_file() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    lines = [{"uri": uri, "caption": "x"} for uri in ("a.mp4", "/etc/passwd", "file:///etc/passwd", f"{root}/b.mp4")]
    storage.publish_bytes(f"{root}/m.jsonl", "\n".join(map(json.dumps, lines)).encode())
    rows, rejected = read_source(f"{root}/m.jsonl")
    assert [row.uri for row in rows] == [f"{root}/a.mp4", f"{root}/b.mp4"]
    assert len(rejected) == 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("**/*.mp4", ["a.mp4", "sub/b.mp4", "sub/deep/c.mp4"]), ("*.mp4", ["a.mp4"]), ("s*/?.mp4", ["sub/b.mp4"])],
)
@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_glob_takes_what_it_matches(tmp_path: Path, place: str, pattern: str, names: list[str]) -> None:
    root = str(tmp_path / "x") if place == "local" else f"memory://{uuid.uuid4().hex}/x"
    for name in ("a.mp4", "a.mov", "sub/b.mp4", "sub/deep/c.mp4"):
        storage.publish_bytes(f"{root}/{name}", b"")
    rows, _ = read_source(f"{root}/{pattern}", caption_strategy="filename")
    assert [row.uri for row in rows] == [f"{root}/{name}" for name in names]


@pytest.mark.parametrize(
    ("keys", "captions"),
    [
        ({}, ("first line\nsecond line",)),
        ({"caption_lines": True}, ("first line", "second line")),
        ({"caption_strategy": "filename"}, ("A red fox",)),
        ({"caption_strategy": "json"}, ("one", "two")),
        ({"caption_strategy": "instance", "instance_prompt": "sks fox"}, ("sks fox",)),
    ],
)
def test_caption_strategies(tmp_path: Path, keys: dict[str, Any], captions: tuple[str, ...]) -> None:
    name = "A_red-fox"
    files = {
        f"{name}.mp4": "",
        f"{name}.txt": "first line\n\nsecond line\n",
        f"{name}.json": '{"caption": ["one", "two"]}',
    }
    root = folder(tmp_path, {**files})
    (row,), _ = read_source(root, **keys)
    # Without empty lines, however many: only their number is not compared.
    assert tuple(caption.replace("\n\n", "\n") for caption in row.captions) == captions
    (row,), _ = read_source(manifest(tmp_path, "m.jsonl", [{"uri": f"{name}.mp4", "caption": ["a", "b"]}]))
    assert row.captions == ("a", "b")
    if keys:
        keys = {"caption_strategy": "textfile", **keys}
        (row,), _ = read_source(f"{tmp_path}/m.jsonl", **keys)
        assert row.captions == captions, "a manifest's clips may have their captions beside them"


def test_a_manifest_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "UTF-8" in refusal(folder(tmp_path, {"clips.csv": b"uri,caption\na.mp4,H\xfcndchen\n"}) + "/clips.csv").rule


def test_a_caption_may_hold_any_character(tmp_path: Path) -> None:
    """JSON allows U+2028, U+0085 and their like inside a string, though Python calls them ends of lines."""
    caption = "one\u2028two\u0085three"
    rows, _ = read_source(manifest(tmp_path, "clips.jsonl", [{"uri": "a.mp4", "caption": caption}]))
    assert [row.captions[0] for row in rows] == [caption]


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
