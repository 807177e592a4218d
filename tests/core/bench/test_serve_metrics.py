"""Figures of a run from exchanges whose times are known."""

import pytest

from interlace.bench.machine import Machine
from interlace.bench.serve.client import Exchange
from interlace.bench.serve.load import LoadRun
from interlace.bench.serve.metrics import gaps, parse_slo, timeline
from interlace.bench.serve.report import ServeSetup, make_report, warnings_of
from interlace.bench.workloads import WorkloadError

SETUP = ServeSetup(
    base_url="http://x/v1",
    endpoint="chat",
    model="m",
    temperature=0.0,
    ignore_eos=True,
    extra_body={},
    workload="w",
    arrivals="a",
    seed=0,
    requests=4,
    warmups=0,
    max_concurrency=None,
    timeout_s=1.0,
)
MACHINE = Machine(cpu=None, cores=2, load=0.0, system="test", versions={})


def exchange(sent, times, tokens=None, **fields):
    chunk_tokens = tokens or [1] * len(times)
    return Exchange(
        index=0,
        asked_tokens=fields.pop("asked", sum(chunk_tokens)),
        due=fields.pop("due", sent),
        ready=fields.pop("ready", sent),
        sent=sent,
        ended=fields.pop("ended", times[-1] if times else sent),
        chunk_times=times,
        chunk_tokens=chunk_tokens,
        counted_by=fields.pop("counted_by", "chunks"),
        finish_reason="length",
        **fields,
    )


def report(exchanges, slo=None, started=0.0, cpu_s=0.0):
    return make_report(SETUP, LoadRun(started=started, exchanges=exchanges, cpu_s=cpu_s), slo or {}, None, MACHINE)


def test_latencies_and_rates_are_exact():
    found = report(
        [
            exchange(0.0, [0.5, 0.7, 0.9, 1.1], prompt_tokens=10, output_tokens=4, cached_tokens=6),
            exchange(1.0, [2.0, 2.1], prompt_tokens=20, output_tokens=2, cached_tokens=0),
        ]
    )
    lat = found.latencies
    assert (lat.ttft_s.mean, lat.ttft_s.min, lat.ttft_s.max) == pytest.approx((0.75, 0.5, 1.0))
    assert lat.itl_s.count == 4 and lat.itl_s.mean == pytest.approx(0.7 / 4)
    assert (lat.tpot_s.min, lat.tpot_s.max) == pytest.approx((0.1, 0.2))
    assert (lat.e2e_s.min, lat.e2e_s.max) == pytest.approx((1.1, 1.1))
    assert found.duration_s == pytest.approx(2.1)
    assert found.output_tokens_per_s == pytest.approx(6 / 2.1)
    assert found.total_tokens_per_s == pytest.approx(36 / 2.1)
    assert found.requests_per_s == pytest.approx(2 / 2.1)
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (30, 6, 6)


def test_failures_count_in_no_rate_and_no_latency():
    good = exchange(0.0, [1.0, 2.0], output_tokens=2)
    late = exchange(0.0, [5.0], error="timeout", message="first", ended=9.0)
    refused = [exchange(0.0, [], error="http_503", message="full", ended=0.5) for _ in range(2)]
    found = report([good, late, *refused], slo={"e2e": 10.0})
    assert (found.completed, found.failed) == (1, 3)
    assert found.errors == {"http_503": 2, "timeout": 1} and found.error_messages["timeout"] == "first"
    assert found.latencies.ttft_s.count == 1 and found.output_tokens == 2
    assert found.requests_per_s == pytest.approx(1 / 9)
    assert (found.goodput.met, found.goodput.share) == (1, 0.25)
    assert any("3 of 4 requests failed" in text for text in warnings_of(found))


