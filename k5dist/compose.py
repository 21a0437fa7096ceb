"""Hydra's composition of `conf/` and of what is typed behind a command. The edge: nothing below knows Hydra."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k5dist.config import ConfigError, RunConfig, nearest

DEFAULT_FLAVOUR = "t2v-lite-sft-5s"
# Groups whose keys are the user's own.
_FREE_NAMES = re.compile(r"^\+{0,2}(?=(data\.datasets|kubernetes\.(node_selector|environment))[.=])")


def config_folder() -> Path:
    """`conf/`: inside an installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def flavours() -> list[str]:
    return sorted(path.stem for path in (config_folder() / "flavour").glob("*.yaml"))


def expand_files(arguments: list[str]) -> list[str]:
    """`@file.json` stands for the arguments that the file lists: those that no shell shall read on their way.

    Raises:
        ConfigError: where such a file is no JSON list of texts.
    """
    expanded: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            expanded.append(argument)
            continue
        rule = "@ and a file that holds a JSON list of overrides"
        try:
            listed = json.loads(Path(argument[1:]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError("command line", argument, f"{rule} ({error})", "name such a file") from error
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise ConfigError("command line", argument, rule, 'write ["+flavour=t2v-tiny", "train.steps=10"]')
        expanded += listed
    return expanded


def normalise_arguments(arguments: list[str]) -> list[str]:
    """Hydra wants the flavour appended (`+flavour=`) and exactly once; people write `flavour=`, or none.

    Datasets, labels and variables have names that conf/ does not know: they may be set with a + and without.
    """
    arguments = [re.sub(r"^flavour=", "+flavour=", argument) for argument in arguments]
    arguments = [_FREE_NAMES.sub("++", argument) for argument in arguments]
    if not any(argument.startswith("+flavour=") for argument in arguments):
        arguments.insert(0, f"+flavour={DEFAULT_FLAVOUR}")
    return arguments


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """The runs of a sweep, as Hydra's grid has them: all combinations of `key=a,b`, `range()`, `choice()`, `glob()`.

    Raises:
        ConfigError: for what cannot be parsed, and where nothing is swept.
    """
    overrides = normalise_arguments(overrides)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
            axes = [_values(override) for override in parsed]
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition_error(error, overrides, "config") from error
    if all(len(axis) == 1 for axis in axes):
        fix = "optimizer.lr=1e-5,3e-5 with -m; without -m for a single run"
        raise ConfigError("--multirun", " ".join(overrides), "no key has several values", fix)
    return [list(combination) for combination in itertools.product(*axes)]


def _values(override: Override) -> list[str]:
    """The overrides of one value each that `override` stands for."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if not override.is_discrete_sweep():
        fix = "a list (a,b), range(), choice() or glob()"
        raise ConfigError(override.get_key_element(), override.input_line, "a grid needs single values", fix)
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def compose(overrides: list[str], config_name: str = "config") -> DictConfig:
    """The composed configuration of a run, or of another entry of `conf/` (a benchmark).

    Raises:
        ConfigError: for unknown flavours, unknown keys and values that cannot be parsed.
    """
    overrides = normalise_arguments(overrides)
    GlobalHydra.instance().clear()
    for override in overrides:
        name = override.removeprefix("+flavour=")
        if name != override and name not in flavours():
            near = nearest(name, flavours()) or flavours()
            raise ConfigError("flavour", name, "no such flavour", "did you mean " + ", ".join(near) + "?")
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            return hydra.compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition_error(error, overrides, config_name) from error


def _composition_error(error: Exception, overrides: list[str], config_name: str) -> ConfigError:
    text = " ".join(str(part) for part in (error, error.__cause__) if part)
    choice = re.search(r"Could not find '(\w+)/(\S+?)'", text)
    if choice:
        group, name = choice.groups()
        choices = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
        return ConfigError(
            group, name, "no such choice", f"did you mean {', '.join(nearest(name, choices) or choices)}?"
        )
    match = re.search(r"Could not override '([\w.@/-]+)'", text)
    if match is None:
        rule = str(error).strip().splitlines()[0]
        return ConfigError("command line", " ".join(overrides), rule, "overrides are written key=value")
    key = match[1]
    value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), None)
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        known = _leaf_keys(OmegaConf.to_container(hydra.compose(config_name, overrides=["+flavour=t2v-tiny"])), "")
    near = nearest(key, known)
    fix = f"did you mean {', '.join(near)}?" if near else "keys and their meanings stand in conf/config.yaml"
    return ConfigError(key, value, "no such key", fix)


def _leaf_keys(node: Any, path: str) -> list[str]:
    if not isinstance(node, dict):
        return [path[:-1]]
    return [key for name, child in node.items() for key in _leaf_keys(child, f"{path}{name}.")]


def to_run_config(composed: DictConfig) -> RunConfig:
    """The validated configuration; interpolations resolved, unset required keys named."""
    plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    return RunConfig.from_mapping({str(key): value for key, value in plain.items() if key != "hydra"})
