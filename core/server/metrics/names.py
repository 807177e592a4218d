"""Which metrics there are: name, type, labels, help, and where the value comes from.

Every one is exported as `interlace:NAME`; those with `compat` also as `vllm:NAME`, with the meaning it has there.
Engine metrics carry the labels `model_name` and `engine` before their own; each replica is an `engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from interlace.server.metrics.histogram import Histogram
from interlace.server.metrics.http import HttpTotals
from interlace.server.metrics.totals import EngineTotals


class Reading(NamedTuple):
    """All that metrics of one engine are read from, at one moment."""

    engine: EngineTotals
    http: HttpTotals
    num_running: int
    num_waiting: int
    num_blocked: int
    kv_usage: float
    up: bool
    degraded: bool
    restarts: int
    cache: Mapping[str, str]
    """What `cache_config_info` says."""
    build: Mapping[str, str]
    """What `build_info` says."""


Value = float | Histogram | dict[tuple[str, ...], float]
"""Of one series; or of several, by the values of the metric's own labels."""


class Metric(NamedTuple):
    """One metric family."""

    name: str
    """Without prefix, and for counters without `_total`."""
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    read: Callable[[Reading], Value]
    labels: tuple[str, ...] = ()
    """Its own, beside `model_name` and `engine`."""
    compat: bool = True
    """Whether vLLM has a metric of this name and meaning."""
    anonymous: bool = False
    """Without the label `model_name`: the facts of the engine, not of what it serves."""
    once: bool = False
    """Of the server: where there are replicas, the first engine stands for all."""


CACHE_LABELS = ("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype")
BUILD_LABELS = ("version", "scheduler", "executor", "attention", "kernels")


def _by_reason(r: Reading) -> Value:
    return {("capacity",): r.num_waiting - r.num_blocked, ("deferred",): r.num_blocked}


def _by_source(r: Reading) -> Value:
    cached = r.engine.cached_prompt_tokens
    return {
        ("local_compute",): r.engine.prompt_tokens - cached,
        ("local_cache_hit",): cached,
        ("external_kv_transfer",): 0,
    }


def _plugin_seconds(r: Reading) -> Value:
    pairs = ((*account.partition(":")[::2], seconds) for account, seconds in r.engine.plugin_seconds.items())
    return {(kind, name): seconds for kind, name, seconds in pairs}


STATE: tuple[Metric, ...] = (
    Metric("num_requests_running", "gauge", "Requests with a seat.", lambda r: r.num_running),
    Metric("num_requests_waiting", "gauge", "Requests without a seat.", lambda r: r.num_waiting),
    Metric(
        "num_requests_waiting_by_reason",
        "gauge",
        "Requests without a seat: for want of room (capacity), or of something else (deferred).",
        _by_reason,
        ("reason",),
    ),
    Metric("kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 0 to 1.", lambda r: r.kv_usage),
    Metric(
        "cache_config_info",
        "gauge",
        "The KV cache; always 1. The blocks are counted under the name that is known, on whatever device they are.",
        lambda r: {tuple(r.cache[label] for label in CACHE_LABELS): 1},
        CACHE_LABELS,
        anonymous=True,
    ),
    Metric(
        "build_info",
        "gauge",
        "Version and the plugins in force; always 1.",
        lambda r: {tuple(r.build[label] for label in BUILD_LABELS): 1},
        BUILD_LABELS,
        compat=False,
        anonymous=True,
    ),
    Metric("engine_up", "gauge", "1 while the engine works, else 0.", lambda r: r.up, compat=False),
    Metric(
        "engine_degraded",
        "gauge",
        "1 while the engine works, but not as it should (see the log), else 0.",
        lambda r: r.degraded,
        compat=False,
    ),
    Metric("engine_restarts", "counter", "Engine processes that replaced a dead one.", lambda r: r.restarts, (), False),
)

