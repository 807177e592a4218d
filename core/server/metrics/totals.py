"""`EngineTotals`: everything the engine metrics say, counted step by step in the front's process."""

from __future__ import annotations

import threading

from interlace.engine.front import Observer
from interlace.engine.output_processor import Processed
from interlace.messages import KVBlockTimes, RequestSummary, StepOutput, StepStats
from interlace.server.metrics.histogram import BLOCK_SECONDS, COUNTS, GAP_SECONDS, SECONDS, TOKENS, Histogram

_FINISH_REASONS = ("stop", "length", "abort", "error")


class TotalsByEngine(Observer):
    """`EngineTotals` of each replica; there is one where there is one engine."""

    def __init__(self, count: int) -> None:
        self.engines = [EngineTotals() for _ in range(count)]

    def on_step(self, step: StepOutput, done: Processed) -> None:
        self.engines[step.engine].on_step(step, done)


class EngineTotals(Observer):
    """Counts of one engine since the server started; a restart of the engine process loses nothing.

    `on_step` runs in the engine client's thread for every step, so it adds to plain numbers. Readers hold `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stats: StepStats | None = None
        """Of the newest step."""
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.failed_requests = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.plugin_seconds: dict[str, float] = {}
        """Account as of `StepStats.plugin_seconds` → seconds."""
        self.finished = dict.fromkeys(_FINISH_REASONS, 0)
        self.error_codes: dict[str, int] = {}
        self.step_seconds = Histogram(GAP_SECONDS)
        self.iteration_tokens = Histogram(TOKENS)
        self.ttft = Histogram(SECONDS)
        self.gap = Histogram(GAP_SECONDS)
        self.time_per_output_token = Histogram(GAP_SECONDS)
        self.e2e = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.decode = Histogram(SECONDS)
        self.inference = Histogram(SECONDS)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_computed_tokens = Histogram(TOKENS)
        self.request_output_tokens = Histogram(TOKENS)
        self.request_longest_output = Histogram(TOKENS)
        self.request_max_tokens = Histogram(TOKENS)
        self.request_n = Histogram(COUNTS)
        self.request_preemptions = Histogram(COUNTS)
        self.kv_lifetime = Histogram(BLOCK_SECONDS)
        self.kv_idle = Histogram(BLOCK_SECONDS)
        self.kv_reuse_gap = Histogram(BLOCK_SECONDS)
        self._last_prefix = (0, 0)

    def on_step(self, step: StepOutput, done: Processed) -> None:
        with self.lock:
            self.generation_tokens += len(step.token_ids)
            for previous, count in done.gaps.items():
                self.gap.observe(step.now - previous, count)
            for request in done.started:
                self.prompt_tokens += request.num_prompt_tokens
                self.cached_prompt_tokens += request.cached_tokens or 0
                self.ttft.observe(request.metrics.ttft or 0.0)
            if step.stats is not None:
                self._add_stats(step.stats)
            for summary in done.summaries:
                self._add_summary(summary)

    def _add_stats(self, stats: StepStats) -> None:
        self.stats = stats
        self.steps += 1
        self.preemptions += stats.num_preemptions
        self.failed_requests += stats.num_failed_requests
        self.step_seconds.observe(stats.duration)
        self.iteration_tokens.observe(stats.num_scheduled_tokens)
        prefix = (stats.prefix_queries, stats.prefix_hits)
        if prefix != self._last_prefix:
            # They start again from 0 with a new engine process.
            queries, hits = self._last_prefix if prefix >= self._last_prefix else (0, 0)
            self.prefix_queries += prefix[0] - queries
            self.prefix_hits += prefix[1] - hits
            self._last_prefix = prefix
        if stats.kv_block_times is not None:
            self._add_block_times(stats.kv_block_times)
        for account, seconds in stats.plugin_seconds.items():
            self.plugin_seconds[account] = self.plugin_seconds.get(account, 0.0) + seconds

    def _add_block_times(self, times: KVBlockTimes) -> None:
        for histogram, values in (
            (self.kv_lifetime, times.lifetimes),
            (self.kv_idle, times.idle_before_evict),
            (self.kv_reuse_gap, times.reuse_gaps),
        ):
            for seconds in values:
                histogram.observe(seconds)

    def _add_summary(self, summary: RequestSummary) -> None:
        self.finished[summary.finish_reason] = self.finished.get(summary.finish_reason, 0) + 1
        if summary.error_code is not None:
            self.error_codes[summary.error_code] = self.error_codes.get(summary.error_code, 0) + 1
        metrics = summary.metrics
        for histogram, seconds in (
            (self.e2e, metrics.e2e_latency),
            (self.queue, metrics.queue_time),
            (self.prefill, metrics.prefill_time),
            (self.decode, metrics.decode_time),
            (self.inference, metrics.inference_time),
            (self.time_per_output_token, summary.time_per_output_token),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        self.request_prompt_tokens.observe(summary.num_prompt_tokens)
        self.request_computed_tokens.observe(summary.num_prompt_tokens - summary.num_cached_tokens)
        self.request_output_tokens.observe(summary.num_output_tokens)
        self.request_longest_output.observe(max(summary.sample_lengths, default=0))
        self.request_n.observe(len(summary.sample_lengths))
        self.request_preemptions.observe(summary.num_preemptions)
        self.request_max_tokens.observe(summary.max_tokens)
