"""Checkpoints shared by all tests: tiny and random, yet written by the real classes. Built once a session."""

from pathlib import Path

import pytest

from k5dist.compose import compose, to_run_config
from k5dist.model.tiny import build_tiny_checkpoint

NABLA = [
    *["model.attention_type=nabla", "model.attention_P=0.6", "model.attention_add_sta=true"],
    *["model.attention_wT=3", "model.attention_wW=1", "model.attention_wH=1", "data.resolution=[128,128]"],
]


def _checkpoint(folder: Path, task: str, overrides: list[str]) -> Path:
    config = to_run_config(compose([f"+flavour={task}-tiny", *overrides]))
    build_tiny_checkpoint(folder, task=task, architecture=config.to_mapping()["model"])
    return folder


@pytest.fixture(scope="session")
def tiny_t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("tiny") / "t2v", "t2v", [])


@pytest.fixture(scope="session")
def tiny_i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("tiny") / "i2v", "i2v", [])


@pytest.fixture(scope="session")
def tiny_nabla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("tiny") / "nabla", "t2v", NABLA)
