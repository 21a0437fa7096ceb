"""What is told of runs from their folders, local and on object storage; a run that runs: tests/cluster/test_runs.py."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
import uuid
from pathlib import Path

import psutil
import pytest

from k5dist import storage
from k5dist.cluster import record as records
from k5dist.cluster.logs import LogFile, LogReader
from k5dist.cluster.record import DriverRecord, read_record, write_record
from k5dist.config import ConfigError
from k5dist.runs.__main__ import main
from k5dist.runs.facts import Place, RunFacts, details, find_run, list_runs
from k5dist.runs.stop import stop

NOW = time.time()
RUNNING = DriverRecord(state="running", began=NOW, beat=NOW, host="another-machine", pid=1, pid_started=1.0)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_log_is_read_as_it_grows(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k5dist.cluster.logs._CHUNK", 1000)  # several objects
    written, reader = LogFile(root, "driver"), LogReader(root, "driver")
    LogFile(root, "ranks").write("another log")
    seen = []
    for start in range(0, 300, 30):
        for number in range(start, start + 30):
            written.write(f"line {number} ä")
        written.flush()
        seen += list(reader.read())
        assert seen[-1] == f"line {start + 29} ä"
    assert seen == [f"line {number} ä" for number in range(300)]
    assert list(reader.read()) == []
    assert list(LogReader(root, "driver").read()) == seen
    objects = len(storage.list_folder(root))
    assert objects == 1 if storage.is_local(root) else objects == 3


def test_lines_outlive_a_store_that_stumbles(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(root, "driver")
    log.write("before")
    with monkeypatch.context() as broken:
        broken.setattr(log, "_append", lambda data: (_ for _ in ()).throw(OSError("away")))
        with pytest.raises(OSError, match="away"):
            log.flush()
    log.write("after")
    log.flush()
    assert list(LogReader(root, "driver").read()) == ["before", "after"]


def test_a_record_of_a_newer_release_is_read(root: str) -> None:
    write_record(root, dataclasses.replace(RUNNING, nodes=({"node": "a"},)))
    uri = storage.join(root, records.FILE)
    storage.publish_bytes(uri, storage.read_bytes(uri).replace(b'"state"', b'"flavour_of_the_day": 1, "state"'))
    assert read_record(root) == dataclasses.replace(RUNNING, nodes=({"node": "a"},))
    assert read_record(storage.join(root, "nobody")) is None


def test_a_driver_is_lost_when_it_is_not_here_and_long_silent(tmp_path: Path) -> None:
    uri, me = str(tmp_path), psutil.Process()
    here = dataclasses.replace(RUNNING, host=socket.gethostname(), pid=me.pid, pid_started=me.create_time(), beat=0.0)
    assert not here.is_lost(uri), "a process that is there may be busy"
    other = dataclasses.replace(here, pid_started=here.pid_started - 100)
    assert other.is_lost(uri), "the number is another's"
    assert not dataclasses.replace(other, beat=time.time() - 20).is_lost(uri)
    assert not dataclasses.replace(RUNNING, beat=time.time() - 20).is_lost(uri)
    assert dataclasses.replace(RUNNING, beat=time.time() - 40).is_lost(uri)
    assert not dataclasses.replace(RUNNING, beat=time.time() - 50).is_lost("s3://bucket/run"), (
        "it beats less often there"
    )


def test_progress_and_time_left(tmp_path: Path) -> None:
    recorder = records.Recorder(str(tmp_path))
    recorder.stage("train")
    for done in range(1, 5):
        recorder.progress("train", done, 10)
    record = dataclasses.replace(recorder._record, pace=2.0, moved=time.time() - 1)
    run = RunFacts("a", str(tmp_path), record)
    assert run.progress == "train 4/10"
    assert run.eta == pytest.approx(11, abs=0.5)
    assert RunFacts("a", str(tmp_path), dataclasses.replace(record, state="stopped")).eta is None
    recorder.rank_line("[rank 0] hello", None)
    recorder.rank_line("…", {"kind": "step", "metrics": {"loss": 1.5}})
    assert recorder._record.loss == 1.5


def test_runs_are_found_by_what_is_typed_of_their_names(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place.of(root, "sqlite:////nowhere/mlflow.db", "k5dist")
    assert list_runs(place, {}) == []
    with pytest.raises(ConfigError, match="there are no runs below"):
        find_run(place, "fox")
    running = dataclasses.replace(RUNNING, beat=time.time())  # this module was read long before, in a large suite
    for name in ("fox-small", "fox-large", "bear"):
        write_record(storage.join(place.runs_uri, name), running)
    assert find_run(place, "b").name == "bear"
    assert find_run(place, storage.join(place.runs_uri, "bear")).record == running
    with pytest.raises(ConfigError, match=r"2 runs begin so.*one of fox-large, fox-small"):
        find_run(place, "fox")
    with pytest.raises(ConfigError, match="did you mean fox-large"):
        find_run(place, "fx-large")
    with pytest.raises(ConfigError, match="holds no run"):
        find_run(place, storage.join(place.runs_uri, "nothing"))
    assert main(["list", f"storage.root={root}", "tracking.uri=sqlite:////nowhere/mlflow.db"]) == 0
    said = capsys.readouterr().out
    assert "from the runs' folders" in said and "fox-small" in said and "running" in said
    assert main(["status", "bear", f"storage.rot={root}"]) == 2
    assert "did you mean storage.root" in capsys.readouterr().err


def test_a_typed_tracking_store_is_asked_before_the_plans(root: str) -> None:
    theirs, typed = ("sqlite:////nowhere/theirs.db", "sqlite:////nowhere/typed.db")
    run = RunFacts("fox", storage.join(root, "runs", "fox"), RUNNING)
    storage.publish_bytes(storage.join(run.uri, "plan.json"), json.dumps({"tracking_uri": theirs}).encode())
    assert details(Place.of(root, None, "k5dist"), run).tracking_uri == theirs
    assert details(Place.of(root, typed, "k5dist"), run).tracking_uri == typed


def test_what_does_not_run_cannot_be_stopped(root: str) -> None:
    for state in ("finished", "stopped", "failed"):
        with pytest.raises(ConfigError, match=f"it does not run: {state}"):
            stop(RunFacts("a", root, dataclasses.replace(RUNNING, state=state)))
    with pytest.raises(ConfigError, match="no driver"):
        stop(RunFacts("a", root, None))
    assert "another-machine" in stop(RunFacts("a", root, dataclasses.replace(RUNNING, beat=time.time())))
    assert storage.exists(storage.join(root, records.STOP_FILE))


def test_a_run_that_waits_in_a_job_of_several_is_taken_out_alone(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours train in the same job, which nobody may stop for it."""
    monkeypatch.setattr("k5dist.cluster.jobs.stop_job", lambda *_: pytest.fail("the job is that of all"))
    waits = records.submitted(ray_job_id="k5dist-1", ray_dashboard="http://head:8265", sweep="lr-sweep")
    assert "the others go on" in stop(RunFacts("a", root, waits))
    found = read_record(root)
    assert found is not None and found.state == "stopped"


def test_what_its_scheduler_has_forgotten_is_stopped(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = records.submitted(slurm_job_id="7")
    write_record(root, waits)
    monkeypatch.setattr("k5dist.runs.schedulers._slurm_states", lambda _: ["RUNNING"])
    with pytest.raises(ConfigError, match="it does not run: submitted"):  # it is about to say that it does
        stop(RunFacts("a", root, waits))
    monkeypatch.setattr("k5dist.runs.schedulers._slurm_states", lambda _: [])
    with pytest.raises(ConfigError, match="this run has a driver: submitted elsewhere"):
        records.refuse_second(root, everywhere=True)
    assert "knows it no more" in stop(RunFacts("a", root, waits))
    records.refuse_second(root, everywhere=True)


@pytest.mark.parametrize(("number", "state"), [("8", "submitted"), ("7", "finished")])
def test_a_precache_on_other_nodes_leaves_its_training_waiting(
    number: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(str(tmp_path), records.submitted(slurm_job_id="7"))
    monkeypatch.setenv("SLURM_JOB_ID", number)
    with records.Recorder(str(tmp_path)):
        pass
    found = read_record(str(tmp_path))
    assert found is not None and (found.state, found.slurm_job_id) == (state, "7")
