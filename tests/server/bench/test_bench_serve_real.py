"""`interlace bench serve` on our own server with the embedded model: what it reports is what the engine did."""

import json

import pytest

from interlace.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(server, capsys):
    def run(*flags):
        code = main(["bench", "serve", "--base-url", f"{server}/v1", "--json", "-", *map(str, flags)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_lengths_and_counts_are_exact(bench, endpoint):
    flags = ("--num-prompts", 6, "--num-warmups", 2, "--input-len", 40, "--output-len", 7, "--max-concurrency", 3)
    found = bench("--endpoint", endpoint, *flags)
    assert (found["completed"], found["output_tokens"], found["off_length"]) == (6, 42, 0)
    assert found["setup"]["ignore_eos"] and found["token_counts"]["total_by"] == {"usage": 6}
    assert found["peak_concurrency"] <= 3 and found["latencies"]["ttft_s"]["count"] == 6
    template = found["prompt_tokens"] - 6 * 40
    assert template == 0 if endpoint == "completions" else 0 < template < 6 * 40


def test_shared_prefixes_are_found_in_the_cache_and_random_prompts_are_not(bench):
    flags = ("--num-prompts", 8, "--num-warmups", 0, "--input-len", 8, "--output-len", 2, "--max-concurrency", 1)
    shared = bench("--dataset", "shared-prefix", "--num-prefixes", 2, "--prefix-len", 96, "--seed", 5, *flags)
    assert shared["prompt_tokens"] == 8 * 104 and shared["cached_tokens"] == (8 - 2) * 96
    assert bench("--seed", 6, *flags)["cached_tokens"] == 0


def test_a_mooncake_trace_shares_what_its_hashes_share(bench, tmp_path):
    rows = [(0, 512 + 40, [1, 2]), (400, 512 + 30, [1, 3]), (800, 512 + 20, [4, 5]), (1200, 512 + 25, [4, 6])]
    path = tmp_path / "mooncake.jsonl"
    lines = [{"timestamp": t, "input_length": n, "output_length": 2, "hash_ids": ids} for t, n, ids in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = bench("--dataset-path", path, "--num-warmups", 0, "--max-concurrency", 1, "--seed", 9)
    assert found["prompt_tokens"] == 4 * 512 + 115 and found["cached_tokens"] == 2 * 512
