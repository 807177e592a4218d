"""The embedded model with Triton attention and Triton kernels, interpreted, gives the tokens of the torch reference."""

from __future__ import annotations

import pytest

from interlace import LLM, SamplingParams

PROMPTS = ["The capital of France is", "One two three", "def"]
PARAMS = [
    SamplingParams(max_tokens=2, temperature=0.0),
    SamplingParams(max_tokens=2, temperature=0.9, top_p=0.9, seed=3, logprobs=2),
    SamplingParams(max_tokens=2, temperature=1.2, top_k=40, min_p=0.01, seed=4),
]


def _generate(which):
    with LLM(dtype="float32", max_model_len=64, attention=which, kernels=which, cache={"memory": "64MiB"}) as llm:
        return llm.generate(PROMPTS, PARAMS)


@pytest.mark.slow
def test_same_tokens_as_the_reference():
    """Greedy, drawn, and drawn with logprobs, in one batch of prompts of different lengths."""
    wanted = _generate({"use": "torch"})
    found = _generate({"use": "triton"})
    for own, other in zip(found, wanted, strict=True):
        assert own.outputs[0].token_ids == other.outputs[0].token_ids
    reported, expected = (results[1].outputs[0].logprobs for results in (found, wanted))
    for own, other in zip(reported, expected, strict=True):
        assert list(own) == list(other)
        for token in own:
            assert own[token].logprob == pytest.approx(other[token].logprob, abs=1e-3)
