"""What only shows end to end: order, seeds, two engines at once, the engine in a process of its own."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from interlace import LLM, SamplingParams, hookimpl
from interlace.errors import CapacityError, EngineDeadError

SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "cache": {"memory": "128MiB"}}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(logits_processors={"use": ["no_repeat_ngram"]}, **SMALL) as engine:
        yield engine


class FinishOrder:
    """An event subscriber that notes who finished when."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    @hookimpl
    def on_request_finished(self, summary: Any) -> None:
        self.labels.append(summary.request_id)


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [0, 1, 2, 3]), ("priority", [0, 3, 1, 2])])
def test_priority_changes_the_order_and_not_the_results(policy: str, expected: list[int]) -> None:
    """One seat; the first request takes it while the others queue up behind it."""
    order = FinishOrder()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12], [13]]
    scheduler = {"use": policy, "max_num_seqs": 1}
    with LLM(plugins=[order], scheduler=scheduler, **SMALL) as llm:
        outputs = llm.generate(prompts, GREEDY, priority=[-5, 1, 1, 0], progress=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    ids = [output.request_id for output in outputs]
    assert [ids.index(request_id) for request_id in order.labels] == expected


def test_a_seed_gives_the_same_text_alone_and_among_31_others(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, top_p=0.95, seed=1234, max_tokens=24)
    alone = llm.generate("Once upon a time", seeded, progress=False)[0]
    others = [
        SamplingParams(temperature=0.5 + number / 20, top_k=number, seed=number, max_tokens=5 + number)
        for number in range(31)
    ]
    prompts = [f"Number {number} is" for number in range(16)] + ["Once upon a time"]
    prompts += [f"Number {number} is" for number in range(16, 31)]
    outputs = llm.generate(prompts, [*others[:16], seeded, *others[16:]], progress=False)
    assert outputs[16].outputs[0].text == alone.outputs[0].text
    again = llm.generate("Once upon a time", SamplingParams(seed=1235, max_tokens=24), progress=False)[0]
    assert again.outputs[0].text != alone.outputs[0].text


def test_samples_of_one_prompt_share_its_blocks_without_copies() -> None:
    """70 prompt tokens in blocks of 16 are 4 full blocks: 8 samples hold them once, whether or not prefixes are
    cached between requests. Without sharing the samples would not fit into the cache together."""
    for prefix_caching in (True, False):
        cache = {"memory": "128MiB", "block_size": 16, "max_blocks": 1 + 4 + 8 * 2, "prefix_caching": prefix_caching}
        preempted: list[int] = []

        class Watch:
            @hookimpl
            def on_request_finished(self, summary: Any, into: Any = preempted) -> None:
                into.append(summary.num_preemptions)

        settings = {**SMALL, "cache": cache, "scheduler": {"watermark": 0}}
        with LLM(plugins=[Watch()], **settings) as llm:
            params = SamplingParams(n=8, seed=3, max_tokens=16, ignore_eos=True)
            output = llm.generate([list(range(100, 170))], params, progress=False)[0]
            assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
            assert [sample.index for sample in output.outputs] == list(range(8))
            assert preempted == [0]


def test_penalties_and_constraints_reach_the_sampler(llm: LLM) -> None:
    prompt = "The cat sat on the mat. The cat sat on the mat. The cat sat on the"
    plain = llm.generate(prompt, GREEDY, progress=False)[0].outputs[0]
    word = plain.text.split()[0]
    banned = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, bad_words=[word])
    assert word not in llm.generate(prompt, banned, progress=False)[0].outputs[0].text.split()
    only = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, allowed_token_ids=[300, 301])
    assert set(llm.generate(prompt, only, progress=False)[0].outputs[0].token_ids) <= {300, 301}
    bias = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logit_bias={777: 100})
    assert llm.generate(prompt, bias, progress=False)[0].outputs[0].token_ids == [777] * 3
    pairs = SamplingParams(
        temperature=0, max_tokens=30, ignore_eos=True, logits_processors={"no_repeat_ngram": {"size": 2}}
    )
    tokens = llm.generate("la la la la la la", pairs, progress=False)[0]
    history = tokens.prompt_token_ids + tokens.outputs[0].token_ids
    new = list(itertools.pairwise(history))[len(tokens.prompt_token_ids) - 1 :]
    assert len(set(new)) == len(new)


def test_min_tokens_holds_back_the_end(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Say hi."}]
    free = llm.chat(messages, SamplingParams(temperature=0, max_tokens=100), progress=False)[0].outputs[0]
    assert free.finish_reason == "stop"
    longer = len(free.token_ids) + 20
    held = SamplingParams(temperature=0, max_tokens=longer + 50, min_tokens=longer)
    assert len(llm.chat(messages, held, progress=False)[0].outputs[0].token_ids) >= longer


def test_prompt_logprobs_agree_with_greedy_logprobs(llm: LLM) -> None:
    """The log probability of a token is the same whether it is generated or given."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    first = llm.generate("The capital of France is", params, progress=False)[0]
    answer = first.outputs[0]
    assert answer.logprobs is not None
    given = first.prompt_token_ids + answer.token_ids
    second = llm.generate([given], SamplingParams(max_tokens=1, prompt_logprobs=2), progress=False)[0]
    assert second.prompt_logprobs is not None and len(second.prompt_logprobs) == len(given)
    assert second.prompt_logprobs[0] is None
    tail = second.prompt_logprobs[len(first.prompt_token_ids) :]
    for token, generated, prompted in zip(answer.token_ids, answer.logprobs, tail, strict=True):
        assert prompted is not None
        assert generated[token].logprob == pytest.approx(prompted[token].logprob, abs=1e-3)


def test_two_engines_with_different_settings_live_in_one_process(llm: LLM) -> None:
    settings = {**SMALL, "cache": {"memory": "64MiB", "block_size": 16}, "scheduler": {"use": "priority"}}
    with LLM(**settings) as other:
        answers: dict[str, list[int]] = {}

        def ask(name: str, engine: LLM) -> None:
            answers[name] = engine.generate("Two plus two is", GREEDY, progress=False)[0].outputs[0].token_ids

        threads = [threading.Thread(target=ask, args=pair) for pair in (("one", llm), ("other", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers["one"] == answers["other"]
        assert (llm.front.info.kv.block_size, other.front.info.kv.block_size) == (32, 16)
        assert (llm.front.spec.scheduler.name, other.front.spec.scheduler.name) == ("fcfs", "priority")


def test_the_engine_in_its_own_process_gives_the_same_tokens_and_dies_loudly(llm: LLM) -> None:
    prompts = ["The capital of France is", "Two plus two is"]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, progress=False)]
    with LLM(engine={"process": "subprocess"}, **SMALL) as other:
        outputs = other.generate(prompts, GREEDY, progress=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        pid = other.front.control("process_id")
        assert pid != os.getpid()
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            other.generate(prompts, SamplingParams(max_tokens=400, ignore_eos=True), progress=False)


def test_a_start_that_fails_in_the_engine_process_raises_the_same_error_here() -> None:
    settings = {**SMALL, "cache": {"memory": "1KiB"}}
    with pytest.raises(CapacityError) as inline:
        LLM(**settings)
    with pytest.raises(CapacityError) as remote:
        LLM(engine={"process": "subprocess"}, **settings)
    assert str(remote.value) == str(inline.value)
    assert "size_cache" in str(remote.value.__cause__)  # the child's traceback
