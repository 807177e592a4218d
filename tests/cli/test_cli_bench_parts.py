"""`interlace bench host`, `kernels`, `startup` and `prefill`: small runs of each, and what they refuse."""

import json

import pytest

from interlace.cli import main


def run(capsys, *arguments):
    code = main(["bench", *arguments])
    return code, *capsys.readouterr()


def test_host_times_steps_and_admissions_without_a_model(capsys):
    code, out, _ = run(capsys, "host", "--repeat", "1", "--json", "--scheduler.use", "priority")
    report = json.loads(out)
    assert code == 0
    assert report["scheduler"] == "priority"
    assert sorted({step["requests"] for step in report["steps"]}) == [1, 16, 64, 256]
    assert all(step["microseconds"] > 0 for step in report["steps"])
    assert [added["shared_tokens"] for added in report["added"]] == [0, 512]
    # Half of each prompt is shared there: a thousand requests hash and take fewer new blocks.
    assert all(min(added["add_ms"], added["hash_ms"], added["admit_ms"]) > 0 for added in report["added"])


def test_kernels_gives_each_op_against_the_peaks_of_the_same_run(capsys):
    code, out, err = run(capsys, "kernels", "rms_norm", "--json", "--threads", "1")
    report = json.loads(out)
    assert code == 0 and "measured here: reads" in err
    assert [(one["op"], one["rows"]) for one in report["results"]] == [("rms_norm", rows) for rows in (1, 8, 64, 256)]
    for one in report["results"]:
        moved = 2 * one["rows"] * 576 * 2
        assert one["gb_s"] == pytest.approx(moved / one["microseconds"] / 1e3)
        assert one["percent_of_limit"] == pytest.approx(100 * one["gb_s"] / report["peaks"]["read_gb_s"])


def test_kernels_measures_linears_as_the_weights_are_kept(capsys):
    """SmolLM2's file has most of its weights in Q4_1: blocks of 32 values in 20 bytes."""
    for flags, kept, nbytes in (((), "Q4_1", 576 * 1536 * 20 // 32), (("--weights", "int8"), "int8", 576 * 1536)):
        code, out, _ = run(capsys, "kernels", "linear down", "--json", "--dtype", "bfloat16", "--threads", "1", *flags)
        results = json.loads(out)["results"]
        assert code == 0 and {one["shape"] for one in results} == {f"1536x576 {kept}"}
        for one in results:
            moved = nbytes + one["rows"] * (1536 + 576) * 2
            assert one["gb_s"] == pytest.approx(moved / one["microseconds"] / 1e3)


def test_kernels_prints_limits_and_what_was_chosen_above_the_table(capsys):
    code, out, _ = run(capsys, "kernels", "rms_norm", "--dtype", "bfloat16", "--threads", "1")
    head, _, table = out.partition("\n\n")
    assert code == 0 and head.startswith("bfloat16, 1 threads\nlimits measured by torch just now: reads ")
    assert "attention native: " in head and "kernels native: rms_norm" in head
    assert table.split("\n")[0].split() == ["OP", "SHAPE", "ROWS", "µs", "GB/s", "GFLOP/s", "%", "OF", "THE", "LIMIT"]


def test_kernels_names_ops_when_none_matches(capsys):
    code, out, err = run(capsys, "kernels", "convolution", "--threads", "1")
    assert (code, out) == (2, "") and "no op's name starts with convolution" in err


def test_repeating_less_than_once_is_refused(capsys):
    code, _, err = run(capsys, "host", "--repeat", "0")
    assert code == 2 and "--repeat must be at least 1" in err


@pytest.mark.slow
def test_startup_counts_from_the_start_of_the_process(capsys):
    code, out, _ = run(capsys, "startup", "--repeat", "1", "--json", "--cache.memory", "64MiB")
    [one] = json.loads(out)["runs"]
    assert code == 0
    assert one["parts"]["total"] < one["first_token"]
    assert one["cpu"] > 0 and {"import", "weights"} <= set(one["parts"])


@pytest.mark.slow
def test_prefill_gives_one_token_for_each_prompt(capsys):
    flags = ("--num-prompts", "2", "--input-len", "64", "--repeat", "1", "--cache.memory", "64MiB")
    code, out, _ = run(capsys, "prefill", *flags, "--json")
    report = json.loads(out)
    assert code == 0 and report["benchmark"] == "prefill"
    assert (report["workload"]["prompt_tokens"], report["workload"]["output_tokens"]) == (128, 2)


@pytest.mark.slow
def test_step_names_the_parts_of_a_step(capsys):
    flags = ("--batch-size", "2", "--context", "40", "--steps", "2", "--cache.memory", "64MiB", "--threads", "1")
    code, out, _ = run(capsys, "step", *flags, "--json")
    profile = json.loads(out)
    assert code == 0
    assert {"batch", "model", "sampling"} <= set(profile["parts"])
    assert all(value >= 0 for value in profile["parts"].values())


def test_step_refuses_more_requests_than_may_run(capsys):
    code, _, err = run(capsys, "step", "--batch-size", "300")
    assert code == 2 and "--batch-size must be 1 to 256" in err
