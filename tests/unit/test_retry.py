"""Which errors are a store's moment and which a file's, and how long anyone waits."""

from __future__ import annotations

import errno
import pickle
import time
import uuid
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from s3fs.errors import translate_boto_error

from k5dist import retry, storage
from k5dist.retry import StorageUnavailable, is_passing, patiently


def answered(status: int, code: str) -> Exception:
    response = {"Error": {"Code": code, "Message": "…"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "GetObject"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (answered(500, "InternalError"), True),
        (answered(503, "SlowDown"), True),
        (answered(503, "SomethingElse"), True),
        (answered(400, "RequestTimeout"), True),
        (answered(429, "TooManyRequests"), True),
        (answered(404, "NoSuchKey"), False),
        (answered(403, "AccessDenied"), False),
        (answered(400, "InvalidArgument"), False),
        (answered(501, "NotImplemented"), False),
        (EndpointConnectionError(endpoint_url="http://s3"), True),
        (ReadTimeoutError(endpoint_url="http://s3"), True),
        (NoCredentialsError(), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError(), True),
        (OSError(errno.ESTALE, "stale handle"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("no video"), False),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:60],
)
def test_what_passes_and_what_stays(error: Exception, passing: bool) -> None:
    assert is_passing(error) is passing


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    return work


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv(retry.SECONDS_VARIABLE, "0.5")


def test_a_stumble_is_forgotten() -> None:
    assert patiently("s3://b/x", failing(4, answered(503, "SlowDown"))) == "done"


def test_a_store_that_stays_away_is_one_line() -> None:
    begin = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        patiently("s3://b/x", failing(10**6, answered(503, "SlowDown")))
    assert 0.5 <= time.monotonic() - begin < 2
    assert "\n" not in str(caught.value) and "s3://b/x" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_file_that_is_not_there_is_looked_for_again_only_where_asked() -> None:
    with pytest.raises(FileNotFoundError):
        patiently("s3://b/x", failing(1, FileNotFoundError()))
    assert patiently("s3://b/x", failing(3, FileNotFoundError()), appears=True) == "done"
    with pytest.raises(FileNotFoundError):
        patiently("s3://b/x", failing(10**6, FileNotFoundError()), appears=True)


def test_an_open_file_is_read_again_and_says_what_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{uuid.uuid4().hex}/file"
    storage.publish_bytes(uri, bytes(range(100)))
    fs, path = storage.filesystem(uri)
    stumbles = [2]

    class Stumbling:
        def __init__(self) -> None:
            self.file = fs._open(path, "rb")
            self.seek, self.tell, self.close = self.file.seek, self.file.tell, lambda: None

        def read(self, size: int) -> bytes:
            data = self.file.read(size)
            if stumbles[0]:
                stumbles[0] -= 1
                raise answered(500, "InternalError")
            return data

    monkeypatch.setattr(type(fs), "open", lambda *_, **__: Stumbling())
    with storage.open_read(uri) as file:
        file.seek(10)
        assert file.read(5) == bytes(range(10, 15))
        assert file.tell() == 15
    stumbles[0] = 10**6
    with pytest.raises(StorageUnavailable):
        _decoded_in_vain(uri)


def _decoded_in_vain(uri: str) -> None:
    with storage.open_read(uri) as file:
        try:
            file.read(5)
        except StorageUnavailable:
            raise ValueError("a decoder took it for the end of the file") from None


def test_many_ranges_raise_what_one_of_them_met(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{uuid.uuid4().hex}/file"
    storage.publish_bytes(uri, bytes(range(100)))
    assert storage.read_ranges(uri, [(0, 2), (98, 100)]) == [b"\x00\x01", b"\x62\x63"]
    assert storage.size(uri) == 100
    with pytest.raises(FileNotFoundError):
        storage.read_ranges(uri + "-not", [(0, 2)])
