"""The official client against a real server."""

import asyncio
import json

import openai
import pytest

MODEL = "smollm2"
ASK = [{"role": "user", "content": "What is the capital of France?"}]
FRANCE = "The capital of France is"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, messages=ASK, **options):
    return client.chat.completions.create(model=MODEL, messages=messages, **({"temperature": 0} | options))


def complete(client, prompt=FRANCE, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **({"temperature": 0} | options))


def test_answers_equal_transformers(client, repo_root):
    """The stored references are transformers' greedy tokens; a gap says how sure it was of each."""
    stored = json.loads((repo_root / "tests/e2e/references/smollm2.json").read_text("utf-8"))["references"][:4]
    answer = complete(
        client,
        [reference["prompt_token_ids"] for reference in stored],
        max_tokens=16,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, reference in zip(answer.choices, stored, strict=True):
        assert min(reference["gaps"][:16]) > 1e-3, "no tie: the answer is certain"
        assert choice.token_ids == reference["token_ids"][:16]
        assert choice.prompt_token_ids == reference["prompt_token_ids"]


def test_chat(client):
    answer = chat(client, max_completion_tokens=12)
    [choice] = answer.choices
    assert "Paris" in choice.message.content and choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint.startswith("fp_")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 12


def test_chat_stream_joins_to_the_answer(client):
    options = {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **options)
    chunks = list(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    streamed = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in whole.choices[0].logprobs.content]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_logprobs_of_chat(client):
    content = chat(client, max_tokens=4, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob, "greedy takes the most likely"
        assert bytes(token.bytes).decode() == token.token
        ordered = [top.logprob for top in token.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)


def test_characters_in_parts_have_their_bytes(client):
    """An emoji is several tokens; each says its own bytes, which its text cannot."""
    prompt = "Repeat 🦜🦜"
    answer = complete(client, prompt, max_tokens=0, echo=True, logprobs=0)
    columns = answer.choices[0].logprobs
    assert answer.choices[0].text == prompt
    assert columns.text_offset == sorted(columns.text_offset) and columns.text_offset[-1] <= len(prompt)
    assert any("\ufffd" in token for token in columns.tokens)


def test_n_and_seed(client):
    first = chat(client, n=3, temperature=1.5, seed=7, max_tokens=8)
    again = chat(client, n=3, temperature=1.5, seed=7, max_tokens=8)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage.completion_tokens > 8


def test_n_streams_interleave(client):
    whole = chat(client, n=2, temperature=1.0, seed=3, max_tokens=6)
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in chat(client, n=2, temperature=1.0, seed=3, max_tokens=6, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            assert choice.index not in ends
            ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert len(ends) == 2


def test_stop(client):
    answer = complete(client, "1, 2, 3, 4,", stop=[" 7"], max_tokens=20)
    [choice] = answer.choices
    assert choice.finish_reason == "stop" and choice.stop_reason == " 7"
    assert choice.text.endswith("6,") and "7" not in choice.text
    kept = complete(client, "1, 2, 3, 4,", stop=" 7", max_tokens=20, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == choice.text + " 7"


def test_logit_bias_and_extras(client):
    paris = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    banned = complete(client, max_tokens=1, logit_bias={str(paris): -100}, extra_body={"return_token_ids": True})
    assert banned.choices[0].token_ids != [paris]
    only = complete(client, max_tokens=3, extra_body={"allowed_token_ids": [paris], "ignore_eos": True})
    assert only.choices[0].text == " Paris" * 3
    word = complete(client, max_tokens=4, extra_body={"bad_words": ["Paris"], "min_tokens": 2, "priority": 3})
    assert "Paris" not in word.choices[0].text
    ngram = {
        "logits_processors": {"no_repeat_ngram": {"size": 1}},
        "allowed_token_ids": [paris, 28],
        "ignore_eos": True,
    }
    once = complete(client, "x", max_tokens=2, extra_body=ngram)
    assert once.choices[0].text.count(" Paris") == 1


def test_echo_with_logprobs(client):
    plain = complete(client, max_tokens=2, logprobs=1).choices[0]
    echoed = complete(client, max_tokens=2, logprobs=1, echo=True).choices[0]
    assert echoed.text == FRANCE + plain.text
    columns = echoed.logprobs
    assert columns.tokens == ["The", " capital", " of", " France", " is", *plain.logprobs.tokens]
    assert columns.token_logprobs[0] is None and columns.top_logprobs[0] is None
    assert columns.token_logprobs[5:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    assert [echoed.text[i : i + len(t)] for i, t in zip(columns.text_offset, columns.tokens, strict=True)] == (
        columns.tokens
    )
    scored = complete(client, max_tokens=0, logprobs=1, echo=True)
    assert scored.choices[0].text == FRANCE and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(columns.token_logprobs[1:5], abs=1e-4)
    assert scored.choices[0].finish_reason == "length"


def test_echo_streams_first(client):
    chunks = list(complete(client, ["A b", "C d"], max_tokens=3, echo=True, stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    whole = complete(client, ["A b", "C d"], max_tokens=3, echo=True)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert texts[0].startswith("A b") and texts[1].startswith("C d")


def test_lists_of_prompts(client):
    ids = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    one = complete(client, max_tokens=3).choices[0].text
    assert complete(client, ids, max_tokens=3).choices[0].text == one
    both = complete(client, [FRANCE, "Once upon a"], n=2, max_tokens=3, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[:2]] == [one, one] and both.choices[2].text != one
    mixed = complete(client, [ids, ids], max_tokens=3)
    assert [choice.text for choice in mixed.choices] == [one, one]
    assert mixed.usage.prompt_tokens == 2 * len(ids)


def test_cached_tokens_and_salts(client):
    tale = "A long tale of cached tokens. " * 30

    def cached(**extra):
        usage = complete(client, tale, max_tokens=1, extra_body=extra).usage
        return usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") > 100
    assert cached(cache_salt="other") == 0


def test_prompt_logprobs_and_truncation(client):
    answer = complete(client, max_tokens=1, extra_body={"prompt_logprobs": 1, "truncate_prompt_tokens": 3})
    entries = answer.choices[0].prompt_logprobs
    assert len(entries) == 3 == answer.usage.prompt_tokens
    assert entries[0] is None and all(one["logprob"] <= 0 for one in entries[1].values())


def test_final_message_is_continued(client):
    answer = chat(
        client,
        [*ASK, {"role": "assistant", "content": "The capital of France is Par"}],
        max_tokens=3,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert answer.choices[0].message.content.startswith("is")


def test_parts_and_developer_are_understood(client):
    plain = [{"role": "system", "content": "Be brief."}, *ASK]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    ]
    assert chat(client, plain, max_tokens=6).choices[0].message == chat(client, parts, max_tokens=6).choices[0].message


def test_an_answer_can_be_sent_back(client):
    first = chat(client, max_tokens=6).choices[0].message
    answer = chat(client, [*ASK, first.model_dump(), {"role": "user", "content": "And of Spain?"}], max_tokens=6)
    assert answer.choices[0].message.content


def test_ids(client):
    assert chat(client, max_tokens=1, extra_body={"request_id": "my-own.1"}).id == "chatcmpl-my-own.1"
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=ASK, max_tokens=1, extra_headers={"X-Request-Id": "from-a-proxy"}
    )
    assert raw.headers["x-request-id"] == "from-a-proxy"
    assert raw.parse().id == "chatcmpl-from-a-proxy"


def test_raw_and_streaming_responses(client):
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=FRANCE, max_tokens=2)
    assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].text
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=ASK, max_tokens=3, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "alias/of-it"]
    assert client.models.retrieve("alias/of-it").max_model_len == 2048
    assert chat(client, max_tokens=1).model == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_errors_have_their_classes(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert caught.value.code == "model_not_found" and "'smollm2'" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "word " * 100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, stream=True, max_tokens=0)
    assert caught.value.param == "max_tokens"


async def test_async_client_at_once(async_client):
    async def stream(i):
        text = ""
        async for chunk in await async_client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Count to {i}"}], max_tokens=8, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        return text

    answers = await asyncio.gather(
        *(stream(i) for i in range(4)),
        async_client.completions.create(model=MODEL, prompt=FRANCE, max_tokens=4, temperature=0),
    )
    assert all(answers[:4]) and "Paris" in answers[4].choices[0].text
