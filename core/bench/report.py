"""What a benchmark says, as one object: `--json` prints it, `interlace.bench.tables` draws it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from interlace.bench.machine import Machine, peak_memory
from interlace.bench.metrics import Distribution, Latencies, Rates, Run, Spread, distribution, latencies, rates, spread
from interlace.bench.session import Session, Startup
from interlace.bench.workloads import Workload
from interlace.worker.threads import plan_threads


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What ran."""

    model: str
    architecture: str
    dtype: str
    weights: str
    device: str
    threads: int
    """CPU threads of the engine."""
    scheduler: str
    executor: str
    process: str
    """`inline` or `subprocess`, or `auto` (which is inline here)."""
    selections: dict[str, list[str]]
    """Attention and kernels as chosen at the start: kind → names."""
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    prefix_caching: bool
    kv_blocks: int
    block_size: int


class WorkloadFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, per run."""

    description: str
    requests: int
    prompt_tokens: int
    output_tokens: int


class PluginCost(msgspec.Struct, frozen=True, kw_only=True):
    """Time spent in one plugin, over all timed runs."""

    plugin: str
    """`kind:name`, or `events:package:entry_point`."""
    seconds: float
    seconds_per_step: float
    share: float
    """Of the duration of the runs, 0 to 1."""


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One run, in short."""

    rates: Rates
    steps: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a benchmark. Times in seconds, sizes in bytes, rates per second."""

    benchmark: str
    """`throughput` or `latency`."""
    workload: WorkloadFacts
    duration_s: Spread
    requests_per_s: Spread
    output_tokens_per_s: Spread
    total_tokens_per_s: Spread
    latencies: Latencies
    """Over the requests of all runs."""
    batch_latency_s: Distribution | None
    """Over runs: from handing in the requests to the last token of the last one. Of `latency` only."""
    steps: int
    """Of all runs, as are the following counts."""
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prefix_hit_rate: float
    peak_rss_bytes: int
    startup: Startup
    engine: EngineFacts
    machine: Machine
    runs: list[RunFacts]
    plugin_cost: list[PluginCost] | None = None
    """What each plugin cost, the dearest first; None unless it was asked for."""


def make_report(
    benchmark: str,
    workload: Workload,
    runs: Sequence[Run],
    session: Session,
    machine: Machine,
    plugin_cost: bool = False,
) -> Report:
    """Sum up runs of one workload. Call it while the engine still runs: its memory is part of the report."""
    facts = [_run_facts(run) for run in runs]
    queries, hits = sum(run.prefix_queries for run in runs), sum(run.prefix_hits for run in runs)
    is_latency = benchmark == "latency"
    return Report(
        benchmark=benchmark,
        workload=WorkloadFacts(
            description=workload.description,
            requests=len(workload.items),
            prompt_tokens=workload.num_prompt_tokens,
            output_tokens=workload.num_output_tokens,
        ),
        duration_s=spread(run.rates.duration_s for run in facts),
        requests_per_s=spread(run.rates.requests_per_s for run in facts),
        output_tokens_per_s=spread(run.rates.output_tokens_per_s for run in facts),
        total_tokens_per_s=spread(run.rates.total_tokens_per_s for run in facts),
        latencies=latencies([timeline for run in runs for timeline in run.timelines]),
        batch_latency_s=distribution(run.rates.duration_s for run in facts) if is_latency else None,
        steps=sum(run.steps for run in runs),
        preemptions=sum(run.preemptions for run in runs),
        prefix_queries=queries,
        prefix_hits=hits,
        prefix_hit_rate=hits / queries if queries else 0.0,
        peak_rss_bytes=peak_memory(),
        startup=session.startup,
        engine=_engine_facts(session),
        machine=machine,
        runs=facts,
        plugin_cost=_plugin_costs(runs) if plugin_cost else None,
    )


def _plugin_costs(runs: Sequence[Run]) -> list[PluginCost]:
    steps, duration = sum(run.steps for run in runs), sum(rates(run).duration_s for run in runs)
    totals: dict[str, float] = {}
    for run in runs:
        for plugin, seconds in run.plugin_seconds.items():
            totals[plugin] = totals.get(plugin, 0.0) + seconds
    return [
        PluginCost(plugin=plugin, seconds=seconds, seconds_per_step=seconds / max(1, steps), share=seconds / duration)
        for plugin, seconds in sorted(totals.items(), key=lambda pair: -pair[1])
    ]


def _run_facts(run: Run) -> RunFacts:
    return RunFacts(
        rates=rates(run),
        steps=run.steps,
        preemptions=run.preemptions,
        prefix_queries=run.prefix_queries,
        prefix_hits=run.prefix_hits,
    )


def _engine_facts(session: Session) -> EngineFacts:
    spec, info = session.front.spec, session.front.info
    selections: dict[str, list[str]] = {}
    for choice in info.selections:
        names = selections.setdefault(choice.kind, [])
        if choice.name not in names:
            names.append(choice.name)
    return EngineFacts(
        model=spec.model,
        architecture=spec.architecture.name,
        dtype=spec.dtype,
        weights=spec.weights,
        device=spec.device,
        threads=plan_threads(spec.threads).count,
        scheduler=spec.scheduler.label,
        executor=spec.executor.name,
        process=session.front.loaded.settings.engine.process,
        selections=selections,
        max_model_len=spec.max_model_len,
        max_num_batched_tokens=spec.limits.max_num_batched_tokens,
        max_num_seqs=spec.limits.max_num_seqs,
        prefix_caching=spec.cache.prefix_caching,
        kv_blocks=info.kv.num_blocks,
        block_size=info.kv.block_size,
    )
