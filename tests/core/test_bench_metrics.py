"""Metrics of hand-made timelines."""

import pytest

from interlace.bench.metrics import Run, Timeline, distribution, latencies, percentile, rates, spread

STEADY = Timeline(arrival=10.0, tokens=[10.5, 10.75, 11.0, 11.5], num_prompt_tokens=6)
SINGLE = Timeline(arrival=10.0, tokens=[12.0], num_prompt_tokens=3)
BURST = Timeline(arrival=10.25, tokens=[10.5, 10.5, 11.0], num_prompt_tokens=1)  # two tokens came in one step


def test_latencies_of_one_request():
    assert (STEADY.ttft, STEADY.itl, STEADY.e2e, STEADY.tpot) == (0.5, [0.25, 0.25, 0.5], 1.5, pytest.approx(1 / 3))
    assert STEADY.e2e == STEADY.ttft + sum(STEADY.itl)


def test_a_single_token_has_no_time_between_tokens():
    assert (SINGLE.ttft, SINGLE.itl, SINGLE.e2e, SINGLE.tpot) == (2.0, [], 2.0, None)


def test_tokens_of_one_step_come_at_once():
    assert (BURST.ttft, BURST.itl, BURST.tpot) == (0.25, [0.0, 0.5], 0.25)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.9, 4.6), (0.99, 4.96), (1.0, 5.0)]
)
def test_percentiles_interpolate_between_neighbours(share, expected):
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], share) == pytest.approx(expected)


def test_percentile_of_few_values():
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_distribution_sorts_and_counts():
    found = distribution([3.0, 1.0, 2.0, 10.0])
    assert (found.count, found.mean, found.median, found.min, found.max) == (4, 4.0, 2.5, 1.0, 10.0)
    assert found.p90 == pytest.approx(7.9) and found.p99 == pytest.approx(9.79)
    assert distribution([]) is None


def test_spread_is_median_and_range():
    found = spread([5.0, 1.0, 2.0])
    assert (found.median, found.min, found.max) == (2.0, 1.0, 5.0)


def test_latencies_pool_the_requests():
    found = latencies([STEADY, SINGLE, BURST])
    assert found.ttft_s.count == 3 and found.ttft_s.median == 0.5
    assert found.itl_s.count == 5 and found.itl_s.median == 0.25
    assert found.tpot_s.count == 2 and found.tpot_s.max == pytest.approx(1 / 3)
    assert found.e2e_s.max == 2.0


def test_latencies_without_a_second_token():
    found = latencies([SINGLE])
    assert found.itl_s is None and found.tpot_s is None and found.ttft_s.mean == 2.0


def test_rates_count_from_handing_in_to_the_last_token():
    found = rates(Run(started=9.5, timelines=[STEADY, SINGLE, BURST]))
    assert found.duration_s == 2.5
    assert found.requests_per_s == 3 / 2.5
    assert found.output_tokens_per_s == 8 / 2.5
    assert found.total_tokens_per_s == (10 + 8) / 2.5
