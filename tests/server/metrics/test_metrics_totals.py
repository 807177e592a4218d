"""Counting by itself: histograms, restarts of the engine, what a step costs in observations."""

from __future__ import annotations

import pytest

from interlace.engine.output_processor import Processed
from interlace.messages import KVBlockTimes, RequestMetrics, RequestSummary, StepOutput, StepStats
from interlace.server.metrics.histogram import BLOCK_SECONDS, COUNTS, GAP_SECONDS, SECONDS, TOKENS, Histogram, geometric
from interlace.server.metrics.names import METRICS
from interlace.server.metrics.totals import EngineTotals


def stats(**changes):
    known = dict.fromkeys(
        ("num_running", "num_waiting", "num_scheduled_requests", "num_scheduled_tokens", "num_prefill_tokens"), 0
    )
    known |= {"num_sampled_tokens": 0, "num_preemptions": 0, "kv_usage": 0.0, "prefix_queries": 0, "prefix_hits": 0}
    return StepStats(**({"step_id": 0, "now": 1.0, "duration": 0.01} | known | changes))


def step(now=1.0, tokens=0, **changes):
    return StepOutput(
        step_id=0, now=now, request_ids=[], counts=[], token_ids=[1] * tokens, stats=stats(now=now, **changes)
    )


@pytest.mark.parametrize("bounds", [SECONDS, GAP_SECONDS, TOKENS, COUNTS, BLOCK_SECONDS])
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))
    assert 8 <= len(bounds) <= 40


def test_geometric_bounds():
    assert geometric(0.001, 0.1, (1, 2, 5)) == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def test_histogram_counts_up_to_and_including_each_bound():
    histogram = Histogram((1.0, 2.0, 4.0))
    histogram.observe(1.0)
    histogram.observe(1.5, 3)
    histogram.observe(100.0)
    assert list(histogram.cumulative()) == [("1.0", 1), ("2.0", 4), ("4.0", 4), ("+Inf", 5)]
    assert histogram.total == 1.0 + 4.5 + 100.0 and histogram.count == 5


def test_gaps_of_a_step_are_observed_together():
    totals = EngineTotals()
    totals.on_step(step(now=10.0, tokens=64), Processed([], {}, [], gaps={9.95: 63, 9.0: 1}))
    assert totals.gap.count == 64
    assert totals.gap.total == pytest.approx(63 * 0.05 + 1.0)
    assert totals.generation_tokens == 64


def test_counts_go_on_when_the_engine_begins_again():
    totals = EngineTotals()
    nothing = Processed([], {}, [])
    for queries, hits in ((100, 10), (100, 10), (150, 40), (20, 5), (30, 6)):  # the fourth is of a new process
        totals.on_step(step(prefix_queries=queries, prefix_hits=hits, plugin_seconds={"schedulers:fcfs": 0.5}), nothing)
    assert (totals.prefix_queries, totals.prefix_hits) == (150 + 30, 40 + 6)
    assert totals.plugin_seconds == {"schedulers:fcfs": 2.5}
    assert totals.steps == 5


def test_the_lives_of_blocks_are_observed_one_by_one():
    totals = EngineTotals()
    for times in (None, KVBlockTimes([7.0, 9.0], [1.0, 2.0], [0.5]), KVBlockTimes([], [], [0.25])):
        totals.on_step(step(kv_block_times=times), Processed([], {}, []))
    assert (totals.kv_lifetime.count, totals.kv_lifetime.total) == (2, 16.0)
    assert (totals.kv_idle.count, totals.kv_idle.total) == (2, 3.0)
    assert (totals.kv_reuse_gap.count, totals.kv_reuse_gap.total) == (2, 0.75)


def test_requests_that_reached_nothing_have_no_times():
    totals = EngineTotals()
    summary = RequestSummary(
        request_id="a",
        finish_reason="error",
        error_code="deadline",
        num_prompt_tokens=7,
        num_output_tokens=0,
        num_cached_tokens=0,
        num_preemptions=0,
        metrics=RequestMetrics(arrival_time=1.0, finished_time=3.0),
        finish_reasons=("error",),
        sample_lengths=(0,),
    )
    totals.on_step(step(), Processed([], {}, [summary]))
    assert totals.finished["error"] == 1 and totals.error_codes == {"deadline": 1}
    assert totals.e2e.total == 2.0
    assert totals.queue.count == totals.decode.count == totals.time_per_output_token.count == 0


def test_names_are_unique_and_explained():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.help.endswith(".") for metric in METRICS)
    assert not any(metric.name.endswith("_total") for metric in METRICS if metric.kind == "counter")
