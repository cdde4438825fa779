"""How busy the machine is while a run lasts: MLflow's own measurements, through our spool."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger(__name__)


class SystemMetrics:
    """One daemon thread that logs ``system/…``, the names under which MLflow shows system metrics.

    MLflow's own thread would write past the spool. A forked process inherits no thread: there is one writer.

    Args:
        log_metrics: takes names and values, and the number of the measurement.
        seconds: from one measurement to the next; 0: none are taken.
    """

    def __init__(self, log_metrics: Callable[[Mapping[str, float], int], Any], seconds: float) -> None:
        self._log_metrics, self._seconds = log_metrics, seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._count = 0
        self._pid = os.getpid()

    def start(self) -> None:
        """Begin to measure, unless that is under way, or this is a fork of the process that does."""
        if self._seconds and self._thread is None and os.getpid() == self._pid:
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, after a measurement under way has been logged."""
        if self._thread is not None and os.getpid() == self._pid:
            self._ended.set()
            self._thread.join(timeout=5)
            self._thread = None

    def _run(self) -> None:
        monitors = _monitors()
        while not self._ended.wait(self._seconds):
            try:
                self._log_metrics(_measure(monitors), self._count)
            except Exception as error:  # a measurement is not worth a run
                log.warning("System metrics are no longer measured: %s", error)
                return
            self._count += 1


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception as error:  # no nvidia-ml-py, no driver, no device: each raises a type of its own
        log.debug("GPUs are not measured: %s", error)
    return monitors


def _measure(monitors: list[BaseMetricsMonitor]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values
