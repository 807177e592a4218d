"""docs/benchmarks/compare.py, with two settings of this engine as the engines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def engine(name, *flags):
    command = [sys.executable, "docs/benchmarks/engines/interlace.py", "smollm2", "--cache.memory", "128MiB", *flags]
    return f"[[engine]]\nname = {json.dumps(name)}\ncommand = {json.dumps(command)}\nskip = ['prefix']\n"


@pytest.mark.slow
def test_engines_are_run_in_turn_on_the_same_tokens(repo_root, tmp_path):
    work, config, out = tmp_path / "work.json", tmp_path / "engines.toml", tmp_path / "out.json"
    work.write_text(json.dumps([{"prompt_token_ids": list(range(5, 205)), "max_tokens": 3}] * 2))
    work_line = f"workload = {json.dumps(str(work))}\n"
    config.write_text(work_line + engine("native") + engine("torch", "--kernels.use", "torch"))
    command = [sys.executable, "docs/benchmarks/compare.py", str(config), "--rounds", "2", "--only", "TTFT of 64"]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=repo_root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    for name in ("native", "torch"):
        assert len(results[name]["TTFT of 64 tokens, ms"]) == 2
        assert results[name]["start to first token, s"][0] > 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("| TTFT of 64 tokens, ms")]
    assert len(rows) == 1 and rows[0].count("**") == 2, "the ratio of the first engine to the second"
    # Turns alternate: the second round begins with the second engine.
    said = [line.split(": ")[:2] for line in done.stderr.splitlines() if line.startswith("round ")]
    assert said == [["round 1", "native"], ["round 1", "torch"], ["round 2", "torch"], ["round 2", "native"]]


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_named(repo_root, tmp_path):
    work, config = tmp_path / "work.json", tmp_path / "engines.toml"
    work.write_text(json.dumps([{"prompt_token_ids": [5, 6], "max_tokens": 1}]))
    config.write_text(f"workload = {json.dumps(str(work))}\n" + engine("broken", "--kernels.use", "nothing"))
    command = [sys.executable, "docs/benchmarks/compare.py", str(config)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "broken ended with status" in done.stderr


def test_what_a_sum_over_ranks_costs(repo_root):
    command = [sys.executable, "docs/benchmarks/collectives.py", "--ranks", "2", "--width", "64", "--tokens", "1", "8"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[3:]]
    assert done.stdout.startswith("2 ranks\n")
    assert [row[:2] for row in rows] == [["1", "256"], ["8", "2048"]]
    assert all(float(figure) > 0 for row in rows for figure in row[2:])
