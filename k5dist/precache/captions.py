"""Where a clip's captions come from, and which texts are none. Nothing here trusts what it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from k5dist.datasets import DatasetConfig

MAX_CAPTION = 20_000  # characters: no encoder keeps more than a few hundred tokens of them
MAX_SIDECAR_BYTES = 2**20
SIDECARS = {"textfile": ".txt", "json": ".json"}  # the file beside a clip, by caption strategy
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # with line ends and tabs left out: what only binary data has


class BadCaption(Exception):
    """A clip that cannot be used for its caption; the message says why."""


def captions_of(
    dataset: DatasetConfig, uri: str, entry: Mapping[str, Any] | None, read: Callable[[str], bytes]
) -> tuple[str, ...]:
    """All captions of one clip, at least one.

    `entry` is the clip's row of a manifest, None in a folder; `read` gives the bytes of the file beside the clip with
    the suffix that it is given, and raises FileNotFoundError where there is none.

    Raises:
        BadCaption: where there is no caption, or something that is none.
    """
    strategy = dataset.captions_from
    if strategy == "manifest":
        found = (entry or {}).get("caption")
        if found is None or found == "":
            raise BadCaption("the row has no caption")
        return checked(found, "the row has no caption")
    if strategy == "filename":
        words = re.sub(r"[\s_-]+", " ", PurePosixPath(uri).stem).strip()
        return checked(words, "its name holds no words")
    if strategy == "instance":
        return checked(dataset.instance_prompt, "data.instance_prompt is empty")
    suffix = SIDECARS[strategy]
    try:
        data = read(suffix)
    except FileNotFoundError:
        name = PurePosixPath(uri).with_suffix(suffix).name
        raise BadCaption(f"no caption: there is no {name} beside it") from None
    if len(data) > MAX_SIDECAR_BYTES:
        raise BadCaption(f"its caption file is larger than {MAX_SIDECAR_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadCaption("its caption file is not UTF-8 text") from None
    empty = "its caption file is empty"
    if strategy == "json":
        return checked(_json_caption(text), empty)
    return checked(
        [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()] if dataset.caption_lines else text, empty
    )


def _json_caption(text: str) -> object:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BadCaption("its caption file is not JSON") from None
    if not isinstance(found, dict) or "caption" not in found:
        raise BadCaption('its caption file is no object with the key "caption"')
    return found["caption"]


def checked(found: object, empty: str) -> tuple[str, ...]:
    """A caption or a list of captions, stripped, each once; BadCaption with the reason `empty` where none is left."""
    captions = []
    for caption in found if isinstance(found, (list, tuple)) else [found]:
        if not isinstance(caption, str):
            raise BadCaption("its caption is not text")
        captions.append(_checked_text(caption))
    captions = list(dict.fromkeys(caption for caption in captions if caption))
    if not captions:
        raise BadCaption(empty)
    return tuple(captions)


def _checked_text(caption: str) -> str:
    if len(caption) > MAX_CAPTION:
        raise BadCaption(f"its caption has {len(caption):,} characters, more than {MAX_CAPTION:,}")
    if not is_text(caption):
        raise BadCaption("its caption is not UTF-8 text but binary data")
    return caption.strip()


def is_text(value: str) -> bool:
    """Whether it can be stored as UTF-8 and has no control characters but line ends and tabs."""
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: what was decoded were no UTF-8 bytes
        return False
    return not _CONTROL.search(value)
