"""From totals to metric families of `prometheus_client`, made when asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from interlace.config.settings import ServerSettings
from interlace.engine.client import EngineHealth
from interlace.engine.front import Front
from interlace.interfaces.executor import ExecutorInfo
from interlace.kv.specs import KVCacheConfig
from interlace.server.metrics.histogram import Histogram
from interlace.server.metrics.http import HttpTotals
from interlace.server.metrics.names import METRICS, Reading, Value
from interlace.server.metrics.names import Metric as Definition
from interlace.server.metrics.totals import EngineTotals

HEALTH_TIMEOUT = 1.0
"""Seconds a scrape waits for the engine loop; it answers between steps."""


class EngineCollector(Collector):
    """Reads one server's totals at each scrape."""

    def __init__(
        self,
        front: Front,
        engines: Sequence[EngineTotals],
        http: HttpTotals,
        model_name: str,
        settings: ServerSettings,
    ) -> None:
        """`engines`: the totals of each replica of `front`."""
        self._front = front
        self._engines = engines
        self._http = http
        self._model_name = model_name
        self._compat = settings.metrics_compat == "vllm"
        self._build = build_labels(front)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the engine."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families, `interlace:` first. The engines wait for at most the copying of the numbers."""
        readings = self._read()
        with contextlib.ExitStack() as held:
            for lock in (*(engine.lock for engine in self._engines), self._http.lock):
                held.enter_context(lock)
            families = [self._family("interlace:", definition, readings) for definition in METRICS]
            if self._compat:
                families += [self._family("vllm:", one, readings) for one in METRICS if one.compat]
        yield from families

    def _read(self) -> list[Reading]:
        # The newest step may be long past; the engine loop knows how things stand now.
        health = self._front.health(HEALTH_TIMEOUT)
        healths = health.replicas or (health,) * len(self._engines)  # the same word for all once the engine is dead
        return [self._read_one(*one) for one in zip(self._engines, healths, self._front.infos, strict=True)]

    def _read_one(self, engine: EngineTotals, health: EngineHealth, info: ExecutorInfo) -> Reading:
        stats = engine.stats
        up = health.status in ("ok", "degraded")
        running, waiting = health.num_running, health.num_waiting
        if up and stats is not None and not health.steps:  # silent in a long step: the numbers of the one before
            running, waiting = stats.num_running, stats.num_waiting
        return Reading(
            engine=engine,
            http=self._http,
            num_running=running,
            num_waiting=waiting,
            num_blocked=min(waiting, stats.num_blocked if stats else 0),
            kv_usage=stats.kv_usage if stats and up and (running or waiting) else 0.0,
            up=up,
            degraded=health.status == "degraded",
            restarts=health.restarts,
            cache=self._cache(info.kv),
            build=self._build,
        )

    def _cache(self, kv: KVCacheConfig) -> dict[str, str]:
        return {
            "block_size": str(kv.block_size),
            "num_gpu_blocks": str(kv.num_blocks - 1),
            "enable_prefix_caching": str(self._front.loaded.settings.cache.prefix_caching),
            "cache_dtype": str(self._front.spec.dtype),
        }

    def _family(self, prefix: str, definition: Definition, readings: Sequence[Reading]) -> Metric:
        """One family with the series of every engine."""
        names = ("engine",) if definition.anonymous else ("model_name", "engine")
        labels = (*names, *definition.labels)
        name = prefix + definition.name
        family: HistogramMetricFamily | CounterMetricFamily | GaugeMetricFamily
        if definition.kind == "histogram":
            family = HistogramMetricFamily(name, definition.help, labels=labels)
        elif definition.kind == "counter":
            family = CounterMetricFamily(name, definition.help, labels=labels)
        else:
            family = GaugeMetricFamily(name, definition.help, labels=labels)
        for index, reading in enumerate(readings[:1] if definition.once else readings):
            values = (str(index),) if definition.anonymous else (self._model_name, str(index))
            _add(family, values, definition.read(reading))
        return family


def _add(
    family: HistogramMetricFamily | CounterMetricFamily | GaugeMetricFamily, values: tuple[str, ...], value: Value
) -> None:
    """The series of one engine."""
    if isinstance(value, Histogram):
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(values, list(value.cumulative()), value.total)
        return
    assert not isinstance(family, HistogramMetricFamily)
    for own, number in value.items() if isinstance(value, dict) else [((), value)]:
        family.add_metric((*values, *own), float(number))


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
