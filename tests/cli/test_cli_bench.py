"""`interlace bench`: flags over a scripted engine, and one small run of each benchmark with the embedded model."""

import json

import pytest

from interlace.cli import main
from interlace.clock import MonotonicClock
from interlace.engine.front import Front
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly, front_spec


@pytest.fixture
def clients(monkeypatch):
    clients = []

    def open_fake(loaded, plugins, clock):
        clients.append(ScriptedClient(lambda request: [7] * request.params.max_tokens, clock=MonotonicClock()))
        spec = front_spec(257, max_model_len=400, seed=loaded.settings.seed)
        return Front(fake_assembly(clients[-1], spec=spec, clock=clock, subscribers=tuple(plugins)))

    monkeypatch.setattr(Front, "open", open_fake)
    return clients


def run(capsys, *arguments):
    code = main(["bench", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which benchmark? interlace bench throughput"),
        (["throughput", "--dataset", "alpaca"], "invalid choice: 'alpaca'"),
        (["throughput", "--dataset", "random", "--dataset-path", "x.json"], "--dataset random reads no file"),
        (["throughput", "--dataset", "sharegpt", "--input-len", "8"], "--input-len goes with --dataset random only"),
        (["throughput", "--dataset-path", "x.json", "--prefix-len", "8"], "--prefix-len goes with --dataset random"),
        (["throughput", "--num-prompts", "0"], "argument --num-prompts: 0 is too small, the least is 1"),
        (["throughput", "--num-promts", "3"], "Did you mean '--num-prompts'?"),
        (["latency", "--num-iters", "x"], "argument --num-iters: invalid"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(clients, capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and said in err
    assert clients == []


def test_work_that_does_not_fit_the_model_is_refused(clients, capsys):
    code, out, err = run(capsys, "throughput", "--input-len", "390", "--output-len", "11")
    assert (code, out) == (2, "") and "390 tokens in and 11 out exceed max_model_len = 400" in err


def test_throughput_runs_warm_ups_then_each_repetition(clients, capsys):
    flags = ("--num-prompts", "3", "--input-len", "5", "--output-len", "20", "--num-warmups", "2", "--repeat", "2")
    code, out, err = run(capsys, "throughput", "--json", *flags, "--seed", "4")
    report = json.loads(out)
    assert code == 0
    # The first token after the start, two warm-ups, two runs of three.
    assert [request.params.max_tokens for request in clients[0].added] == [1, 8, 8, 20, 20, 20, 20, 20, 20]
    assert report["workload"]["description"] == "random prompts, 5 tokens in and 20 out, seed 4"
    assert len(report["runs"]) == 2 and report["latencies"]["ttft_s"]["count"] == 6
    assert report["latencies"]["itl_s"]["count"] == 6 * 19
    assert "run 2 of 2: " in err and "3 requests, 15 tokens in, 60 out" in err


def test_the_seed_setting_draws_the_prompts(clients, capsys):
    flags = ("throughput", "--num-prompts", "2", "--input-len", "9", "--output-len", "1", "--num-warmups", "0")
    for seed in ("1", "1", "2"):
        run(capsys, *flags, "--seed", seed)
    one, again, other = ([request.prompt_token_ids for request in client.added[-2:]] for client in clients)
    assert one == again != other


def test_a_drawn_workload_can_be_saved_and_run_again(clients, capsys, tmp_path):
    path = str(tmp_path / "drawn.json")
    flags = ("--num-prompts", "2", "--input-len", "9", "--output-len", "3", "--save-workload", path)
    assert run(capsys, "throughput", *flags)[0] == 0
    assert run(capsys, "throughput", "--dataset-path", path)[0] == 0
    drawn, again = ([(r.prompt_token_ids, r.params.max_tokens) for r in client.added[-2:]] for client in clients)
    assert drawn == again


def test_a_workload_file_is_run_as_it_stands(clients, capsys, tmp_path):
    path = tmp_path / "work.json"
    path.write_text(json.dumps([{"prompt_token_ids": [n] * n, "max_tokens": n + 1} for n in (3, 1, 2)]))
    code, out, _ = run(capsys, "throughput", "--dataset-path", str(path), "--num-prompts", "2", "--json")
    assert code == 0
    assert [(r.prompt_token_ids, r.params.max_tokens) for r in clients[0].added[-2:]] == [([3, 3, 3], 4), ([1], 2)]
    assert json.loads(out)["workload"]["description"] == "the first requests of work.json"


def test_a_sharegpt_file_is_sampled(clients, capsys, tmp_path):
    turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A short answer."}]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    code, _, _ = run(capsys, "throughput", "--dataset-path", str(path), "--num-prompts", "1", "--num-warmups", "0")
    last = clients[0].added[-1]
    assert code == 0 and (len(last.prompt_token_ids), last.params.max_tokens) == (13, 15)  # one token a byte
    code, _, err = run(capsys, "throughput", "--dataset-path", str(path), "--num-prompts", "2")
    assert code == 2 and "2 prompts were asked for; 1 of the 1 conversations can be used" in err


def test_latency_repeats_one_batch(clients, capsys):
    flags = (
        "--input-len",
        "4",
        "--output-len",
        "6",
        "--batch-size",
        "2",
        "--num-iters",
        "3",
        "--num-iters-warmup",
        "1",
    )
    code, out, _ = run(capsys, "latency", *flags, "--json")
    report = json.loads(out)
    batches = [tuple(map(tuple, (r.prompt_token_ids for r in clients[0].added[i : i + 2]))) for i in (1, 3, 5, 7)]
    assert code == 0 and len(clients[0].added) == 9 and len(set(batches)) == 1
    assert report["benchmark"] == "latency" and report["batch_latency_s"]["count"] == 3
    assert report["workload"]["output_tokens"] == 12


def test_the_plain_report_names_every_figure(clients, capsys):
    code, out, _ = run(capsys, "latency", "--output-len", "3", "--num-iters", "2")
    assert code == 0
    for word in (
        "output tokens/s",
        "requests/s",
        "TTFT",
        "ITL",
        "TPOT",
        "E2E",
        "whole batch",
        "p99",
        "weights",
        "total",
    ):
        assert word in out
    assert "median of 2 runs" in out and "fcfs" not in out and "scheduler fake" in out
    assert max(map(len, out.splitlines())) <= 100


# ── the embedded model ──────────────────────────────────────────────────────────────────────────────────────────


def test_throughput_of_the_embedded_model(smollm2_path, capsys):
    shape = ("--num-prompts", "3", "--input-len", "8", "--prefix-len", "64", "--output-len", "3", "--num-warmups", "0")
    settings = ("--cache.memory", "64MiB", "--max-model-len", "256", "--scheduler.max-num-seqs", "1")
    code, out, err = run(capsys, "throughput", "--json", *shape, *settings, "--repeat", "2")
    report = json.loads(out)
    assert code == 0 and "run 2 of 2" in err
    assert report["workload"]["requests"] == 3
    assert (report["workload"]["prompt_tokens"], report["workload"]["output_tokens"]) == (3 * 72, 3 * 3)
    # One request at a time: the second and third find the two full blocks of the first, in each run anew.
    assert (report["prefix_queries"], report["prefix_hits"]) == (2 * 3 * 72, 2 * 2 * 64)
    assert report["steps"] == 2 * 3 * 3 and report["preemptions"] == 0
    assert report["latencies"]["ttft_s"]["count"] == 6 and report["latencies"]["itl_s"]["count"] == 12
    for one in report["runs"]:
        rates = one["rates"]
        assert rates["output_tokens_per_s"] * rates["duration_s"] == pytest.approx(9)
        assert rates["total_tokens_per_s"] * rates["duration_s"] == pytest.approx(3 * 75)
    start = report["startup"]
    assert all(start[part] > 0 for part in ("python_s", "config_s", "import_s", "weights_s", "first_token_s"))
    assert sum(start[part] for part in start if part != "total_s") == pytest.approx(start["total_s"])
    assert report["peak_rss_bytes"] > 100 << 20
    assert report["engine"]["model"] == "smollm2" and report["engine"]["selections"]["attention"]
    assert report["machine"]["versions"]["torch"]
