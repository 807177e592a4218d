"""`deterministic = true`: the same prompt gives the same bits alone and in company, however its prefill is cut, and
with its prefix in the cache."""

from __future__ import annotations

import pytest

from interlace import LLM, SamplingParams

PROMPT = "The history of the steam engine begins long before the first railway. " * 6
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, ignore_eos=True)
OTHERS = [f"{'Tell me more about it. ' * (i % 7)}Number {i}:" for i in range(63)]


def start(**settings):
    cache = {"memory": "300MiB", **settings.pop("cache", {})}
    return LLM("smollm2", deterministic=True, cache=cache, max_model_len=1024, **settings)


def bits(output):
    """What an answer is made of, log probabilities in full."""
    answer = output.outputs[0]
    return answer.token_ids, [
        {token: entry.logprob.hex() for token, entry in place.items()} for place in answer.logprobs
    ]


def ask(llm, others=()):
    mixed = [*others[::2], PROMPT, *others[1::2]]
    params = [
        PARAMS if prompt is PROMPT else SamplingParams(max_tokens=5 + i % 20, seed=i) for i, prompt in enumerate(mixed)
    ]
    return bits(llm.generate(mixed, params, progress=False)[mixed.index(PROMPT)])


@pytest.mark.parametrize("weights", ["as-shipped", pytest.param("bf16", marks=pytest.mark.slow)])
def test_company_chunks_and_cached_prefixes_change_no_bit(weights):
    with start(weights=weights) as llm:
        alone = ask(llm)
        llm.front.control("reset_prefix_cache")
        assert ask(llm, OTHERS[:7]) == alone
        assert ask(llm) == alone  # its prefix is cached now
        hit = llm.generate(PROMPT, PARAMS, progress=False)[0]
        assert hit.usage.cached_tokens > 0 and bits(hit) == alone
    with start(weights=weights, scheduler={"max_num_batched_tokens": 17}) as llm:
        assert ask(llm, OTHERS[:2]) == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"weights": "bf16"}, {"weights": "int8"}, {"weights": "as-shipped"}, {"dtype": "float32"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_alone_and_among_sixty_three(settings):
    with start(**settings) as llm:
        alone = ask(llm)
        llm.front.control("reset_prefix_cache")
        assert ask(llm, OTHERS) == alone
        assert ask(llm, OTHERS) == alone
    for budget in (16, 64, 513):
        with start(**settings, scheduler={"max_num_batched_tokens": budget, "max_num_seqs": 16}) as llm:
            assert ask(llm, OTHERS[:20]) == alone


def test_the_log_names_only_batch_invariant_parts():
    with start() as llm:
        report = dict(llm.front.report())
    assert "native" in report["attention"] and "native" in report["kernels"]
