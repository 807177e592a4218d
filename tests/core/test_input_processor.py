"""What users hand in becomes engine requests, or a clear refusal."""

import pytest
from pydantic import BaseModel, Field

from interlace import SamplingParams
from interlace.clock import VirtualClock
from interlace.engine.input_processor import InputProcessor, RequestOptions
from interlace.errors import InvalidRequestError
from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.spec import Component
from interlace.testing.front import byte_tokenizer, front_spec

TOKENIZER = byte_tokenizer()


class Sharpen(LogitsProcessor):
    """A logits processor with one argument."""

    class Args(BaseModel):
        power: float = Field(2.0, gt=0)

    def add(self, slot, args, prompt_token_ids):
        pass

    def remove(self, slot):
        pass

    def apply(self, logits, rows):
        pass


def processor(**spec) -> InputProcessor:
    return InputProcessor(front_spec(TOKENIZER.vocab_size, **spec), TOKENIZER, VirtualClock(10.0))


def prepare(prompt, params=None, *, spec=None, **options):
    return processor(**(spec or {})).prepare(prompt, params, request_id="r", options=RequestOptions(**options))


def refusal(prompt, params=None, *, spec=None, **options) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        prepare(prompt, params, spec=spec, **options)
    return str(caught.value)


def test_every_form_of_prompt():
    ids = TOKENIZER.encode("hi")
    assert prepare("hi").prompt == "hi"
    assert prepare("hi").prompt_token_ids == prepare({"prompt": "hi"}).prompt_token_ids == ids
    assert prepare(ids).prompt_token_ids == prepare({"prompt_token_ids": ids}).prompt_token_ids == ids
    assert prepare(ids).prompt is None
    messages = [{"role": "user", "content": "hi"}]
    assert prepare(messages).prompt == prepare({"messages": messages}).prompt == "<user>hi\n<bot>"
    assert TOKENIZER.decode(prepare(messages).prompt_token_ids) == "<user>hi\n<bot>"


def test_chat_options_reach_the_template():
    prepared = processor().prepare(
        [{"role": "user", "content": "hi"}], request_id="r", chat_options={"add_generation_prompt": False}
    )
    assert prepared.prompt == "<user>hi\n"


def test_the_engine_request_carries_everything():
    [request] = prepare(
        "hi",
        SamplingParams(max_tokens=5, seed=3),
        priority=2,
        timeout=4.0,
        cache_salt="s",
        labels={"tenant": "a"},
    ).samples
    assert (request.id, request.priority, request.deadline, request.cache_salt) == ("r", 2, 14.0, "s")
    assert (request.arrival_time, request.seed, request.eos_token_ids) == (10.0, 3, (256,))
    assert (request.labels, request.group, request.sample_index) == ({"tenant": "a"}, None, 0)


def test_n_samples_are_siblings_that_share_everything_but_their_index():
    samples = prepare("hi", SamplingParams(n=3, prompt_logprobs=1)).samples
    assert [s.id for s in samples] == ["r-0", "r-1", "r-2"]
    assert [s.sample_index for s in samples] == [0, 1, 2]
    assert {s.group for s in samples} == {"r"}
    assert len({s.seed for s in samples}) == 1
    # Prompt log probabilities need the whole prompt computed, so only one sibling is asked for them.
    assert [s.params.prompt_logprobs for s in samples] == [1, None, None]
    assert [s.params.skip_reading_prefix_cache for s in samples] == [True, False, False]


def test_seeds():
    def seeds(make, params, count=3):
        return [make.prepare("hi", params, request_id=str(i)).samples[0].seed for i in range(count)]

    assert seeds(processor(), SamplingParams(seed=7)) == [7, 7, 7]
    derived = seeds(processor(seed=1), None)
    assert derived == seeds(processor(seed=1), None) and len(set(derived)) == 3
    assert derived != seeds(processor(seed=2), None)
    drawn = seeds(processor(seed=None), None)
    assert len(set(drawn)) == 3 and drawn != seeds(processor(seed=None), None)
    assert all(0 <= seed < 2**63 for seed in derived + drawn)


def test_max_tokens_is_bounded_by_the_room_left():
    prompt = [1] * 100
    assert prepare(prompt, SamplingParams(max_tokens=None)).params.max_tokens == 28
    assert prepare(prompt, SamplingParams(max_tokens=500)).params.max_tokens == 28
    assert prepare(prompt, SamplingParams(max_tokens=5)).params.max_tokens == 5
    assert prepare([1] * 127, SamplingParams(max_tokens=None)).params.max_tokens == 1


