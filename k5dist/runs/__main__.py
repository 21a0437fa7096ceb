"""`python -m k5dist.runs list | status RUN | logs RUN [--follow] | stop RUN`, with the keys of a launch that say where.

python -m k5dist.runs status my-run storage.root=s3://bucket/k5dist
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence

from rich.table import Table

from k5dist import storage
from k5dist.cluster.logs import LogReader
from k5dist.cluster.record import LOGS, read_record
from k5dist.config import ConfigError
from k5dist.console import console, say, show_table
from k5dist.retry import StorageUnavailable
from k5dist.runs.facts import Details, Place, RunFacts, details, find_run, list_runs
from k5dist.runs.schedulers import told
from k5dist.runs.stop import stop
from k5dist.schema import check_names
from k5dist.tracking.reader import read_runs
from k5dist.tracking.redact import redact_uris
from k5dist.tracking.run import TrackingUnreachable

KEYS = {"storage.root": "k5dist-data", "tracking.uri": "", "tracking.experiment": "k5dist"}
EXIT_CONFIG, EXIT_FAILED = 2, 1
_FOLLOW_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    try:
        keys = _keys([word for word in arguments if _is_key(word)])
        options = _parser().parse_args([word for word in arguments if not _is_key(word)])
        place = Place.of(keys["storage.root"], keys["tracking.uri"] or None, keys["tracking.experiment"])
        command: Callable[[Place, argparse.Namespace], int] = options.command
        return command(place, options)
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
        return EXIT_CONFIG
    except StorageUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m k5dist.runs", description="Runs, wherever they are.")
    commands = parser.add_subparsers(required=True, metavar="list | status | logs | stop")
    shown = {
        "list": (show_list, "every run below storage.root: state, progress, time left, loss"),
        "status": (show_status, "one run: stage, step, time left, loss, nodes and GPUs"),
        "logs": (show_logs, "what the driver said, or its ranks"),
        "stop": (ask_stop, "save a checkpoint and end, wherever it runs"),
    }
    for name, (command, text) in shown.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if name != "list":
            sub.add_argument("run", help="its name, the beginning of it, or its folder")
        if name == "logs":
            sub.add_argument("--follow", action="store_true", help="go on until the run ends")
            sub.add_argument("--rank", type=int, help="what this rank wrote")
            sub.add_argument("--ranks", action="store_true", help="what all ranks wrote")
            sub.add_argument("--all", action="store_true", help="earlier starts of the run, too")
        sub.epilog = f"Besides, as for a launch: {', '.join(f'{key}=…' for key in KEYS)}"
    return parser


def _is_key(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _keys(overrides: Sequence[str]) -> dict[str, str]:
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    check_names(given, KEYS, "")
    return KEYS | given


def show_list(place: Place, options: argparse.Namespace) -> int:
    try:
        tracked = read_runs(place.tracking_uri, place.experiment)
    except TrackingUnreachable as error:
        tracked = {}
        say(f"without the tracking store ({error}), from the runs' folders:")
    runs = list_runs(place, tracked)
    if not runs:
        say(f"there are no runs below {place.runs_uri}")
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "progress", "left", "loss", "best held out", "moved", "where"):
        table.add_column(name, overflow="fold", no_wrap=name in ("state", "progress", "left", "loss", "moved"))
    for run in runs:
        best = run.tracked.best_loss if run.tracked else None
        left, age = _duration(run.eta), _duration(run.age)
        cells = (run.name, run.state, run.progress, left, _number(run.loss), _number(best), age and f"{age} ago")
        table.add_row(*cells, _where(run))
    console.print(table)
    return 0


def show_status(place: Place, options: argparse.Namespace) -> int:
    show_table(f"Run {options.run}", status_rows(details(place, find_run(place, options.run))))
    return 0


def status_rows(found: Details) -> list[tuple[str, str]]:
    run, record = found.run, found.run.record
    rows = [("folder", run.uri), ("state", run.state + _why(found))]
    if record is not None and record.stage:
        left = _duration(run.eta)
        pace = f", {record.pace:.2f} s each" if record.pace and record.total else ""
        rows.append(("stage", f"{run.progress}{pace}{f', about {left} left' if left else ''}"))
        rows.append(("last event", f"{_duration(run.age)} ago"))
    if run.loss is not None:
        at = f" (step {found.last.step}, {_duration(time.time() - found.last.time)} ago)" if found.last else ""
        rows.append(("loss", f"{run.loss:.4f}{at}"))
    if run.tracked and run.tracked.best_loss is not None:
        rows.append(("best held out", f"{run.tracked.best_loss:.4f} (step {run.tracked.best_step})"))
    if where := _where(run):
        rows.append(("where", where))
    if record is not None and run.state != "finished" and (scheduler := told(record)):
        rows.append(scheduler)
    if record is not None and record.ray is not None:
        ray = record.ray
        gpus = f", {ray['gpus_free']:g} of {ray['gpus']:g} GPUs free" if ray["gpus"] else ", no GPUs"
        rows.append(("Ray", f"{ray['nodes']:.0f} nodes alive{gpus}"))
    for at, node in enumerate(record.nodes if record else ()):
        rows.append((f"node {at}", _node(node)))
    tracking = redact_uris(found.tracking_uri)
    if found.tracking_error is not None:
        tracking = f"does not answer; this is from the run's folder ({found.tracking_error})"
    elif run.tracked is not None:
        tracking = f"{tracking}, run {run.tracked.run_id}, {run.tracked.status}"
    return [*rows, ("tracking", tracking)]


def _why(found: Details) -> str:
    run = found.run
    if run.state == "lost":
        return ": its driver is gone without a word; the same command goes on from the newest checkpoint"
    return f": {run.tracked.error}" if run.state == "failed" and run.tracked and run.tracked.error else ""


def _node(node: dict) -> str:
    gpus = [
        f"GPU {at}: {'?' if gpu['busy'] is None else gpu['busy']}% busy, {gpu['used_gib']} of {gpu['total_gib']} GiB"
        for at, gpu in enumerate(node["gpus"])
    ]
    return "; ".join([f"{node['node']}: CPU {node['cpu']:.0f}%, memory {node['memory']:.0f}%", *gpus])


def _where(run: RunFacts) -> str:
    record = run.record
    if record is None:
        return ""
    names = {
        "Slurm job": record.slurm_job_id,
        "Ray job": record.ray_job_id,
        "RayJob": record.kubernetes_job,
        "of": record.sweep,
    }
    parts = [f"{name} {value}" for name, value in names.items() if value]
    process = [f"{record.host}, process {record.pid}"] if record.pid and run.state == "running" else []
    return "; ".join([*parts, *process])


def ask_stop(place: Place, options: argparse.Namespace) -> int:
    say(stop(find_run(place, options.run)))
    return 0


def show_logs(place: Place, options: argparse.Namespace) -> int:
    run = find_run(place, options.run)
    attempts = storage.list_folder(storage.join(run.uri, LOGS))
    if not attempts and not options.follow:
        raise ConfigError("run", run.name, "it has left no logs yet", "add --follow to wait for them")
    for attempt in attempts[:-1] if options.all else ():
        _show_lines(_reader(run, attempt, options), options)
    with contextlib.suppress(KeyboardInterrupt):
        _show_newest(run, options)
    return 0


def _show_newest(run: RunFacts, options: argparse.Namespace) -> None:
    """The newest attempt; with --follow until it has ended, or the one after it has."""
    attempt, reader = "", None
    while True:
        record = read_record(run.uri)
        state = RunFacts(run.name, run.uri, record).state
        newest = max(storage.list_folder(storage.join(run.uri, LOGS)), default="")
        if newest != attempt:
            if reader is not None:
                _show_lines(reader, options)
            attempt, reader = newest, _reader(run, newest, options)
        if reader is not None:
            _show_lines(reader, options)
        if not options.follow or state not in ("running", "submitted", "planned"):
            return
        time.sleep(_FOLLOW_SECONDS)


def _reader(run: RunFacts, attempt: str, options: argparse.Namespace) -> LogReader:
    name = "ranks" if options.ranks or options.rank is not None else "driver"
    return LogReader(storage.join(run.uri, LOGS, attempt), name)


def _show_lines(reader: LogReader, options: argparse.Namespace) -> None:
    wanted = "" if options.rank is None else f"[rank {options.rank}]"
    for line in reader.read():
        if wanted in line:
            console.print(line, markup=False, highlight=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(seconds: float | None) -> str:
    """Two units at most: 3 s, 5 min, 2 h 10 min, 3 d 4 h."""
    if seconds is None:
        return ""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{int(hours)} h {int(minutes) % 60} min" if days < 2 else f"{int(days)} d {int(hours) % 24} h"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
