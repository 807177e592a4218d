"""Bodies that should not be: each gets an answer that says what is wrong, and the next request is served as ever."""

import httpx
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client
        answer = client.post(
            COMPLETIONS, json={"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        )
        assert "Paris" in answer.json()["choices"][0]["text"], "the server is as it was"


def refused(response, status=400):
    """The error object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(key, error)] = response.json().items()
    assert key == "error" and set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"17",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"seed": 123456789012345678901234567890}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": ' + b"[" * 80 + b"]" * 80 + b"}",
        "{}".encode("utf-16"),
        b"\x00" * 100,
        b'{"prompt": "x"} trailing',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_not_an_object_of_json(http, path, body):
    error = refused(http.post(path, content=body, headers={"content-type": "application/json"}))
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_another_content_type(http, kind):
    refused(http.post(CHAT, content=b'{"messages": []}', headers={"content-type": kind}), 415)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, None),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages.0.contents"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -(2**63)}, "max_tokens"),
        ({"min_tokens": 2**60}, "min_tokens"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias[1]"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "logprobs"),
        ({"stop_token_ids": [2**62]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logits_processors": {"nope": {}}}, "logits_processors"),
        ({"logits_processors": {"no_repeat_ngram": {"size": -1}}}, "logits_processors.no_repeat_ngram.size"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"stream": "yes"}, "stream"),
        ({"request_id": "two words"}, "request_id"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_wrong_values_in_a_chat(http, change, param):
    error = refused(http.post(CHAT, json={"messages": HI, "max_tokens": 2} | change))
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "not empty"),
        ({"prompt": [[]]}, "prompt.0 is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": {"text": "x"}}, "a text, a list of token ids"),
        ({"prompt": [1, "x"]}, "a text, a list of token ids"),
        ({"prompt": [True]}, "a text, a list of token ids"),
        ({"prompt": [-1]}, "outside the vocabulary"),
        ({"prompt": [[1, 2], [10**9]]}, "prompt 1:"),
        ({"prompt": [1] * 5000}, "max_model_len"),
        ({"prompt": "word " * 3000}, "3001 tokens; 2047 are allowed"),
        ({"prompt": "word " * 100_000}, "max_model_len"),
        ({"prompt": "x" * 1_000_000}, "characters"),
        ({"prompt": ["x"] * 5000}, "1024"),
        ({"prompt": ["x"] * 20, "n": 100}, "1024"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 1000}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_completions(http, change, words):
    assert words in refused(http.post(COMPLETIONS, json={"prompt": "x"} | change))["message"]


def test_what_is_missing_is_named(http):
    assert refused(http.post(CHAT, json={}))["message"] == "'messages' is missing"
    assert refused(http.post(COMPLETIONS, json={}))["code"] == "missing_required_parameter"


def test_unknown_models(http):
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        assert refused(http.post(path, json=body | {"model": "gpt-9"}), 404)["code"] == "model_not_found"
    assert refused(http.post(CHAT, json={"model": 5, "messages": HI}))["param"] == "model"


def test_tokens_outside_the_vocabulary(http):
    for token in (-1, 10**6, 2**62):
        assert refused(http.post("/detokenize", json={"tokens": [token]}))["param"] == "tokens.0"


def test_an_id_in_use(http):
    body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "request_id": "taken", "stream": True}
    with http.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())
        assert "in use" in refused(http.post(COMPLETIONS, json=body | {"stream": False}))["message"]


def test_huge_numbers_that_mean_something(http):
    """Of what has no upper limit in its meaning, the greatest integers pass."""
    body = {
        "prompt": "Hi",
        "max_tokens": 2**62,
        "top_k": 2**40,
        "priority": 2**62,
        "stop": ["a", "e", "i", "o", "u"],
        "seed": 2**62,
    }
    assert http.post(COMPLETIONS, json=body | {"truncate_prompt_tokens": 2**62}).status_code == 200
