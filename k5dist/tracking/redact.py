"""Keeps credentials out of what a run shows the world: parameters, tags, configuration files and tracebacks.

A tracking store is read by many more people than the machine that trains, and its artifacts outlive every rotation of
keys. Values are judged by their key, text by its shape: `scheme://user:password@host` and `some_secret=value`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"

_SECRET_KEY = re.compile(r"passw(or)?d|passphrase|secret|credential|(access|api|private|account)[_\-.]?key", re.I)
# `max_tokens` and `tokenizer` are not secrets, `hf_token` and `authToken` are: only the end of a key counts.
_SECRET_END = re.compile(r"(token|signature)$", re.I)
# Greedy up to the last @ before a slash: a password may hold an @ of its own. A user without a password is redacted
# for http(s) alone, where it is usually a token; elsewhere it is a name.
_URI_LOGIN = re.compile(r"([a-z][a-z0-9+.\-]*://)[^\s/:@'\"]*:[^\s/'\"]*@|(https?://)[^\s/@'\"]+@", re.I)
_ASSIGNMENT = re.compile(r"([\w.+\-]+)=([^\s&,;'\"]+)")


def is_secret_key(key: str) -> bool:
    """Whether what stands under `key` is a credential, to judge by the name."""
    return bool(_SECRET_KEY.search(key) or _SECRET_END.search(key))


def redact_uris(text: str) -> str:
    """`text` with the login of every URI replaced; otherwise unchanged, so that a diff still applies."""
    return _URI_LOGIN.sub(lambda match: f"{match[1] or match[2]}{REDACTED}@", text)


def redact_text(text: str) -> str:
    """`text` without URI logins and without the values of `secret=value` (command lines, presigned URLs)."""

    def assignment(match: re.Match[str]) -> str:
        return f"{match[1]}={REDACTED}" if is_secret_key(match[1]) else match[0]

    return _ASSIGNMENT.sub(assignment, redact_uris(text))


def redact_value(key: str, value: Any) -> Any:
    """`value` with everything secret in it replaced, at any depth. None and empty values show that nothing is set."""
    if isinstance(value, Mapping):  # the path is the key: all below `credentials` is secret
        return {name: redact_value(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_value(key, item) for item in value]
    if value is None or value == "" or isinstance(value, bool):
        return value
    is_count = isinstance(value, (int, float)) and not _SECRET_KEY.search(key)  # a numeric `…token` is an id or a limit
    if is_secret_key(key) and not is_count:
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


def redact_json(text: str) -> str:
    """A JSON document without secrets; returned as it was where there are none."""
    document = json.loads(text)
    clean = redact_value("", document)
    return text if clean == document else json.dumps(clean, indent=2)


def redact_yaml(text: str) -> str:
    """A YAML document without secrets; returned with its comments where its values hold none."""
    import yaml

    document = yaml.safe_load(text)
    clean = redact_value("", document)
    return redact_text(text) if clean == document else yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)
