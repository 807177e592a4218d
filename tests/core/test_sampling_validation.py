"""Checks of sampling parameters: values, token ids, and the arguments of logits processors."""

import subprocess
import sys

import pytest
from pydantic import BaseModel, ConfigDict, Field

from interlace.errors import InvalidRequestError
from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.messages import SamplingParams
from interlace.sampling.validation import validate_processor_args, validate_token_ids


class Sized(LogitsProcessor):
    class Args(BaseModel):
        model_config = ConfigDict(extra="forbid")
        size: int = Field(ge=1)

    def add(self, slot, args, prompt_token_ids): ...

    def remove(self, slot): ...

    def apply(self, logits, rows): ...


def test_processor_args_are_parsed():
    params = SamplingParams(logits_processors={"sized": {"size": 3}})
    assert validate_processor_args({"sized": Sized}, params) == {"sized": Sized.Args(size=3)}
    assert validate_processor_args({}, SamplingParams()) == {}


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"sizd": {"size": 3}}, ["'sizd' is not enabled", "enabled: sized", "Did you mean 'sized'?"]),
        ({"sizd": {"size": 3}}, ["logits_processors.use"]),
        ({"sized": {"size": 0}}, ["logits_processors['sized'].size = 0", "greater than or equal to 1"]),
        ({"sized": {"size": 3, "sise": 4}}, ["['sized'].sise = 4", "Allowed: size", "Did you mean 'size'?"]),
        ({"sized": {}}, ["logits_processors['sized'].size", "Field required"]),
    ],
)
def test_processor_args_that_do_not_fit(given, parts):
    with pytest.raises(InvalidRequestError) as error:
        validate_processor_args({"sized": Sized}, SamplingParams(logits_processors=given))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "values", [{"logit_bias": {10: 1.0}}, {"allowed_token_ids": [0, 10]}, {"bad_words_token_ids": [[1, 10]]}]
)
def test_token_ids_outside_the_vocabulary(values):
    params = SamplingParams(**values)
    validate_token_ids(params, 11)
    with pytest.raises(InvalidRequestError, match=f"{next(iter(values))} contains token id 10.*0 to 9"):
        validate_token_ids(params, 10)


def test_stop_tokens_may_lie_outside_the_vocabulary():
    validate_token_ids(SamplingParams(stop_token_ids=[50]), 10)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"n": 0},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"seed": 2**63},
        {"stop": [""]},
        {"stop_token_ids": [-1]},
        {"logit_bias": {3: 101}},
        {"logit_bias": {-3: 1}},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [True]},
        {"bad_words": [""]},
        {"bad_words_token_ids": [[]]},
        {"bad_words_token_ids": [[1, -2]]},
        {"logits_processors": {"x": 3}},
    ],
    ids=str,
)
def test_values_out_of_range_name_the_field(values):
    (field,) = values
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**values)


def test_sequences_become_tuples():
    params = SamplingParams(stop="a", bad_words_token_ids=[[1, 2]], allowed_token_ids=[3], stop_token_ids=None)
    assert (params.stop, params.bad_words_token_ids, params.allowed_token_ids) == (("a",), ((1, 2),), (3,))
    assert params.stop_token_ids == ()


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(InvalidRequestError, match=r"'temprature'.*Did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 1.0})


def test_validation_and_built_in_processors_load_no_torch():
    code = (
        "import sys, interlace.sampling.validation, interlace.plugins.logits_processors as p\n"
        "import interlace.plugins.logits_processors.no_repeat_ngram\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
