"""`LLM` with the embedded model."""

import threading

import pytest

from interlace import LLM, SamplingParams
from interlace.errors import InvalidRequestError
from interlace.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "日本の首都は"]


@pytest.fixture(scope="module")
def llm():
    with LLM(cache={"memory": "192MiB"}, dtype="float32", seed=1) as llm:
        yield llm


def free_blocks(llm) -> int:
    return llm.front.control("free_blocks")


def test_text_is_the_decoding_of_the_tokens(llm):
    outputs = llm.generate(PROMPTS, GREEDY)
    tokenizer: Tokenizer = llm.front.tokenizer
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt == prompt and output.finished
        assert output.prompt_token_ids == tokenizer.encode(prompt)
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)
        assert output.usage.completion_tokens == len(output.outputs[0].token_ids) <= 12
        assert output.metrics.ttft > 0 and output.metrics.e2e_latency >= output.metrics.ttft
    assert "Paris" in outputs[0].outputs[0].text


def test_alone_and_together_are_the_same(llm):
    together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    assert [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS] == together


def test_stream_joins_to_the_same_text(llm):
    texts = [""] * len(PROMPTS)
    finished = set()
    for i, delta in llm.stream(PROMPTS, GREEDY):
        texts[i] += delta.outputs[0].text
        if delta.finished:
            finished.add(i)
    assert texts == [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]
    assert finished == set(range(len(PROMPTS)))


def test_chat_ends_at_eos(llm):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=64))
    answer = output.outputs[0]
    assert "Paris" in answer.text and "<|im_end|>" not in answer.text
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.token_ids[-1] in llm.front.tokenizer.eos_token_ids


def test_a_stop_string_across_tokens_frees_the_blocks(llm):
    [whole] = llm.generate("Once upon a time", GREEDY)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 - 3 : len(text) // 2 + 3]
    before = free_blocks(llm)
    [output] = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=500, stop=[stop]))
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    llm.generate("x", SamplingParams(max_tokens=1))
    assert free_blocks(llm) == before


def test_n_samples_and_seeds(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    first, again = (llm.generate("Once upon a time", params)[0] for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3


def test_logprobs_of_a_greedy_answer(llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=1)
    [output] = llm.generate("The capital of France is", params)
    answer = output.outputs[0]
    assert len(answer.logprobs) == len(answer.token_ids) == 6
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry[token].rank == 1 and len(entry) == 3
        assert entry[token].logprob == max(item.logprob for item in entry.values())
    total = sum(entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)
    assert answer.logprobs[0][answer.token_ids[0]].decoded_token == " Paris"
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) and output.prompt_logprobs[0] is None
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token in entry and entry[token].logprob <= 0


def test_a_repeated_prompt_comes_from_the_prefix_cache(llm):
    prompt = "A long prompt about the history of the railways, told in detail. " * 8
    params = SamplingParams(temperature=0.0, max_tokens=4)
    [cold] = llm.generate(prompt, params)
    [warm] = llm.generate(prompt, params)
    assert cold.usage.cached_tokens == 0 < warm.usage.cached_tokens < warm.usage.prompt_tokens
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    [salted] = llm.generate(prompt, params, cache_salt="mine")
    assert salted.usage.cached_tokens == 0


def test_bad_requests_leave_the_engine_alive(llm):
    for prompt, expected in [("", "empty"), ("word " * 9000, "max_model_len"), ([10**6], "outside the vocabulary")]:
        with pytest.raises(InvalidRequestError, match=expected):
            llm.generate(prompt)
    assert llm.generate("Hello", SamplingParams(max_tokens=2))[0].error is None


def test_a_deadline_ends_a_request_with_what_it_has(llm):
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    for timeout in (0.3, 3.0, 30.0):  # a busy machine may not come as far as the first token
        [output] = llm.generate("Once upon a time", params, timeout=timeout)
        if output.outputs[0].token_ids:
            break
    assert output.outputs[0].finish_reason == "error" and "deadline" in output.error.lower()
    assert 0 < len(output.outputs[0].token_ids) < 4000


def test_two_threads(llm):
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    results = {}

    def call(name):
        results[name] = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]

    threads = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {"a": expected, "b": expected}


def test_leaving_a_stream_frees_its_blocks(llm):
    llm.generate("x", SamplingParams(max_tokens=1))
    before = free_blocks(llm)
    for _, _ in llm.stream(PROMPTS, SamplingParams(max_tokens=1000, ignore_eos=True)):
        break
    llm.generate("x", SamplingParams(max_tokens=1))
    assert free_blocks(llm) == before
