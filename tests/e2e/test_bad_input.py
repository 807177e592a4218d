"""Bad input is a clear error with cause and cure; the engine lives on and other requests are unharmed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interlace import LLM, SamplingParams
from interlace.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    InterlaceError,
    InvalidRequestError,
    ModelNotFoundError,
    PluginNotFoundError,
    PluginOptionsError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=4)
GOOD = "The capital of France is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", max_model_len=256, cache={"memory": "64MiB"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(llm: LLM) -> str:
    return llm.generate(GOOD, GREEDY, progress=False)[0].outputs[0].text


@pytest.fixture(autouse=True)
def the_engine_is_unharmed(llm: LLM, expected: str) -> Iterator[None]:
    """After every test the same prompt still gives the same answer, and no block is lost."""
    yield
    assert llm.generate(GOOD, GREEDY, progress=False)[0].outputs[0].text == expected
    llm.front.control("check_integrity")
    assert llm.front.health().status == "ok"


BAD_PROMPTS: dict[str, tuple[Any, list[str]]] = {
    "empty text": ("", ["prompt 1", "empty"]),
    "no tokens": ([], ["prompt 1", "empty"]),
    "too long": ("word " * 400, ["prompt 1", "256", "max_model_len"]),
    "token out of range": ([5, 49152], ["prompt 1", "49152"]),
    "negative token": ([-1, 5], ["prompt 1", "-1"]),
    "not a prompt": (3.5, ["prompt 1"]),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_names_itself_and_the_limit(llm: LLM, name: str) -> None:
    prompt, words = BAD_PROMPTS[name]
    with pytest.raises(InvalidRequestError) as raised:
        llm.generate([GOOD, prompt], GREEDY, progress=False)
    assert all(word in str(raised.value) for word in words), str(raised.value)


BAD_PARAMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "temperature": ({"temperature": -1}, ["temperature", "-1", "0"]),
    "temperature is text": ({"temperature": "hot"}, ["temperature", "hot"]),
    "temperature is nan": ({"temperature": float("nan")}, ["temperature", "nan"]),
    "top_p": ({"top_p": 1.5}, ["top_p", "1.5", "1"]),
    "top_k": ({"top_k": -2}, ["top_k", "-2"]),
    "max_tokens": ({"max_tokens": 0}, ["max_tokens", "0", "1"]),
    "n": ({"n": 0}, ["n", "0", "1"]),
    "min above max": ({"min_tokens": 9, "max_tokens": 3}, ["min_tokens", "9", "max_tokens", "3"]),
    "logprobs": ({"logprobs": 1000}, ["logprobs", "1000", "20"]),
    "stop without text": ({"stop": "x", "detokenize": False}, ["stop", "detokenize"]),
    "repetition": ({"repetition_penalty": 0}, ["repetition_penalty", "0"]),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_a_bad_sampling_value_names_field_value_and_range(name: str) -> None:
    values, words = BAD_PARAMS[name]
    with pytest.raises(InvalidRequestError) as raised:
        SamplingParams(**values)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_an_unknown_sampling_parameter_names_the_nearest() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 1.0})


def test_values_beyond_the_vocabulary_are_refused(llm: LLM) -> None:
    for values in ({"logit_bias": {10**6: 1.0}}, {"allowed_token_ids": [10**6]}, {"stop_token_ids": [10**6]}):
        with pytest.raises(InvalidRequestError, match="1000000"):
            llm.generate(GOOD, SamplingParams(**values), progress=False)


def test_a_logits_processor_that_is_not_enabled_says_how(llm: LLM) -> None:
    params = SamplingParams(logits_processors={"no_repeat_ngram": {"size": 2}})
    with pytest.raises(InvalidRequestError, match=r"logits_processors\.use"):
        llm.generate(GOOD, params, progress=False)


def test_a_request_that_outgrows_the_cache_fails_alone() -> None:
    """Two requests; one needs more blocks than there are, the other does not notice."""
    with LLM(dtype="float32", max_model_len=512, cache={"memory": "64MiB", "max_blocks": 6, "block_size": 16}) as small:
        long, short = [7] * 70, [9] * 4
        params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), GREEDY]
        failed, fine = small.generate([long, short], params, progress=False)
        assert failed.outputs[0].finish_reason == "error"
        assert failed.error is not None and "cache.memory" in failed.error
        assert fine.outputs[0].finish_reason in ("length", "stop") and fine.error is None
        assert small.front.control("free_blocks") == 5


def test_a_deadline_ends_only_its_request(llm: LLM) -> None:
    timed, free = (
        llm.generate(GOOD, SamplingParams(max_tokens=200, ignore_eos=True), progress=False, timeout=0.05)[0],
        llm.generate(GOOD, GREEDY, progress=False)[0],
    )
    assert timed.outputs[0].finish_reason == "error" and "deadline" in (timed.error or "")
    assert free.error is None


def expect_start_error(error: type[InterlaceError], words: list[str], **settings: Any) -> None:
    with pytest.raises(error) as raised:
        LLM(**settings)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_an_unknown_model_names_what_is_installed() -> None:
    expect_start_error(ModelNotFoundError, ["smollm3", "smollm2"], model="smollm3")


def test_an_unknown_plugin_names_the_nearest() -> None:
    expect_start_error(PluginNotFoundError, ["prioritty", "priority", "fcfs"], scheduler={"use": "prioritty"})


def test_a_wrong_plugin_option_names_the_nearest() -> None:
    options = {"use": "priority", "options": {"priority": {"ageing_s": 3}}}
    expect_start_error(PluginOptionsError, ["ageing_s", "aging_s"], scheduler=options)


def test_an_unknown_setting_names_the_nearest() -> None:
    expect_start_error(ConfigError, ["max_num_seq", "max_num_seqs"], scheduler={"max_num_seq": 3})


def test_impossible_memory_says_needed_available_and_key() -> None:
    expect_start_error(CapacityError, ["cache.memory", "free"], cache={"memory": "900TiB"})
    expect_start_error(CapacityError, ["cache.memory", "needs at least", "available"], cache={"memory": "1KiB"})


def test_more_tokens_than_the_model_allows_are_refused() -> None:
    expect_start_error(ConfigError, ["max_model_len", "8192"], max_model_len=10**6)


def model_folder(folder: Path, **changes: Any) -> Path:
    """A model directory with a config and no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, architectures=["LlamaForCausalLMs"])
    expect_start_error(
        PluginNotFoundError, ["LlamaForCausalLMs", "LlamaForCausalLM"], model=str(folder), checkpoint={"use": "dummy"}
    )


