"""SmolLM2 with the attention backends for GPUs, in Triton's interpreter: the same tokens as with torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MAIN = "import sys; from interlace.cli import main; sys.exit(main())"
PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]


def generate(backend: str) -> list[list[int]]:
    """Token ids of a few greedy steps, by the command line in a process of its own."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    command = [sys.executable, "-c", MAIN, "generate", *prompts, "--max-tokens", "3", "--json"]
    settings = {"attention.use": backend, "dtype": "float32", "cache.memory": "64MiB", "engine.step_timeout_s": "600"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [answer["outputs"][0]["token_ids"] for answer in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    return generate("torch")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "triton_invariant", "flash"])
def test_smollm2_says_the_same(backend, wanted):
    assert [len(tokens) for tokens in wanted] == [3, 3]
    assert generate(backend) == wanted
