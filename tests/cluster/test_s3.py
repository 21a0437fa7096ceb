"""The whole main job on object storage: a real S3 server on loopback, and nothing on the local disk but scratch."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from mlflow import MlflowClient

from tests.cluster import job as jobs
from tests.cluster.job import SHORT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
KEY, SECRET, BUCKET = "tests-access-key", "tests-secret-key-0123456789", "k5dist-tests"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh S3 server with one empty bucket."""
    folder = tmp_path_factory.mktemp("s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["rclone", "serve", "s3", "--addr", address, "--auth-key", f"{KEY},{SECRET}", str(folder)]
    server = subprocess.Popen(command, env={"RCLONE_CONFIG": "/dev/null", "PATH": _path()}, stderr=subprocess.DEVNULL)
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        _until_it_answers(address)
        client(environment).create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.terminate()
        server.wait(timeout=10)


def _path() -> str:
    import os
    import sys

    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _until_it_answers(address: str) -> None:
    host, port = address.split(":")
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the S3 server did not start")


def client(environment: dict[str, str]):
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def objects(environment: dict[str, str]) -> dict[str, int]:
    pages = client(environment).get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}


def test_the_main_job_lives_in_a_bucket(s3: dict[str, str], tmp_path: Path) -> None:
    home, work, scratch = tmp_path / "home", tmp_path / "work", tmp_path / "scratch"
    for folder in (home, work, scratch):
        folder.mkdir()
    environment = {**s3, "HOME": str(home), "TMPDIR": str(scratch)}
    tracking = f"tracking.uri=sqlite:///{scratch}/mlflow.db"
    job = jobs.run(f"s3://{BUCKET}/root", *SHORT, "name=whole", tracking, env=environment, cwd=work)
    assert job.process.returncode == 0, job.output

    found = objects(s3)
    run = "root/runs/whole"
    assert f"{run}/plan.json" in found
    assert f"{run}/checkpoints/step-00000012/COMMITTED" in found
    assert f"{run}/export/pytorch_lora_weights.safetensors" in found
    assert f"{run}/validation/step-00000012/00.mp4" in found
    assert any(key.startswith("root/cache/") and key.endswith(".safetensors") for key in found)
    assert any(key.startswith("root/cache/") and "/index/" in key for key in found)
    artifacts = {key.split("/artifacts/")[1] for key in found if key.startswith("root/mlartifacts/")}
    assert {"config.yaml", "plan.json", "videos/step-00000012/00.mp4", "logs/train.log"} <= artifacts

    assert [p for p in work.rglob("*") if p.is_file()] == []
    kept = {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()}
    own = {name for name in kept if not name.startswith((".cache/k5dist/pretrained/", ".ray/", ".config/"))}
    assert own == set(), "but for copies of encoders and what Ray keeps of itself"
    left = [p.name for p in scratch.iterdir() if p.name.startswith("k5dist-")]
    assert left == [], "scratch is cleaned up"

    for place in (job.output, *_texts(s3, run)):
        assert SECRET not in place
    status = MlflowClient(f"sqlite:///{scratch}/mlflow.db").search_runs(["1"])[0].info.status
    assert status == "FINISHED"


def _texts(environment: dict[str, str], run: str) -> list[str]:
    s3 = client(environment)
    return [
        s3.get_object(Bucket=BUCKET, Key=f"{run}/{n}")["Body"].read().decode() for n in ("plan.json", "config.yaml")
    ]