def test_a_truncated_gguf_names_the_file(tmp_path: Path, smollm2_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    with smollm2_path.open("rb") as whole:
        broken.write_bytes(whole.read(4_000_000))
    expect_start_error(CheckpointError, ["broken.gguf"], model=str(broken))


def test_a_file_that_is_no_gguf_names_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "noise.gguf"
    broken.write_bytes(b"this is not a model" * 100)
    expect_start_error(CheckpointError, ["noise.gguf"], model=str(broken))


def test_a_truncated_safetensors_names_the_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = model_folder(tmp_path)
    shutil.copy(write_tokenizer(tmp_path), folder / "tokenizer.json")
    save_file({"model.embed_tokens.weight": torch.zeros(64, 32)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    expect_start_error(CheckpointError, ["model.safetensors"], model=str(folder))


def test_missing_tensors_are_all_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = model_folder(tmp_path)
    shutil.copy(write_tokenizer(tmp_path), folder / "tokenizer.json")
    save_file({"model.embed_tokens.weight": torch.zeros(64, 32)}, folder / "model.safetensors")
    expect_start_error(CheckpointError, ["missing", "q_proj", "layers.{0-1}", "lm_head"], model=str(folder))


def write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    path = folder / "tokenizer-of-test.json"
    Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="0")).save(str(path))
    return path


def test_chat_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    shutil.copy(write_tokenizer(tmp_path), folder / "tokenizer.json")
    with LLM(str(folder), checkpoint={"use": "dummy"}, cache={"memory": "16MiB"}, dtype="float32") as llm:
        with pytest.raises(InvalidRequestError, match="chat_template"):
            llm.chat([{"role": "user", "content": "1 2 3"}], GREEDY)
        assert llm.generate([1, 2, 3], GREEDY, progress=False)[0].error is None
