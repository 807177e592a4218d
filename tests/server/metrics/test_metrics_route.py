"""`/metrics` of a real server: names, labels, types and numbers, in both formats."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from interlace.server.app import create_app
from interlace.server.state import ServerState

KEY = "a-key-for-metrics"
HEADERS = {"Authorization": f"Bearer {KEY}"}
STORED = json.loads(Path(__file__).with_name("vllm_names.json").read_text("utf-8"))

PLAIN = "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
SCRAPERS = {
    "curl": "*/*",
    "prometheus 2": f"application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1,{PLAIN}",
    "prometheus 3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    f"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,{PLAIN}",
    "underscores": "application/openmetrics-text;version=1.0.0;escaping=underscores",
    "plain 1.0": "text/plain;version=1.0.0;escaping=underscores",
}
"""`Accept` headers of those who scrape."""


@pytest.fixture(scope="module")
def served(serving):
    """A server with vLLM's names, and what is done with it."""
    with (
        serving(server={"metrics_compat": "vllm", "api_keys": [KEY]}) as running,
        httpx.Client(base_url=running.url, headers=HEADERS, timeout=120) as client,
    ):
        yield running, client


def families(client, prefix="interlace:"):
    """Family name without prefix → (type, {labels as a frozenset: value})."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {
        family.name.removeprefix(prefix): (family.type, family.samples)
        for family in parse_text(answer.text)
        if family.name.startswith(prefix)
    }


def value(client, name, suffix="", prefix="interlace:", **labels):
    """One number; counters without `_total`, histograms with `_count` or `_sum`."""
    kind, samples = families(client, prefix)[name]
    full = prefix + name + (suffix or ("_total" if kind == "counter" else ""))
    found = [s.value for s in samples if s.name == full and labels.items() <= s.labels.items()]
    assert len(found) == 1, (name, labels, samples)
    return found[0]


def complete(client, prompt, **body):
    answer = client.post(
        "/v1/completions",
        json={"model": "smollm2", "prompt": prompt, "temperature": 0, "ignore_eos": True, **body},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_name_of_vllm_that_has_a_meaning_here_is_there(served):
    complete(served[1], "Names", max_tokens=2)
    found = families(served[1], "vllm:")
    for entry in STORED:
        name = entry["name"]
        if "missing" in entry:
            assert len(entry["missing"]) > 10 and name.removesuffix("_total") not in found
            continue
        kind, samples = found.pop(name)
        assert kind == entry["type"], name
        assert samples, name
        for sample in samples:
            own = set(sample.labels) - ({"le"} if kind == "histogram" else set())
            assert own == set(entry["labels"]), name
            suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}[kind]
            assert sample.name in {f"vllm:{name}{suffix}" for suffix in suffixes}
            if "model_name" in own:
                assert sample.labels["model_name"] == "smollm2"
            assert sample.labels["engine"] == "0"
    assert not found, "names vLLM does not have"


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        # Gauges and infos that routers balance by.
        ("num_requests_running", {}),
        ("num_requests_waiting", {}),
        ("kv_cache_usage_perc", {}),
        ("cache_config_info", {"block_size": "32"}),
        # What the panels of vLLM's own dashboards are made of.
        ("num_requests_waiting_by_reason", {"reason": "capacity"}),
        ("num_requests_waiting_by_reason", {"reason": "deferred"}),
        ("prompt_tokens_total", {}),
        ("generation_tokens_total", {}),
        ("prompt_tokens_cached_total", {}),
        ("prompt_tokens_by_source_total", {"source": "local_compute"}),
        ("prompt_tokens_by_source_total", {"source": "local_cache_hit"}),
        ("prompt_tokens_by_source_total", {"source": "external_kv_transfer"}),
        ("prefix_cache_hits_total", {}),
        ("prefix_cache_queries_total", {}),
        ("num_preemptions_total", {}),
        ("request_success_total", {"finished_reason": "stop"}),
        ("request_success_total", {"finished_reason": "length"}),
        ("request_success_total", {"finished_reason": "abort"}),
        ("request_success_total", {"finished_reason": "error"}),
        ("admission_rejections_total", {"reason": "max_num_queued_reqs"}),
        ("iteration_tokens_total_bucket", {"le": "+Inf"}),
        ("iteration_tokens_total_sum", {}),
        ("request_max_num_generation_tokens_sum", {}),
        ("request_params_max_tokens_bucket", {"le": "+Inf"}),
        *(
            (f"{histogram}{suffix}", {"le": "+Inf"} if suffix == "_bucket" else {})
            for histogram in (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "request_time_per_output_token_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
                "request_inference_time_seconds",
                "request_prompt_tokens",
                "request_generation_tokens",
                "kv_block_lifetime_seconds",
                "kv_block_idle_before_evict_seconds",
                "kv_block_reuse_gap_seconds",
            )
            for suffix in ("_bucket", "_sum", "_count")
        ),
    ],
)
@pytest.mark.parametrize("scraper", SCRAPERS)
def test_selectors_of_existing_dashboards_and_routers_select(compat_samples, scraper, name, labels):
    """Exactly one series of a server each, for every scraper, under the labels by which dashboards filter."""
    own = labels | {"engine": "0"} | ({} if name == "cache_config_info" else {"model_name": "smollm2"})
    found = [s for s in compat_samples[scraper] if s.name == f"vllm:{name}" and own.items() <= s.labels.items()]
    assert len(found) == 1


@pytest.fixture(scope="module")
def compat_samples(served):
    """Scraper → all samples it gets."""
    client = served[1]
    complete(client, "Dashboards", max_tokens=2)
    found = {}
    for scraper, accept in SCRAPERS.items():
        answer = client.get("/metrics", headers={"Accept": accept})
        openmetrics = answer.headers["content-type"].startswith("application/openmetrics-text")
        parse = parse_openmetrics if openmetrics else parse_text
        found[scraper] = [sample for family in parse(answer.text) for sample in family.samples]
    return found


def test_the_numbers_are_those_of_the_requests(served):
    client = served[1]
    names = ("prompt_tokens", "generation_tokens", "prompt_tokens_cached", "prefix_cache_queries", "prefix_cache_hits")
    histograms = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
    histograms += ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")
    histograms += ("request_params_n", "request_generation_tokens", "request_params_max_tokens")

    def read():
        counts = {name: value(client, name) for name in names}
        counts |= {name: value(client, name, "_count") for name in histograms}
        counts["tokens"] = value(client, "request_generation_tokens", "_sum")
        counts["length"] = value(client, "request_success", finished_reason="length")
        counts["http"] = sum(
            sample.value
            for sample in families(client)["http_requests"][1]
            if sample.labels["route"] == "/v1/completions" and sample.labels["status"] == "200"
        )
        return counts

    reuses = value(client, "kv_block_reuse_gap_seconds", "_count")
    before = read()
    prompt = list(range(1000, 1100))  # three full blocks of 32 and a rest
    complete(client, prompt, max_tokens=9)
    complete(client, prompt, max_tokens=9)
    complete(client, prompt[:40], max_tokens=5, n=2)
    change = {name: number - before[name] for name, number in read().items()}
    assert change == {
        "prompt_tokens": 240,
        "generation_tokens": 28,
        "prompt_tokens_cached": 96 + 32,
        "prefix_cache_queries": change["prefix_cache_queries"],  # siblings of a sample are looked up, too
        "prefix_cache_hits": change["prefix_cache_hits"],
        "time_to_first_token_seconds": 3,
        "inter_token_latency_seconds": 8 + 8 + 4 + 4,
        "e2e_request_latency_seconds": 3,
        "request_queue_time_seconds": 3,
        "request_prefill_time_seconds": 3,
        "request_decode_time_seconds": 3,
        "request_params_n": 3,
        "request_generation_tokens": 3,
        "request_params_max_tokens": 3,
        "tokens": 28,
        "length": 3,
        "http": 3,
    }
    assert change["prefix_cache_queries"] >= 240 and 128 <= change["prefix_cache_hits"] <= 160
    by_source = {s.labels["source"]: s.value for s in families(client)["prompt_tokens_by_source"][1]}
    assert sum(by_source.values()) == value(client, "prompt_tokens")
    assert value(client, "plugin_seconds", kind="schedulers", plugin="fcfs") > 0
    assert value(client, "kv_block_reuse_gap_seconds", "_count") > reuses, "every second block is watched"
    assert value(client, "prompt_tokens", prefix="vllm:") == value(client, "prompt_tokens")


def test_gauges_rise_while_requests_run_and_fall_when_clients_leave(served):
    client = served[1]
    aborted = value(client, "request_success", finished_reason="abort")
    body = {"model": "smollm2", "prompt": "On and on", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # held: without it the stream would be closed
        assert next(lines).startswith("data: ")
        assert value(client, "num_requests_running") == 1
        assert value(client, "kv_cache_usage_perc") > 0
        assert value(client, "http_requests_in_flight") == 2
    for _ in range(1200):
        if value(client, "num_requests_running") == 0:
            break
        time.sleep(0.05)
    assert value(client, "num_requests_running") == value(client, "num_requests_waiting") == 0
    assert value(client, "kv_cache_usage_perc") == 0
    assert value(client, "request_success", finished_reason="abort") == aborted + 1
    assert value(client, "engine_up") == 1


def test_refused_requests_are_counted_under_bounded_labels(served):
    running, client = served
    assert httpx.get(f"{running.url}/metrics").status_code == 401
    assert client.get("/no/such/route").status_code == 404
    assert client.post("/v1/completions", json={}).status_code == 400
    series = {
        tuple(s.labels[name] for name in ("method", "route", "status")) for s in families(client)["http_requests"][1]
    }
    assert ("POST", "/v1/completions", "400") in series
    assert ("GET", "other", "401") in series and ("GET", "other", "404") in series
    assert not any("no/such" in route for _, route, _ in series)


def test_openmetrics_where_the_client_accepts_it(served):
    client = served[1]
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"interlace:generation_tokens", "interlace:time_to_first_token_seconds"} <= names
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")


def test_a_scrape_waits_for_no_one_and_no_one_for_it(served):
    """Many at once, while a request runs: all are answered, with counters that never fall."""
    client = served[1]
    seen, failures = [], []

    def scrape():
        try:
            with httpx.Client(base_url=client.base_url, headers=HEADERS, timeout=60) as own:
                seen.append([value(own, "generation_tokens") for _ in range(3)])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in threads:
        thread.start()
    complete(client, "Count", max_tokens=20)
    for thread in threads:
        thread.join()
    assert not failures and len(seen) == 4
    assert all(numbers == sorted(numbers) for numbers in seen)


async def test_two_servers_count_apart_and_metrics_can_be_off(served):
    running, client = served

    async def read(**changes):
        settings = running.llm.loaded.settings.server.model_copy(update=changes)
        app = create_app(ServerState(running.llm, settings, ("other",), 0))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://other") as own:
            return await own.get("/metrics")

    answer = await read(metrics_compat="none")
    assert 'interlace:generation_tokens_total{engine="0",model_name="other"} 0.0' in answer.text
    assert "vllm:" not in answer.text
    assert value(client, "generation_tokens") > 0
    assert (await read(metrics=False)).status_code == 404
