"""`interlace bench serve` from flags to report."""

import json
import subprocess
import sys

import pytest

from interlace.cli import main

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.0000000,{10 + second},{2 + second}\n" for second in range(8)
)


@pytest.fixture
def bench(fake_beside, capsys):
    """`bench(*flags)` runs the command against the fake server: (exit code, stdout, stderr)."""
    _, url = fake_beside

    def run(*flags):
        code = main(["bench", "serve", "--base-url", url, *map(str, flags)])
        return code, *capsys.readouterr()

    return run


def measured(fake):
    """Bodies without those of the probe."""
    return [body for body in fake.bodies if body.get("max_tokens") != 2]


def test_a_run_reports_in_tables_json_and_picture(bench, fake_beside, tmp_path):
    fake, _ = fake_beside
    report, picture, requests = tmp_path / "report.json", tmp_path / "run.png", tmp_path / "requests.jsonl"
    code, out, err = bench(
        *("--num-prompts", 12, "--output-len", "5", "--input-len", "3-6", "--num-warmups", 3),
        *("--request-rate", "200:400", "--slo", "ttft=30s,e2e=60s", "--seed", 7, "--tokenizer", "none"),
        *("--json", report, "--plot", picture, "--requests-file", requests),
    )
    found = json.loads(report.read_text())
    assert code == 0 and "lengths are in words" in err
    assert (found["completed"], found["failed"], found["output_tokens"]) == (12, 0, 60)
    assert found["goodput"]["met"] == 12 and found["goodput"]["slo_s"] == {"ttft": 30.0, "e2e": 60.0}
    assert found["latencies"]["itl_s"]["count"] == 12 * 4
    assert found["setup"]["arrivals"] == "poisson, 200 to 400 requests/s (linear, over the run)"
    assert (found["setup"]["model"], found["setup"]["requests"], found["setup"]["warmups"]) == ("fake-model", 12, 3)
    assert found["token_counts"]["total_by"] == {"usage": 12} and found["client"]["send_lag_s"]["count"] == 12
    assert len(measured(fake)) == 15 and len(requests.read_text().splitlines()) == 12
    prompts = [body["prompt"] for body in measured(fake)]
    assert {len(prompt.split()) for prompt in prompts} <= {3, 4, 5, 6} and len(set(prompts[:3]) & set(prompts[3:])) == 0
    for word in ("TTFT", "ITL", "TPOT", "E2E", "p99", "goodput", "send lag", "output tokens/s", "12 of 12"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 100
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_the_seed_draws_prompts_and_arrivals(bench, fake_beside):
    fake, _ = fake_beside
    runs = []
    for seed in (1, 1, 2):
        fake.bodies.clear()
        bench("--num-prompts", 5, "--output-len", 3, "--num-warmups", 0, "--seed", seed)
        runs.append(sorted(body["prompt"] for body in measured(fake)))
    assert runs[0] == runs[1] != runs[2]


def test_the_served_models_tokenizer_gives_exact_lengths(bench, fake_beside, smollm2_path):
    fake, _ = fake_beside
    flags = ("--num-prompts", 4, "--input-len", 9, "--output-len", 3, "--num-warmups", 0, "--model", "smollm2")
    assert bench(*flags)[0] == 0
    assert {len(body["prompt"]) for body in measured(fake)} == {9}
    assert all(isinstance(token, int) for body in measured(fake) for token in body["prompt"])
    fake.bodies.clear()
    assert bench(*flags, "--endpoint", "chat")[0] == 0
    assert all(isinstance(body["messages"][0]["content"], str) for body in fake.bodies)


def test_a_trace_is_replayed(bench, fake_beside, tmp_path):
    fake, _ = fake_beside
    path = tmp_path / "azure.csv"
    path.write_text(TRACE)
    flags = ("--dataset-path", path, "--time-scale", 0.01, "--max-len", 21, "--num-warmups", 0, "--json", "-")
    code, out, _ = bench(*flags)
    found = json.loads(out)
    assert code == 0 and found["completed"] == 5  # 12, 14, 16, 18, 20 tokens
    assert [body["max_tokens"] for body in fake.bodies[1:]] == [2, 3, 4, 5, 6]
    assert found["duration_s"] >= 0.04
    assert found["setup"]["arrivals"] == "as the trace says, times × 0.01"


def test_errors_are_counted_by_kind_and_a_run_without_success_fails(bench, fake_beside):
    fake, _ = fake_beside
    say_words, calls = fake.script, iter(range(100))

    async def script(body, reply):
        if body["max_tokens"] != 2 and next(calls) % 2:
            await reply.refuse(503, "full")
        else:
            await say_words(body, reply)

    fake.script = script
    flags = ("--num-prompts", 6, "--output-len", 4, "--num-warmups", 0, "--tokenizer", "none")
    code, out, _ = bench(*flags)
    assert code == 0 and "3 of 6" in out and "3 http_503" in out and "3 of 6 requests failed" in out

    async def refuse(body, reply):
        await (say_words(body, reply) if body["max_tokens"] == 2 else reply.refuse(429, "slow down"))

    fake.script = refuse
    code, out, _ = bench(*flags, "--json", "-")
    assert code == 1 and json.loads(out)["errors"] == {"http_429": 6}


def test_the_self_test_measures_the_client_alone(bench):
    code, out, _ = bench("--num-prompts", 5, "--output-len", 4, "--self-test", "--json", "-", "--num-warmups", 0)
    found = json.loads(out)["self_test"]
    assert code == 0 and found["requests"] == 5 and found["added_latency_s"]["count"] == 20
    assert found["added_latency_s"]["min"] >= 0 and found["max_requests_per_s"] > 0 and found["max_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "trace"], "--dataset trace needs --dataset-path"),
        (["--arrival", "poisson"], "--arrival poisson needs --request-rate"),
        (["--request-rate", "fast"], "write requests per second, 5 or 1:20"),
        (["--request-rate", "-1"], "above 0, not -1"),
        (["--request-rate", "1", "--arrival", "closed"], "--request-rate does not go with --arrival closed"),
        (["--burstiness", "2"], "--burstiness goes with --arrival gamma only"),
        (["--prefix-len", "4"], "--prefix-len goes with --dataset shared-prefix only"),
        (["--input-len", "many"], "is no length"),
        (["--slo", "p99=3s"], "is no latency"),
        (["--extra-body", "[1]"], "should be a JSON object"),
        (["--plot", "run.jpg"], "should end in .png"),
        (["--num-promts", "3"], "Did you mean '--num-prompts'"),
        (["--dataset", "random", "--dataset-path", "x"], "--dataset random reads no file"),
        (["--dataset-path", "missing.json"], "missing.json cannot be read"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_sent(bench, fake_beside, flags, said):
    fake, _ = fake_beside
    code, out, err = bench(*flags)
    assert (code, out) == (2, "") and said in err and fake.bodies == []


def test_a_picture_without_matplotlib_is_refused_before_the_run(bench, fake_beside, monkeypatch, tmp_path):
    fake, _ = fake_beside
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = bench("--plot", tmp_path / "run.png")
    assert code == 2 and "pip install 'interlace[plot]'" in err and fake.bodies == []


def test_a_key_comes_from_a_file_or_the_environment(bench, fake_beside, tmp_path, monkeypatch):
    fake, _ = fake_beside
    key = tmp_path / "key"
    key.write_text("sesame\n")
    flags = ("--num-prompts", 1, "--num-warmups", 0, "--output-len", 1)
    bench(*flags, "--api-key-file", key)
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    bench(*flags)
    assert fake.keys == ["Bearer sesame"] * 2 + ["Bearer other"] * 2


def test_the_command_loads_no_torch(fake_beside):
    _, url = fake_beside
    script = (
        "import sys\nfrom interlace.cli import main\n"
        f"main(['bench', 'serve', '--base-url', '{url}', '--num-prompts', '2', '--output-len', '2', '--json', '-'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 0
