"""Metrics on their way to MLflow: a queue that never blocks training, and this machine's own load beside them.

One request to a tracking server takes 16 ms when it idles and 300 ms under load, and a server can be away for an hour
while training goes on. So the caller only appends to a queue, and one thread carries the queue over in batches.
"""

from __future__ import annotations

import collections
import itertools
import logging
import posixpath
import re
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from k5dist.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_BATCH = 1000  # MLflow refuses larger ones
MAX_KEY = 250
MAX_BACKOFF_SECONDS = 30.0
SYSTEM_SECONDS = 10
THREAD_NAME = "k5dist-metrics"

# What no retry can mend; everything else (locks, timeouts, 5xx, expired logins) may pass.
_HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")

log = logging.getLogger(__name__)


def safe_key(name: str) -> str:
    """`name` as MLflow allows it for metrics and parameters; one bad name would have its whole batch refused."""
    key = re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY] or "_"
    is_path = posixpath.normpath(key) == key and not key.startswith(("/", ".."))
    return key if is_path and key != "." else key.replace("/", "_").replace(".", "_")


def _is_not_the_sinks(record: logging.LogRecord) -> bool:
    """urllib3 tells of every single retry; the sink tells of an outage once."""
    return record.threadName != THREAD_NAME


class MetricSink:
    """A bounded queue of metrics and the one thread that sends it. Nothing here raises into the caller.

    While the server is away the newest `capacity` values are kept and sent when it is back: the end of a curve says
    more than its middle. Sending a batch twice is harmless, MLflow drops the copies.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, capacity: int = 100_000, interval: float = 1.0) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        logging.getLogger("urllib3.connectionpool").addFilter(_is_not_the_sinks)
        self._client, self._run_id = client, run_id
        self._metric_type, self._error_type = Metric, MlflowException
        self._capacity, self._interval = capacity, interval
        # Reentrant (Condition's default), so that a signal handler may log while the interrupted thread does.
        self._changed = threading.Condition()
        self._pending: collections.deque[Metric] = collections.deque()
        self._head = 0  # position of pending[0] among all metrics ever put: what lies before is sent or given up
        self._flush_to = 0
        self._deadline: float | None = None  # set when closing
        self._warned: set[str] = set()
        # A daemon, so that a server that hangs cannot keep the interpreter from leaving.
        self._thread = threading.Thread(target=self._loop, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues `metrics` under the present time."""
        stamp = int(time.time() * 1000)
        batch: list[Metric] = []
        for name, value in metrics.items():
            try:
                batch.append(self._metric_type(safe_key(name), float(value), stamp, int(step)))
            except (TypeError, ValueError, RuntimeError) as error:
                self._warn(f"value {name}", "metric %s is left out: %r is no number (%s)", name, value, error)
        with self._changed:
            self._pending.extend(batch)
            if (excess := len(self._pending) - self._capacity) > 0:
                self._advance(self._head + excess)
                self._warn("full", "the metric queue is full; the oldest values are dropped")
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Waits until all that was put before is sent; False when that did not happen within `timeout` seconds."""
        with self._changed:
            target = self._head + len(self._pending)
            self._flush_to = max(self._flush_to, target)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._head >= target or not self._thread.is_alive(), timeout)
            return self._head >= target

    def close(self, timeout: float) -> None:
        """Sends what is left, for at most `timeout` seconds, and ends the thread."""
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._pending:
            log.warning("MLflow: %d metric values of run %s were not delivered", len(self._pending), self._run_id)

    def _loop(self) -> None:
        backoff = self._interval
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._deadline is not None)
                if self._deadline is not None and (not self._pending or time.monotonic() > self._deadline):
                    return
            if self._drain():
                backoff = self._interval
                with self._changed:
                    self._changed.wait_for(self._is_urgent, self._interval)
                continue
            # A waiting flush shortens the pause after a failure, but never to nothing: the server is in trouble.
            time.sleep(self._interval)
            with self._changed:
                self._changed.wait_for(self._is_urgent, backoff - self._interval)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _is_urgent(self) -> bool:
        return self._deadline is not None or self._flush_to > self._head

    def _drain(self) -> bool:
        """Sends the queue batch by batch; False after the first failure that a later try may mend."""
        while True:
            with self._changed:
                batch = list(itertools.islice(self._pending, MAX_BATCH))
                end = self._head + len(batch)
            if not batch:
                return True
            try:
                self._client.log_batch(self._run_id, metrics=batch, synchronous=True)
            except self._error_type as error:
                if error.error_code not in _HOPELESS:
                    return self._failed(error)
                self._warn("refused", "%d metric values were refused and dropped: %s", len(batch), error)
            except Exception as error:
                return self._failed(error)
            with self._changed:
                self._advance(end)
                self._changed.notify_all()

    def _advance(self, end: int) -> None:
        """Forgets everything before position `end`; the overflow of `put` may have forgotten some of it already."""
        while self._head < end and self._pending:
            self._pending.popleft()
            self._head += 1

    def _failed(self, error: Exception) -> bool:
        text = "metrics cannot be delivered (%s); training goes on, the newest %d values are kept and tried again"
        self._warn("failed", text, error, self._capacity)
        return False

    def _warn(self, kind: str, text: str, *values: object) -> None:
        """Once a kind: an hour of outage at one step a second would drown the log."""
        if kind not in self._warned:
            self._warned.add(kind)
            # MLflow's errors quote the whole URI of the server.
            log.warning("MLflow: %s", redact_text(text % values))


class SystemSampler:
    """CPU, memory, disk, network and GPU load of this machine as `system/<node>/*`, sampled on a thread of its own.

    MLflow's SystemMetricsMonitor does the measuring. Its own loop ends for good at the first request that fails, so
    the loop is here and the values take the same way as all others.
    """

    def __init__(self, sink: MetricSink, uri: str, run_id: str, *, node: str, started: float, seconds: int) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # NVML complains at every sample about what a card does not support (utilisation of a MIG slice, say).
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitor = SystemMetricsMonitor(run_id, sampling_interval=seconds, tracking_uri=uri)
        self._sink, self._prefix = sink, f"system/{node}/"
        self._started, self._seconds = started, self._monitor.sampling_interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="k5dist-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the sampling; a sample being taken is waited for, a stuck driver is not."""
        self._stopped.set()
        self._thread.join(5)

    def _loop(self) -> None:
        try:
            self._sample()  # CPU load is measured since the sample before, so the first one only sets the baseline
            while not self._stopped.wait(self._seconds):
                # Steps count from the start of the run, not of this process, so that a resumed run's curves go on.
                step = int((time.time() - self._started) / self._seconds)
                self._sink.put({self._prefix + name: value for name, value in self._sample().items()}, step)
        except Exception as error:
            log.warning("MLflow: system metrics stop: %s", error)

    def _sample(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        sample = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return sample
