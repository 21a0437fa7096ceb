"""Mappings into frozen dataclasses, and the error that a user can mend.

The generic half of the configuration: `build` checks names and types, `one_of` and `positive` are rules that many keys
share. What the keys mean is said in `k5dist.config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(Exception):
    """An error the user can mend: which key, its value, the rule it breaks and what to write instead."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        self.key, self.value, self.rule, self.fix = key, value, rule, fix
        super().__init__(f"{key}={value!r}: {rule}. {fix}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        return type(self), (self.key, self.value, self.rule, self.fix)  # it crosses process borders

    def block(self) -> str:
        rows = (("key", self.key), ("value", repr(self.value)), ("rule", self.rule), ("fix", self.fix))
        return "\n".join(["Configuration error", *(f"  {name:<5} {text}" for name, text in rows)])


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.4)


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        guess = nearest(str(value), allowed, 1)
        raise ConfigError(key, value, f"one of {', '.join(allowed)}", f"{key}={guess[0] if guess else allowed[0]}")


def positive(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(key, value, "a finite number greater than 0", f"{key}=1")


def check_names(mapping: Mapping[str, Any], names: Iterable[str], path: str) -> None:
    """Raises ConfigError, with the nearest of `names`, for a key of `mapping` that is none of them."""
    names = tuple(names)
    for key in mapping:
        if key not in names:
            near = nearest(str(key), names) or sorted(names)
            rule = f"no such key{f' in {path[:-1]}' if path else ''}"
            fix = "did you mean " + ", ".join(path + name for name in near) + "?"
            raise ConfigError(f"{path}{key}", mapping[key], rule, fix)


def build(cls: type, mapping: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    check_names(mapping, fields, path)
    values = {}
    for name in fields:
        if name not in mapping:
            raise ConfigError(f"{path}{name}", None, "the key is missing", f"set {path}{name}")
        values[name] = _convert(hints[name], mapping[name], f"{path}{name}")
    return cls(**values)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint` says it: nested dataclasses, mappings, tuples of scalars, scalars and unions of those."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(key, value, "a group of keys", f"set the keys below {key}")
        return build(typing.cast(type, hint), value, f"{key}.")
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, key)
    if not _fits(hint, value):
        raise ConfigError(key, value, f"must be {_describe(hint)}", f"see {key} in conf/")
    if origin is Mapping:
        item = typing.get_args(hint)[1]
        if item is Any:
            return dict(value)
        return {str(name): _convert(item, child, f"{key}.{name}") for name, child in value.items()}
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{key}[{i}]") for i, v in enumerate(value))
    return float(value) if hint is float else value


def _convert_union(hint: Any, value: Any, key: str) -> Any:
    """`value` as the first of the union's types that it fits."""
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is not type(None) and _fits(option, value):
            return _convert(option, value, key)
    raise ConfigError(key, value, f"must be {_describe(hint)}", f"see {key} in conf/")


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple))
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list, each item " + _describe(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Mapping:
        return "a group of keys"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}.get(
        hint, str(hint)
    )
