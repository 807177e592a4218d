"""What is on the wire, byte by byte where it matters."""

import json

import httpx
import pytest

ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


def events(response):
    """The data of each event; checks the framing."""
    assert response.content.endswith(b"\n\n")
    found = []
    for block in response.content.decode().removesuffix("\n\n").split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block
        found.append(block.removeprefix("data: "))
    return found


def test_chat_stream(http):
    response = http.post("/v1/chat/completions", json=ASK | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *data, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(one) for one in data]
    head = {"object": "chat.completion.chunk", "model": "smollm2"}
    for chunk in chunks:
        assert chunk.items() >= head.items()
        assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    first, *contents, last, usage = chunks
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    for chunk in contents:
        [choice] = chunk["choices"]
        assert list(choice["delta"]) == ["content"] and choice["finish_reason"] is None
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert usage["usage"]["prompt_tokens_details"].keys() == {"cached_tokens"}


def test_stream_without_usage_has_none(http):
    *data, _ = events(http.post("/v1/chat/completions", json=ASK | {"stream": True}))
    assert all("usage" not in json.loads(one) for one in data)
    assert json.loads(data[-1])["choices"][0]["finish_reason"] == "length"


def test_usage_all_along(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *data, _ = events(http.post("/v1/chat/completions", json=ASK | {"stream": True, "stream_options": options}))
    counts = [json.loads(one)["usage"]["completion_tokens"] for one in data]
    assert counts == sorted(counts) and counts[-1] == 3


def test_completion_stream(http):
    body = {"prompt": "Hi", "max_tokens": 3, "temperature": 0, "stream": True, "ignore_eos": True}
    *data, done = events(http.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}}))
    assert done == "[DONE]"
    chunks = [json.loads(one) for one in data]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (
        chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == chunks[-1]["usage"]["prompt_tokens"] + 3
    )
    whole = http.post("/v1/completions", json=body | {"stream": False}).json()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]


def test_whole_chat_answer(http):
    answer = http.post("/v1/chat/completions", json=ASK).json()
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    [choice] = answer["choices"]
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert choice["logprobs"] is None and choice["finish_reason"] == "length"


def test_tokens_there_and_back(http):
    text = "Grüße, 世界 🦜<|im_end|>"
    made = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"]) and made["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": text}
    skipped = http.post("/detokenize", json={"tokens": made["tokens"], "skip_special_tokens": True}).json()
    assert skipped == {"prompt": text.removesuffix("<|im_end|>")}


def test_a_conversation_is_tokenized_as_it_is_answered(http):
    made = http.post("/tokenize", json={"messages": ASK["messages"]}).json()
    answer = http.post("/v1/chat/completions", json=ASK | {"return_token_ids": True}).json()
    assert made["tokens"] == answer["prompt_token_ids"]
    assert len(answer["choices"][0]["token_ids"]) == 3


def test_version_and_description(http):
    import interlace

    assert http.get("/version").json() == {"version": interlace.__version__}
    schema = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models"} <= set(schema["paths"])
    text = json.dumps(schema)
    components = schema["components"]["schemas"]
    assert "ValidationError" not in components
    for name in set(text.split('"#/components/schemas/')[1:]):
        assert name.partition('"')[0] in components


def test_the_description_as_a_page(http):
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for words in (
        "POST /v1/chat/completions",
        "ChatRequest",
        "repetition_penalty",
        "list of ChatMessage",
        "/detokenize",
    ):
        assert words in page.text
    assert "//" not in page.text, "nothing is loaded from elsewhere"


def test_nowhere_and_wrong_method(http):
    missing = http.get("/v1/embeddings")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    assert "GET /v1/embeddings" in missing.json()["error"]["message"]
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