COUNTERS: tuple[Metric, ...] = (
    Metric("prompt_tokens", "counter", "Prompt tokens of started requests.", lambda r: r.engine.prompt_tokens),
    Metric(
        "prompt_tokens_by_source",
        "counter",
        "Prompt tokens of started requests, by where their KV came from.",
        _by_source,
        ("source",),
    ),
    Metric(
        "prompt_tokens_cached",
        "counter",
        "Prompt tokens of started requests that were found in the prefix cache.",
        lambda r: r.engine.cached_prompt_tokens,
    ),
    Metric(
        "prompt_tokens_cached_by_source",
        "counter",
        "Prompt tokens found in a cache, by which.",
        lambda r: {("local_cache_hit",): r.engine.cached_prompt_tokens, ("external_kv_transfer",): 0},
        ("source",),
    ),
    Metric("generation_tokens", "counter", "Output tokens.", lambda r: r.engine.generation_tokens),
    Metric(
        "prefix_cache_queries", "counter", "Tokens looked up in the prefix cache.", lambda r: r.engine.prefix_queries
    ),
    Metric("prefix_cache_hits", "counter", "Tokens found in the prefix cache.", lambda r: r.engine.prefix_hits),
    Metric("num_preemptions", "counter", "Requests that lost their seat for a while.", lambda r: r.engine.preemptions),
    Metric(
        "corrupted_requests",
        "counter",
        "Requests for which no token could be chosen, such as for NaN in the logits.",
        lambda r: r.engine.failed_requests,
    ),
    Metric(
        "request_success",
        "counter",
        "Requests that ended, by how.",
        lambda r: {(reason,): count for reason, count in r.engine.finished.items()},
        ("finished_reason",),
    ),
    Metric(
        "request_errors",
        "counter",
        "Requests that ended with an error, by its code.",
        lambda r: {(code,): count for code, count in r.engine.error_codes.items()},
        ("code",),
        compat=False,
    ),
    Metric(
        "admission_rejections",
        "counter",
        "Requests refused because the queue was full.",
        lambda r: {("max_num_queued_reqs",): 0, **{(k,): n for k, n in r.http.rejections.items()}},
        ("reason",),
        once=True,
    ),
    Metric("steps", "counter", "Steps completed.", lambda r: r.engine.steps, compat=False),
    Metric(
        "plugin_seconds",
        "counter",
        "Seconds spent in plugins: schedulers, logits processors, event hooks.",
        _plugin_seconds,
        ("kind", "plugin"),
        compat=False,
    ),
    Metric(
        "http_requests",
        "counter",
        "HTTP requests answered. Status 499: the client left before the answer began.",
        lambda r: {tuple(series): count for series, count in r.http.requests.items()},
        ("method", "route", "status"),
        compat=False,
        anonymous=True,
        once=True,
    ),
    Metric(
        "http_requests_in_flight",
        "gauge",
        "HTTP requests under way.",
        lambda r: r.http.in_flight,
        compat=False,
        anonymous=True,
        once=True,
    ),
)


def _histogram(name: str, text: str, attribute: str, compat: bool = True) -> Metric:
    return Metric(name, "histogram", text, lambda r: getattr(r.engine, attribute), compat=compat)


HISTOGRAMS: tuple[Metric, ...] = (
    _histogram("time_to_first_token_seconds", "Arrival to first token.", "ttft"),
    _histogram("inter_token_latency_seconds", "Between two successive tokens of a sample.", "gap"),
    _histogram("request_time_per_output_token_seconds", "Mean per token after the first.", "time_per_output_token"),
    _histogram("e2e_request_latency_seconds", "Arrival to end.", "e2e"),
    _histogram("request_queue_time_seconds", "Arrival to first step.", "queue"),
    _histogram("request_inference_time_seconds", "First step to last token.", "inference"),
    _histogram("request_prefill_time_seconds", "First step to first token.", "prefill"),
    _histogram("request_decode_time_seconds", "First to last token.", "decode"),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", "request_prompt_tokens"),
    _histogram("request_generation_tokens", "Output tokens of a request.", "request_output_tokens"),
    _histogram(
        "request_prefill_kv_computed_tokens", "Prompt tokens not found in the prefix cache.", "request_computed_tokens"
    ),
    _histogram("request_max_num_generation_tokens", "Output tokens of the longest sample.", "request_longest_output"),
    _histogram(
        "request_params_max_tokens",
        "Most output tokens of a sample: as asked for, or as many as fit.",
        "request_max_tokens",
    ),
    _histogram("request_params_n", "Samples of a request.", "request_n"),
    _histogram("request_num_preemptions", "Preemptions of a request.", "request_preemptions"),
    _histogram("kv_block_lifetime_seconds", "Of a sample of KV blocks: from being taken to eviction.", "kv_lifetime"),
    _histogram(
        "kv_block_idle_before_evict_seconds", "Of a sample of KV blocks: from the last use to eviction.", "kv_idle"
    ),
    _histogram("kv_block_reuse_gap_seconds", "Of a sample of KV blocks: from one use to the next.", "kv_reuse_gap"),
    _histogram("iteration_tokens_total", "Tokens computed in a step.", "iteration_tokens"),
    _histogram("step_seconds", "What the executor spent on a step.", "step_seconds", compat=False),
)

METRICS: tuple[Metric, ...] = (*STATE, *COUNTERS, *HISTOGRAMS)