def test_bad_words_become_token_sequences_with_and_without_a_space():
    params = prepare("hi", SamplingParams(bad_words=["no", " yes"], bad_words_token_ids=((5,),))).params
    expected = [(5,), *(tuple(TOKENIZER.encode(text)) for text in ("no", " no", "yes", " yes"))]
    assert list(params.bad_words_token_ids) == expected


@pytest.mark.parametrize("prompt", ["", [], {"prompt": ""}, {"prompt_token_ids": []}, {"messages": []}])
def test_an_empty_prompt_is_refused(prompt):
    assert "the prompt is empty" in refusal(prompt)


def test_a_prompt_too_long_says_length_limit_and_key():
    text = refusal("x" * 200)
    assert "200 tokens" in text and "127 are allowed" in text and "max_model_len = 128" in text
    assert "128 tokens" in refusal([1] * 128)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 257], "prompt_token_ids[1] = 257 is outside the vocabulary: ids go from 0 to 256"),
        ([-1], "prompt_token_ids[0] = -1 is outside"),
        ([1, 2.5], "prompt_token_ids[1] = 2.5 is not a token id"),
        ([True], "prompt_token_ids[0] = True is not a token id"),
        (["a"], "prompt_token_ids[0] = 'a' is not a token id"),
        (5, "a prompt is a text, a list of token ids or a list of chat messages, not int"),
        (None, "not NoneType"),
        (b"hi", "not bytes"),
        ({"promt": "hi"}, "unknown prompt key 'promt'. Did you mean 'prompt'?"),
        ({}, "exactly one of prompt, prompt_token_ids, messages; given: none"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one of"),
        ({"prompt": [1]}, "prompt must be a text, not list"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids must be a list of token ids"),
        ({"messages": [1]}, "messages must be a list of chat messages"),
        ([{"content": "hi"}], "role"),
        ({"prompt": "hi", "cache_salt": ""}, "cache_salt = '' is not allowed"),
        ("\ud800", "valid Unicode"),
    ],
)
def test_malformed_prompts(prompt, expected):
    assert expected in refusal(prompt)


def test_no_chat_template():
    tokenizer = byte_tokenizer(chat_template=None)
    without = InputProcessor(front_spec(tokenizer.vocab_size), tokenizer, VirtualClock())
    with pytest.raises(InvalidRequestError, match="no chat template"):
        without.prepare([{"role": "user", "content": "hi"}], request_id="r")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(stop_token_ids=[256, 257]), "stop_token_ids[1] = 257 is outside the vocabulary"),
        (SamplingParams(allowed_token_ids=[300]), "allowed_token_ids[0] = 300 is outside"),
        (SamplingParams(logit_bias={400: 1.0}), "logit_bias[0] = 400 is outside"),
        (SamplingParams(bad_words_token_ids=((1, 999),)), "bad_words_token_ids[1] = 999 is outside"),
        (SamplingParams(min_tokens=127, max_tokens=200), "min_tokens = 127 cannot be reached"),
        ({"temperature": 1}, "params must be SamplingParams, not dict"),
    ],
)
def test_parameters_that_do_not_fit_the_model(params, expected):
    assert expected in refusal("hi", params)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"priority": 1.5}, "priority = 1.5 is not an integer"),
        ({"timeout": 0}, "timeout = 0 is not allowed"),
        ({"timeout": "1"}, "timeout = '1' is not allowed"),
        ({"cache_salt": 3}, "cache_salt = 3 is not allowed"),
        ({"labels": {"a": 1}}, "labels must be at most 32 pairs of texts"),
    ],
)
def test_options_that_are_wrong(options, expected):
    assert expected in refusal("hi", **options)


def test_logits_processors():
    sharpen = Component(kind="logits_processors", name="sharpen", target=f"{__name__}:Sharpen")
    on = processor(logits_processors=(sharpen,))
    on._load = lambda component: Sharpen

    def ask(make, arguments):
        return make.prepare("hi", SamplingParams(logits_processors=arguments), request_id="r")

    assert ask(on, {"sharpen": {"power": 3}}).params.logits_processors == {"sharpen": {"power": 3}}
    with pytest.raises(InvalidRequestError, match=r'not enabled.*Enable it with logits_processors.use = \["sharpen"\]'):
        ask(processor(), {"sharpen": {}})
    with pytest.raises(InvalidRequestError, match="Did you mean 'sharpen'"):
        ask(on, {"sharpn": {}})
    with pytest.raises(InvalidRequestError, match=r"logits_processors\.sharpen\.power: .*greater than 0"):
        ask(on, {"sharpen": {"power": -1}})


def test_errors_name_the_prompt():
    with pytest.raises(InvalidRequestError, match=r"^prompt 3: the prompt is empty"):
        processor().prepare("", request_id="r", index=3)
