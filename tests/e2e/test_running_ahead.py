"""Engines that run ahead of a (slow, fake) device give the tokens of those that do not, on real weights too."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import pytest

from interlace import LLM, Provider, SamplingParams, hookimpl

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The capital of France is",
]


class AheadPlugin:
    @hookimpl
    def interlace_executors(self) -> Iterable[Provider]:
        yield Provider(name="ahead", target="interlace.testing.fake_stream:AheadExecutor", summary="late", api="1")


def generate(executor: str, params: list[SamplingParams], **settings: object) -> list[list[int]]:
    given = {"cache": {"memory": "1GiB"}, "max_model_len": 512, "dtype": "float32", "seed": 0, **settings}
    with LLM("smollm2", plugins=[AheadPlugin()], executor={"use": executor}, **given) as llm:
        outputs = llm.generate(PROMPTS, params)
    gc.collect()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [512, 16])
def test_greedy_tokens_on_real_weights_are_equal(chunk):
    params = [SamplingParams(temperature=0.0, max_tokens=12 + number) for number in range(len(PROMPTS))]
    settings = {"scheduler": {"max_num_batched_tokens": chunk, "max_num_seqs": 4}}
    assert generate("ahead", params, **settings) == generate("uniprocess", params, **settings)


@pytest.mark.slow
def test_seeds_on_real_weights_give_equal_tokens():
    params = [
        SamplingParams(temperature=1.0, seed=number, top_p=0.9, max_tokens=16, ignore_eos=True)
        for number in range(len(PROMPTS) - 1)
    ]
    params.append(SamplingParams(temperature=0.7, seed=1, repetition_penalty=1.2, logprobs=1, max_tokens=16))
    assert generate("ahead", params) == generate("uniprocess", params)
