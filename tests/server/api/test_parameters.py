"""Nothing is ignored in silence: what is unknown or not supported is refused, unless it asks for nothing."""

import pytest

from interlace.errors import InvalidRequestError
from interlace.messages import SamplingParams
from interlace.server.bodies import parse
from interlace.server.errors import ApiError
from interlace.server.requests import ChatRequest, CompletionRequest, GenerationRequest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def refusal(model, body):
    with pytest.raises(ApiError) as caught:
        parse(model, body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("structured_outputs", {"regex": "a+"}),
        ("guided_json", {}),
        ("use_beam_search", True),
        ("best_of", 2),
        ("reasoning_effort", "low"),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("echo", True),
        ("chat_template", "{{ messages }}"),
        ("functions", [{}]),
    ],
)
def test_known_but_not_supported(key, value):
    error = refusal(ChatRequest, CHAT | {key: value})
    assert error.code == "unsupported_parameter" and error.param == key
    assert f"'{key}'" in str(error) and "not supported by this server yet" in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tools", []),
        ("tools", None),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("response_format", {"type": "text"}),
        ("best_of", 1),
        ("store", False),
        ("service_tier", "auto"),
        ("modalities", ["text"]),
        ("guided_json", None),
        ("reasoning_effort", None),
        ("temperature", None),
    ],
)
def test_what_asks_for_nothing_passes(key, value):
    assert parse(ChatRequest, CHAT | {key: value}).sampling() == SamplingParams()


def test_true_is_not_one():
    assert refusal(ChatRequest, CHAT | {"best_of": True}).param == "best_of"
    assert refusal(ChatRequest, CHAT | {"store": 0}).param == "store"


@pytest.mark.parametrize(
    ("key", "meant"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stopp", "stop"), ("logit_biases", "logit_bias")],
)
def test_unknown_names_the_nearest(key, meant):
    error = refusal(CompletionRequest, {"prompt": "x", key: 1})
    assert error.code == "unknown_parameter" and error.param == key and f"Did you mean '{meant}'?" in str(error)


def test_unknown_and_far_from_anything():
    assert str(refusal(CompletionRequest, {"prompt": "x", "zzz": 1})) == "unknown parameter 'zzz'."


def test_long_values_are_cut_short():
    assert len(str(refusal(CompletionRequest, {"prompt": "x", "temperature": "y" * 10_000}))) < 250
    assert len(str(refusal(CompletionRequest, {"prompt": "x", "y" * 10_000: 1}))) < 250


def test_every_sampling_parameter_can_be_asked_for():
    left_out = {"detokenize", "logprobs"}  # a server answers with text; log probabilities are asked for otherwise
    assert set(GenerationRequest.model_fields) >= set(SamplingParams.__struct_fields__) - left_out


def test_parameters_arrive():
    given = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "seed": -3,
        "stop": ["a"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "max_tokens": 7,
        "min_tokens": 1,
        "prompt_logprobs": 2,
        "logit_bias": {"5": 1.5},
        "allowed_token_ids": [5],
        "bad_words": ["b"],
        "bad_words_token_ids": [[1, 2]],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "skip_reading_prefix_cache": True,
        "logits_processors": {"p": {"x": 1}},
    }
    assert set(given) == set(GenerationRequest.model_fields) & set(SamplingParams.__struct_fields__)
    arrived = parse(CompletionRequest, {"prompt": "x", **given}).sampling()
    assert arrived == SamplingParams(**(given | {"logit_bias": {5: 1.5}}))


@pytest.mark.parametrize("key", ["-1", "1.0", "", " 1", "1_0", "٣", "9" * 30])
def test_keys_of_logit_bias_are_token_ids(key):
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        parse(CompletionRequest, {"prompt": "x", "logit_bias": {key: 1}}).sampling()


def test_labels():
    request = parse(ChatRequest, CHAT | {"user": "ada", "metadata": {"class": "batch"}})
    assert request.labels == {"user": "ada", "class": "batch"}


BOUNDED = {
    name: field.json_schema_extra
    for name, field in GenerationRequest.model_fields.items()
    if field.json_schema_extra and name in SamplingParams.__struct_fields__
}


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_described_bounds_are_those_of_the_engine(name):
    bounds = BOUNDED[name]
    integer = name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "prompt_logprobs")
    step = 1 if integer else 1e-7
    for side, sign in (("minimum", -1), ("maximum", 1)):
        if side in bounds:
            SamplingParams(**({"max_tokens": None} | {name: bounds[side]}))
            with pytest.raises(InvalidRequestError, match=name):
                SamplingParams(**{name: bounds[side] + sign * step * max(1, abs(bounds[side]) if not integer else 1)})
    if "exclusiveMinimum" in bounds:
        with pytest.raises(InvalidRequestError, match=name):
            SamplingParams(**{name: bounds["exclusiveMinimum"]})
