"""When requests are sent: rates, ramps and burstiness, all from a seed."""

import itertools
import math
import statistics

import pytest

from interlace.bench.serve.arrivals import Arrivals, Rate, arrival_times
from interlace.bench.workloads import WorkloadError


def steady(rate):
    return Rate(start=rate, end=rate)


def intervals(times):
    return [after - before for before, after in itertools.pairwise(times)]


def test_constant_arrivals_are_evenly_spaced():
    times = arrival_times(Arrivals(process="constant", rate=steady(4)), 5, seed=1)
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("process", "burstiness", "variation"), [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)]
)
def test_rate_and_burstiness_are_those_asked_for(process, burstiness, variation):
    arrivals = Arrivals(process=process, rate=steady(20), burstiness=burstiness)
    gaps = intervals(arrival_times(arrivals, 20_000, seed=3))
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) / mean == pytest.approx(variation, rel=0.05)  # of a gamma: 1/√shape


def test_the_seed_decides():
    arrivals = Arrivals(process="gamma", rate=Rate(start=1, end=9), burstiness=0.5)
    one, again, other = (arrival_times(arrivals, 50, seed) for seed in (5, 5, 6))
    assert one == again != other
    assert one == sorted(one) and one[0] == 0.0


@pytest.mark.parametrize("shape", ["linear", "exponential"])
@pytest.mark.parametrize(("start", "end"), [(2, 10), (10, 2)])
def test_a_ramp_has_its_rate_at_every_moment(shape, start, end):
    rate = Rate(start=start, end=end, shape=shape, duration_s=100.0)
    times = arrival_times(Arrivals(process="constant", rate=rate), 2000, seed=0)
    for number, time in enumerate(times):
        if time > 100:
            break
        slope = (end - start) / 100
        growth = math.log(end / start) / 100
        linear = start * time + slope * time * time / 2
        exponential = start / growth * math.expm1(growth * time)
        assert number == pytest.approx(linear if shape == "linear" else exponential, abs=1e-6)
    later = [time for time in times if time > 100]
    assert intervals(later) == pytest.approx([1 / end] * (len(later) - 1))


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_a_ramp_without_duration_lasts_as_long_as_the_run(shape):
    times = arrival_times(Arrivals(process="constant", rate=Rate(start=1, end=4, shape=shape)), 1000, seed=0)
    gaps = intervals(times)
    assert gaps[0] == pytest.approx(1.0, rel=0.01) and gaps[-1] == pytest.approx(0.25, rel=0.01)


def test_a_closed_loop_is_due_at_once():
    assert arrival_times(Arrivals(), 3, seed=0) == [0.0, 0.0, 0.0]


def test_a_trace_is_replayed_from_its_first_request_at_its_scale():
    times = [100.0, 100.5, 103.0]
    assert arrival_times(Arrivals(process="trace"), 3, 0, times) == [0.0, 0.5, 3.0]
    assert arrival_times(Arrivals(process="trace", time_scale=0.1), 2, 0, times) == pytest.approx([0.0, 0.05])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rate(start=0, end=1), "above 0, not 0"),
        (lambda: Rate(start=1, end=float("inf")), "finite number above 0"),
        (lambda: Rate(start=1, end=2, duration_s=0), "a ramp must take some seconds"),
        (lambda: arrival_times(Arrivals(process="poisson"), 1, 0), "poisson arrivals need a request rate"),
        (lambda: arrival_times(Arrivals(process="trace"), 1, 0), "no times of its own"),
        (lambda: arrival_times(Arrivals(process="gamma", rate=steady(1), burstiness=0), 1, 0), "burstiness must be"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(WorkloadError, match=said):
        make()
