"""Storage that stumbles is asked again: backoff with jitter, up to a bounded time, and then one readable error.

What a store answers is one of three things: it stumbles (500, 503, a timeout, a closed connection), which says nothing
about the file; it knows no such file, which a store with slow listings also says for a moment after a write; or it
refuses for good. Only the last two are facts about a file.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

SECONDS_VARIABLE = "K5DIST_STORAGE_RETRY_SECONDS"
DEFAULT_SECONDS = 300.0
APPEARS_SECONDS = 1.0  # a file that is not there is looked for again this long
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_PASSING_ERRNOS = {
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "EBUSY", "EAGAIN", "ETIMEDOUT", "ESTALE", "EPIPE", "ECONNRESET", "ECONNREFUSED"),
        *("ECONNABORTED", "ENETUNREACH", "ENETDOWN", "EHOSTUNREACH", "EHOSTDOWN"),
    )
    if hasattr(errno, name)
}
# Of botocore, aiohttp and their likes, by name: none of them is imported where nothing is remote.
_PASSING_NAMES = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "IncompleteRead", "ResponseStreamingError"),
    *("ResponseParserError", "ClientPayloadError", "ClientConnectionError", "HttpProcessingError"),
}
_PASSING_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded"}
T = TypeVar("T")


class StorageUnavailable(Exception):
    """Storage did not answer for as long as is waited for it: the job's fault, never a clip's."""

    def __init__(self, uri: str, reason: str, seconds: float) -> None:
        self.uri, self.reason, self.seconds = uri, reason, seconds
        super().__init__(
            f"storage did not answer for {seconds:.0f} s at {uri} ({reason}); the same command goes on from what is "
            f"there ({SECONDS_VARIABLE} says how long is waited)"
        )

    def __reduce__(self) -> tuple[type[StorageUnavailable], tuple[str, str, float]]:
        return type(self), (self.uri, self.reason, self.seconds)  # it crosses process borders


def retry_seconds() -> float:
    try:
        return float(os.environ.get(SECONDS_VARIABLE, DEFAULT_SECONDS))
    except ValueError:
        return DEFAULT_SECONDS


def patiently(uri: str, work: Callable[[], T], *, appears: bool = False) -> T:
    """What `work` returns; it is done again while storage stumbles.

    With `appears` a file that is not there is looked for again for a moment.

    Raises:
        StorageUnavailable: when it stumbles for longer than `retry_seconds()`.
    """
    begin, wait = time.monotonic(), _FIRST_WAIT
    while True:
        try:
            return work()
        except Exception as error:
            waited = time.monotonic() - begin
            if appears and isinstance(error, FileNotFoundError):
                if waited >= APPEARS_SECONDS:
                    raise
            elif not is_passing(error):
                raise
            elif waited >= retry_seconds():
                raise StorageUnavailable(uri, one_line(error), waited) from error
        time.sleep(wait * random.uniform(0.5, 1.0))  # many workers must not come back as one
        wait = min(2 * wait, _LONGEST_WAIT)


def is_passing(error: BaseException) -> bool:
    """Whether `error` says something about storage's moment, not about the file."""
    if isinstance(error, _LASTING):
        return False
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = response.get("Error", {}).get("Code")
        return status in (408, 429) or (status >= 500 and status != 501) or code in _PASSING_CODES
    if error.__cause__ is not None and is_passing(error.__cause__):
        return True
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
        return True
    return bool(_PASSING_NAMES & {cls.__name__ for cls in type(error).__mro__})


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