def test_goodput_needs_every_target():
    exchanges = [
        exchange(0.0, [0.1, 0.2, 0.3]),
        exchange(0.0, [0.3, 0.4, 0.5]),  # TTFT missed
        exchange(0.0, [0.1, 0.5, 0.9]),  # TPOT missed
        exchange(0.0, [0.1]),  # one token: no TPOT
    ]
    found = report(exchanges, slo={"ttft": 0.2, "tpot": 0.15, "e2e": 2.0})
    assert found.goodput.met == 2 and found.goodput.share == 0.5
    assert found.goodput.requests_per_s == pytest.approx(2 / 0.9)


def test_packed_tokens_come_together_where_their_number_is_known():
    known = exchange(0.0, [1.0, 2.0], [2, 3], counted_by="token_ids")
    assert gaps(known) == [0.0, 1.0, 0.0, 0.0]
    unknown = exchange(0.0, [1.0, 2.0], output_tokens=5, asked=5)
    assert gaps(unknown) == [1.0]
    found = report([unknown])
    assert found.latencies.tpot_s.mean == pytest.approx(1.0 / 4)  # by the usage
    assert found.token_counts.tokens_per_chunk == 2.5 and found.token_counts.total_by == {"usage": 1}
    assert any("packs 2.50 tokens into a chunk" in text for text in warnings_of(found))
    assert sum(found.timeline.output_tokens) == pytest.approx(5)


def test_the_time_line_adds_up():
    exchanges = [exchange(10.0, [11.0, 12.0]), exchange(11.0, [12.0, 14.0]), exchange(14.0, [20.0], error="timeout")]
    line = timeline(exchanges, 10.0, 10.0)
    assert line.bin_s == pytest.approx(0.1) and sum(line.arrivals) == 3
    assert sum(line.completions) == 2 and sum(line.errors) == 1
    assert line.arrivals[0] == line.arrivals[10] == line.arrivals[40] == 1
    assert sum(line.concurrency) * line.bin_s == pytest.approx(2 + 3 + 6)
    assert line.concurrency[15] == pytest.approx(2) and line.concurrency[30] == pytest.approx(1)
    assert line.peak_concurrency == 2  # the third begins where the second ends
    assert line.mean_concurrency == pytest.approx(1.1)


def test_the_clients_own_lateness_is_told_from_waiting_for_room():
    found = report([exchange(1.0, [2.0], due=0.2, ready=0.9), exchange(1.0, [2.0])], cpu_s=0.5)
    assert found.client.send_lag_s.max == pytest.approx(0.1)
    assert found.client.room_wait_s.max == pytest.approx(0.7)
    assert found.client.cpu_share == pytest.approx(0.25)
    assert any("this client was a bottleneck" in text for text in warnings_of(found))


def test_nothing_is_said_of_a_clean_run():
    assert warnings_of(report([exchange(0.0, [1.0, 2.0], output_tokens=2)])) == []
    no_usage = report([exchange(0.0, [1.0, 2.0])])
    assert "reports no usage" in warnings_of(no_usage)[0] and no_usage.total_tokens_per_s is None


def test_other_lengths_than_asked_are_told():
    short = exchange(0.0, [1.0], asked=3, output_tokens=1)
    assert "1 answers have another length" in warnings_of(report([short]))[0]


def test_a_run_without_success_has_no_latencies():
    found = report([exchange(0.0, [], error="connect", message="refused", ended=1.0)])
    assert found.latencies.ttft_s is None and found.completed == 0 and found.output_tokens_per_s == 0


def test_targets_are_read_with_their_unit():
    assert parse_slo("ttft=200ms, tpot=.03s,e2e=5") == {"ttft": 0.2, "tpot": 0.03, "e2e": 5.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tttf=1s", "Did you mean 'ttft'"),
        ("ttft=fast", "write ttft=200ms"),
        ("", "is no latency"),
        ("e2e=0", "no target"),
    ],
)
def test_bad_targets_are_refused(text, said):
    with pytest.raises(WorkloadError, match=said):
        parse_slo(text)
