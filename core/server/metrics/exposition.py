"""From totals to metric families of `prometheus_client`, made when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from interlace.config.settings import ServerSettings
from interlace.engine.front import Front
from interlace.server.metrics.histogram import Histogram
from interlace.server.metrics.http import HttpTotals
from interlace.server.metrics.names import METRICS, Reading
from interlace.server.metrics.names import Metric as Definition
from interlace.server.metrics.totals import EngineTotals

HEALTH_TIMEOUT = 1.0
"""Seconds a scrape waits for the engine loop; it answers between steps."""


class EngineCollector(Collector):
    """Reads one server's totals at each scrape."""

    def __init__(
        self, front: Front, engine: EngineTotals, http: HttpTotals, model_name: str, settings: ServerSettings
    ) -> None:
        self._front = front
        self._engine = engine
        self._http = http
        self._model_name = model_name
        self._compat = settings.metrics_compat == "vllm"
        kv = front.info.kv
        self._cache = {
            "block_size": str(kv.block_size),
            "num_gpu_blocks": str(kv.num_blocks - 1),
            "enable_prefix_caching": str(front.loaded.settings.cache.prefix_caching),
            "cache_dtype": str(front.spec.dtype),
        }
        self._build = build_labels(front)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the engine."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families, `interlace:` first. The engine waits for at most the copying of the numbers."""
        reading = self._read()
        with self._engine.lock, self._http.lock:
            families = [self._family("interlace:", definition, reading) for definition in METRICS]
            if self._compat:
                families += [self._family("vllm:", one, reading) for one in METRICS if one.compat]
        yield from families

    def _read(self) -> Reading:
        stats = self._engine.stats
        # The newest step may be long past; the engine loop knows how things stand now.
        health = self._front.health(HEALTH_TIMEOUT)
        up = health.status in ("ok", "degraded")
        running, waiting = health.num_running, health.num_waiting
        if up and stats is not None and not health.steps:  # silent in a long step: the numbers of the one before
            running, waiting = stats.num_running, stats.num_waiting
        return Reading(
            engine=self._engine,
            http=self._http,
            num_running=running,
            num_waiting=waiting,
            num_blocked=min(waiting, stats.num_blocked if stats else 0),
            kv_usage=stats.kv_usage if stats and up and self._front.num_active else 0.0,
            up=up,
            degraded=health.status == "degraded",
            restarts=health.restarts,
            cache=self._cache,
            build=self._build,
        )

    def _family(self, prefix: str, definition: Definition, reading: Reading) -> Metric:
        names = ("engine",) if definition.anonymous else ("model_name", "engine")
        values = ("0",) if definition.anonymous else (self._model_name, "0")
        labels = (*names, *definition.labels)
        name, value = prefix + definition.name, definition.read(reading)
        if isinstance(value, Histogram):
            histogram = HistogramMetricFamily(name, definition.help, labels=labels)
            histogram.add_metric(values, list(value.cumulative()), value.total)
            return histogram
        kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
        family: CounterMetricFamily | GaugeMetricFamily = kind(name, definition.help, labels=labels)
        for own, number in value.items() if isinstance(value, dict) else [((), value)]:
            family.add_metric((*values, *own), float(number))
        return family


def build_labels(front: Front) -> dict[str, str]:
    """Version and plugins in force, as `build_info` has them."""
    import interlace

    chosen: dict[str, set[str]] = {"attention": set(), "kernels": set()}
    for selection in front.info.selections:
        chosen.setdefault(selection.kind, set()).add(selection.name)
    return {
        "version": interlace.__version__,
        "scheduler": front.spec.scheduler.label,
        "executor": front.spec.executor.name,
        "attention": ",".join(sorted(chosen["attention"])),
        "kernels": ",".join(sorted(chosen["kernels"])),
    }


def make_registry(collector: EngineCollector) -> CollectorRegistry:
    """A registry of one server: the engine's metrics and those of this process (`process_…`)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    return registry
