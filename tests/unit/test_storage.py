"""The seam to storage: whole or not at all, the same verbs on a local folder and on an object store, clear refusals."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from k5dist import storage
from k5dist.config import ConfigError

MIB = 2**20


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place: a local folder, and fsspec's memory as the stand-in for object stores."""
    return str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root"


def test_what_is_published_is_read_back(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.publish_bytes(uri, b"0123456789")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 2, 5) == b"234"
    with storage.open_read(uri) as file:
        file.seek(8)
        assert file.read() == b"89"
    storage.publish_bytes(uri, "größer".encode())
    assert storage.read_text(uri) == "größer"


def test_listing_names_what_is_there(root: str) -> None:
    for name in ("b.txt", "a/1.txt", "a/deep/2.txt"):
        storage.publish_bytes(storage.join(root, name), name.encode())
    assert storage.list_folder(root) == ["a", "b.txt"]
    assert storage.list_folder(root + "/") == ["a", "b.txt"]
    assert set(storage.find(root)) == {"b.txt", "a/1.txt", "a/deep/2.txt"}
    assert storage.sizes(root) == {"b.txt": 5, "a/1.txt": 7, "a/deep/2.txt": 12}


def test_a_missing_folder_is_empty(root: str) -> None:
    assert storage.list_folder(storage.join(root, "none")) == []
    assert storage.find(storage.join(root, "none")) == {}
    storage.remove(storage.join(root, "none"))


def test_a_listing_is_never_stale(root: str) -> None:
    assert storage.list_folder(root) == []
    storage.publish_bytes(storage.join(root, "new"), b"")
    assert storage.list_folder(root) == ["new"]
    storage.remove(root)
    assert storage.list_folder(root) == []


def test_a_folder_is_published_and_fetched(root: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for name in ("marker.json", "z.bin", "sub/x.bin"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(name.encode())
    storage.publish_folder(made, root, last="marker.json")
    local = storage.fetch_folder(root, tmp_path / "copy")
    found = {path.relative_to(local).as_posix(): path.read_text() for path in local.rglob("*") if path.is_file()}
    assert found == {name: name for name in ("marker.json", "z.bin", "sub/x.bin")}
    assert (local == tmp_path / "copy") == (not storage.is_local(root))


def test_the_marker_of_a_folder_goes_last(tmp_path: Path) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    for name in ("a.json", "z.bin"):
        (made / name).write_bytes(b"")
    (target / "z.bin").mkdir(parents=True)  # a folder in its place: this file cannot be published
    with pytest.raises(OSError, match=r"z\.bin"):
        storage.publish_folder(made, str(target), last="a.json")
    assert not (target / "a.json").exists()


def test_fetching_again_copies_only_what_changed(tmp_path: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/folder"
    storage.publish_bytes(f"{uri}/same", b"same")
    storage.publish_bytes(f"{uri}/torn", b"whole")
    local = storage.fetch_folder(uri, tmp_path)
    before = (local / "same").stat()
    (local / "torn").write_bytes(b"wh")
    storage.fetch_folder(uri, tmp_path)
    assert (local / "torn").read_bytes() == b"whole"
    assert ((local / "same").stat().st_ino, (local / "same").stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def publish_on_a_full_disk(uri: Path) -> None:
    """Publish 4 MiB from a process that may write no file beyond 64 KiB; it fails in the middle of writing."""
    code = (
        "import resource, sys\n"
        "from k5dist import storage\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    storage.publish_bytes(sys.argv[1], bytes(4 * 2**20))\n"
        "except OSError:\n"
        "    sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(uri)], timeout=60, check=False).returncode == 3


def test_an_interrupted_publication_shows_nothing(tmp_path: Path) -> None:
    publish_on_a_full_disk(tmp_path / "file")
    assert not storage.exists(str(tmp_path / "file"))
    assert storage.list_folder(str(tmp_path)) == []


def test_an_interrupted_publication_is_not_found_either(tmp_path: Path) -> None:
    publish_on_a_full_disk(tmp_path / "file")
    (tmp_path / f".k5dist-tmp-{uuid.uuid4().hex}").write_bytes(b"of a process that was killed")
    assert storage.find(str(tmp_path)) == {}


def test_a_failed_publication_cleans_up(tmp_path: Path) -> None:
    publish_on_a_full_disk(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_beside_a_killed_writer_sees_whole_files(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from k5dist import storage\n"
        "while True:\n"
        "    for letter in (b'a', b'b'):\n"
        "        storage.publish_bytes(sys.argv[1], letter * 2**20)\n"
    )
    file = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", code, str(file)]) as writer:
        try:
            deadline = time.monotonic() + 30
            while not file.exists():
                assert time.monotonic() < deadline
            seen = [storage.read_bytes(str(file))]
            while len({data[:1] for data in seen}) < 2 or len(seen) < 20:
                assert time.monotonic() < deadline
                seen.append(storage.read_bytes(str(file)))
        finally:
            writer.kill()
    seen.append(storage.read_bytes(str(file)))
    assert {(len(data), len(set(data))) for data in seen} == {(MIB, 1)}
    assert {data[:1] for data in seen} == {b"a", b"b"}


def test_package_data_is_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_that_cannot_be_imported"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "clip.bin").write_bytes(b"clip")
    monkeypatch.syspath_prepend(str(tmp_path))
    uri = "package://package_that_cannot_be_imported/data/clip.bin"
    assert storage.read_bytes(uri) == b"clip"
    assert storage.is_local(uri)
    assert storage.normalise(uri) == str(package / "data" / "clip.bin")
    assert storage.stable_name(uri) == uri  # the same on every machine
    assert package.name not in sys.modules


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_package") as caught:
        storage.check_readable("data.source", "package://no_such_package/clip.mp4")
    assert "pip install" in caught.value.fix


def test_spellings_of_one_place_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = ("data", "data/", "./data", "~/data", f"{tmp_path}/data", f"file://{tmp_path}/data")
    assert {storage.normalise(uri) for uri in spellings} == {str(tmp_path / "data")}
    assert storage.normalise("s3://bucket/data/") == "s3://bucket/data"
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"


def test_a_writable_place_passes_and_stays_as_it_was(root: str) -> None:
    storage.publish_bytes(storage.join(root, "file"), b"")
    storage.check_writable("storage.root", root)
    storage.check_readable("data.source", root)
    assert set(storage.find(root)) == {"file"}


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = str(tmp_path / "file" / "folder")
    with pytest.raises(ConfigError, match="must be writable") as caught:
        storage.check_writable("storage.root", below)
    assert (caught.value.key, caught.value.value) == ("storage.root", below)
    assert "folder" in caught.value.fix


def test_nothing_there_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="nothing at this place") as caught:
        storage.check_readable("data.source", storage.join(root, "none"))
    assert caught.value.key == "data.source"


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        storage.check_writable("storage.root", "carrier-pigeon://coop")


@pytest.mark.parametrize("check", [storage.check_writable, storage.check_readable])
def test_an_object_store_that_does_not_answer_is_refused_in_seconds(
    check: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert callable(check)
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check("storage.root", f"s3://{uuid.uuid4().hex}/folder")
    assert time.monotonic() - start < 20
    assert caught.value.key == "storage.root"
    assert "AWS_ENDPOINT_URL" in caught.value.fix
    assert "not-a-secret" not in caught.value.block()
