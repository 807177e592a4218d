"""The 8-bit copy of the head changes no token of a real model, and stands back where logits are wanted."""

from __future__ import annotations

import pytest

from interlace import LLM, SamplingParams

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "1, 2, 3, 4,", "The"]
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


def answers(weights, dtype, screen):
    kernels = {"options": {"native": {"screen_head": screen}}}
    with LLM("smollm2", weights=weights, dtype=dtype, kernels=kernels, cache={"memory": "200MiB"}) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, progress=False)]
        beside = SamplingParams(max_tokens=40, seed=3, logprobs=1)  # wants logits: so do all steps it is in
        mixed = llm.generate([*PROMPTS, "And"], [GREEDY] * len(PROMPTS) + [beside], progress=False)
        assert [output.outputs[0].token_ids for output in mixed[:-1]] == found
        assert len(mixed[-1].outputs[0].logprobs) == len(mixed[-1].outputs[0].token_ids)
    return found


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", "bfloat16"), ("float32", "float32")])
def test_tokens_are_the_same_with_and_without(weights, dtype):
    assert answers(weights, dtype, True) == answers(weights, dtype, False)
