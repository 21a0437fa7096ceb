"""A real S3 server on loopback: rclone over a local folder."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
from botocore.config import Config

KEY, SECRET, BUCKET = "tests-access-key", "tests-secret-key-0123456789", "k5dist-tests"


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh server with one empty bucket, which is a folder below `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["rclone", "serve", "s3", "--addr", address, "--auth-key", f"{KEY},{SECRET}", str(folder)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(command, env={"RCLONE_CONFIG": "/dev/null", "PATH": path}, stderr=subprocess.DEVNULL)
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
        process.terminate()
        process.wait(timeout=10)


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
