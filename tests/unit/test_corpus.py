"""Every file of the corpus through probe and decode, in a child process whose memory is bounded.

A crash of FFmpeg is a crash of the child: it is noticed, the file named, and the rest goes on in another child.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from k5dist.precache.video import VideoError, decode_clip, probe
from tests.corpus import CASES, Case, write_corpus

GIB = 1 << 30
MEMORY = 4 * GIB  # of address space above what the idle child has
SECONDS = 10.0  # for each of probe and decode
HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 9


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each case: its stage and reason, or its shapes, and its seconds; "crash" where the child died."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    left, found = list(CASES), {}
    while left:
        command = [sys.executable, "-m", "tests.unit.test_corpus", str(folder), json.dumps(left)]
        budget = SECONDS * 3 + len(left)
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=budget, check=False)
            said, ended = child.stdout, f"exit status {child.returncode}: {child.stderr[-2000:]}"
        except subprocess.TimeoutExpired as error:
            said, ended = (error.stdout or b"").decode(), "took too long"
        for line in said.splitlines():
            found |= json.loads(line)
        left = [name for name in left if name not in found]
        if left:
            found[left.pop(0)] = {"crash": ended}
    return found


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_each_file_comes_to_what_is_declared(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    case, outcome = CASES[name], outcomes[name]
    assert "crash" not in outcome, outcome["crash"]
    assert max(outcome["seconds"]) < SECONDS
    if case.stage:
        assert outcome["probe" if case.stage == "probe" else "decode"] == [case.stage, outcome["reason"]]
        assert case.reason in outcome["reason"]
        assert "\n" not in outcome["reason"]
        # A file that cannot be probed cannot be decoded, and one that cannot be decoded was probed.
        assert (outcome["probe"] is None) == (case.stage == "decode")
        assert outcome["decode"] is not None
        return
    assert outcome["probe"] is None, outcome["probe"]
    assert outcome["decode"] is None, outcome["decode"]
    assert outcome["shape"] == [min(NUM_FRAMES, case.frames), HEIGHT, WIDTH, 3]
    if case.excess:  # what is left of a damaged file: its end may be damage as well
        assert outcome["more"] not in (None, "")
    elif case.frames < NUM_FRAMES:
        assert "too short" in outcome["more"]


def look(path: str, case: Case) -> dict[str, Any]:
    """Probe a file and decode min(frames, NUM_FRAMES) of its frames, then more than it has, where that is few."""
    found: dict[str, Any] = {"probe": None, "decode": None, "reason": "", "seconds": []}
    rate = 24.0
    wanted: dict[str, Any] = {"start": 0, "end": None, "height": HEIGHT, "width": WIDTH}
    began = time.monotonic()
    try:
        rate = probe(path).frame_rate or rate
    except VideoError as error:
        found |= {"probe": [error.stage, error.reason], "reason": error.reason}
    found["seconds"].append(time.monotonic() - began)
    began = time.monotonic()
    try:
        clip = decode_clip(path, num_frames=min(case.frames, NUM_FRAMES), frame_rate=rate, **wanted)
        found["shape"] = list(clip.shape)
    except VideoError as error:
        found["decode"] = [error.stage, error.reason]
        found["reason"] = found["reason"] or error.reason
    if found["decode"] is None and (case.excess or case.frames < NUM_FRAMES):
        try:
            decode_clip(path, num_frames=case.excess or case.frames + 1, frame_rate=rate, **wanted)
            found["more"] = ""
        except VideoError as error:
            found["more"] = error.reason
    found["seconds"].append(time.monotonic() - began)
    return found


def main(folder: str, names: list[str]) -> None:
    """The child: one line of JSON a file, as soon as it is known."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        print(json.dumps({name: look(f"{folder}/{name}", CASES[name])}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
