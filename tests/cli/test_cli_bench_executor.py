"""`interlace bench executor`: what an executor adds to a step, for any of them; and ranks from the command line."""

from __future__ import annotations

import json

import pytest

from interlace.cli import main
from interlace.testing.executor_suite import MODEL, SETTINGS


@pytest.fixture
def tiny(tmp_path):
    """Flags of an engine with the tiny model."""
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "vocab_size": 258}))
    flags = ["--model", str(tmp_path)]
    for key, value in SETTINGS.items():
        flags += [f"--{key.replace('_', '-')}", str(value)]
    return flags


def run(capsys, *arguments):
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_a_worker_in_the_same_process_exchanges_nothing(capsys, tiny):
    code, out, err = run(capsys, "bench", "executor", *tiny, "--requests", "1,4", "--steps", "3", "--json")
    report = json.loads(out)
    assert code == 0 and report["executor"] == "uniprocess", err
    assert [one["requests"] for one in report["steps"]] == [1, 4]
    for one in report["steps"]:
        assert 0 < one["worker_us"] <= one["step_us"] and one["overhead_us"] > 0
        assert one["exchanged_bytes"] == {} and one["plan_bytes"] > 50 and one["result_bytes"] > 50


SUMMED = {"all_reduce": 4 * 5 * 32 * 4, "all_gather": 4 * 258 // 2 * 4}
"""Two sums a layer and one for the embedding, of float32 vectors of 32; half the logits of each rank."""
GATHERED = {"all_reduce": 4 * 32 * 4, "all_gather": 4 * 2 * (16 + 16 + 24 + 16) * 4 + SUMMED["all_gather"]}
"""The sum of the embedding; a layer's heads, its outputs of attention, its feed-forward network's, half of each."""


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "expected"), [("float32", SUMMED), ("int8", GATHERED)])
def test_what_ranks_exchange_is_counted(capsys, tiny, weights, expected):
    flags = ("--requests", "4", "--steps", "5", "--json", "--executor.use", "multiprocess", "--weights", weights)
    ranks = "--executor.options.multiprocess.tensor_parallel"
    code, out, err = run(capsys, "bench", "executor", *tiny, *flags, ranks, "2")
    assert code == 0, err
    (one,) = json.loads(out)["steps"]
    assert one["exchanged_bytes"] == expected


@pytest.mark.parametrize("wrong", [("--requests", "0"), ("--requests", "1,x"), ("--requests", "7"), ("--steps", "0")])
def test_impossible_numbers_are_refused(capsys, tiny, wrong):
    code, out, err = run(capsys, "bench", "executor", *tiny, *wrong)
    assert (code, out) == (2, "") and "--requests takes numbers from 1 to 6 with commas between them" in err


@pytest.mark.slow
@pytest.mark.parametrize("option", ["tensor_parallel", "pipeline_parallel"])
def test_generating_on_ranks(capsys, option):
    flags = ("--max-tokens", "3", "--cache.memory", "64MiB", "--max-model-len", "256")
    ranks = ("--executor.use", "multiprocess", f"--executor.options.multiprocess.{option}", "2")
    code, out, err = run(capsys, "generate", "--prompt", "The capital of France is", *flags, *ranks)
    assert code == 0 and "Paris" in out, err
