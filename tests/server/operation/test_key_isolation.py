"""`server.isolate_keys`: what one API key has in the prefix cache is no use to another, nor told to it."""

import contextlib

import httpx
import pytest

KEYS = ["the-key-of-alice", "the-key-of-bob"]
PROMPT = [7, 8, 9] * 40  # three full blocks of 32, and a rest


@pytest.fixture
def cached(serving, tiny_model):
    """`with cached(isolate) as ask`: `ask(key, **body)` says how many tokens of `PROMPT` were cached."""

    @contextlib.contextmanager
    def begin(isolate):
        tiny = {"model": str(tiny_model), "checkpoint": {"use": "dummy"}, "cache": {"memory": "8MiB"}}
        with (
            serving(**tiny, server={"api_keys": KEYS, "isolate_keys": isolate}) as running,
            httpx.Client(base_url=running.url, timeout=60) as client,
        ):

            def ask(key, **body):
                answer = client.post(
                    "/v1/completions",
                    json={"prompt": PROMPT, "max_tokens": 1, **body},
                    headers={"Authorization": f"Bearer {key}"},
                )
                assert answer.status_code == 200, answer.text
                return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

            yield ask

    return begin


def test_keys_share_nothing(cached):
    alice, bob = KEYS
    with cached(True) as ask:
        assert [ask(alice), ask(alice)] == [0, 96]
        assert [ask(bob), ask(bob)] == [0, 96]
        assert [ask(alice, cache_salt="a"), ask(bob, cache_salt="a"), ask(alice, cache_salt="a")] == [0, 0, 96]


def test_keys_share_prefixes_unless_told_otherwise(cached):
    alice, bob = KEYS
    with cached(False) as ask:
        assert [ask(alice), ask(bob)] == [0, 96]
        assert [ask(alice, cache_salt="a"), ask(bob, cache_salt="a")] == [0, 96]
