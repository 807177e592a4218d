"""Random checkpoints: deterministic, finite, complete, and only on request."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from pydantic import ValidationError

from interlace.errors import CheckpointError
from interlace.plugins.checkpoints.dummy import DummyCheckpoint, byte_tokenizer

ARCHITECTURES = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
}


def write_config(path, architecture="LlamaForCausalLM", **changes):
    config = {
        "architectures": [architecture],
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        **changes,
    }
    (path / "config.json").write_text(json.dumps(config))
    return config


def opened(path, **options):
    return DummyCheckpoint(DummyCheckpoint.Options(**options), path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_fill_the_model_of_transformers(tmp_path, architecture, tied):
    raw = write_config(tmp_path, architecture, tie_word_embeddings=tied, pad_token_id=0)
    config = getattr(transformers, ARCHITECTURES[architecture])(**raw)
    model = getattr(transformers, architecture)(config)
    weights = dict(opened(tmp_path).weights())
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    model.tie_weights()
    with torch.no_grad():
        logits = model.eval()(torch.arange(40)[None]).logits
    assert logits.isfinite().all() and 0.01 < logits.std() < 100


def test_biases_that_the_config_asks_for(tmp_path):
    raw = write_config(tmp_path, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    assert set(dict(opened(tmp_path).weights())) == set(model.state_dict()) - {"lm_head.weight"}


def test_same_seed_same_weights(tmp_path):
    write_config(tmp_path, torch_dtype="bfloat16")
    first, again, other = (dict(opened(tmp_path, seed=seed).weights()) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name]) and first[name].dtype == torch.bfloat16
    assert not torch.equal(first[name], first[name.replace("1", "2")])
    assert opened(tmp_path).num_weights() == len(first)


def test_never_chosen_by_accident(tmp_path):
    write_config(tmp_path)
    assert not DummyCheckpoint.matches(tmp_path) and not DummyCheckpoint.matches(tmp_path / "config.json")


def test_a_config_file_is_enough(tmp_path):
    write_config(tmp_path)
    assert opened(tmp_path / "config.json").config().num_layers == 3
    assert opened(tmp_path / "config.json").tokenizer().vocab_size == 258


def test_byte_tokenizer_stands_in(tmp_path):
    write_config(tmp_path)
    checkpoint = opened(tmp_path)
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config()
    assert (
        (tokenizer.bos_token_id, tokenizer.eos_token_ids)
        == (256, (257,))
        == (config.bos_token_id, config.eos_token_ids)
    )
    for text in ("hello  world\n", "é 你 😀", "\x00\x7f"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.decode([257, *tokenizer.encode("x"), 257]) == "x"


def test_a_tokenizer_in_the_directory_is_used(tmp_path):
    write_config(tmp_path)
    byte_tokenizer("x").backend.save(str(tmp_path / "tokenizer.json"))
    checkpoint = opened(tmp_path)
    assert checkpoint.config().eos_token_ids == (2,) == checkpoint.tokenizer().eos_token_ids


def test_errors(tmp_path):
    write_config(tmp_path, vocab_size=257)
    with pytest.raises(CheckpointError, match=r"vocab_size is 257.*needs 258"):
        opened(tmp_path).tokenizer()
    write_config(tmp_path, architecture="MambaForCausalLM")
    with pytest.raises(CheckpointError, match=r"MambaForCausalLM.*known: LlamaForCausalLM"):
        dict(opened(tmp_path).weights())
    with pytest.raises(ValidationError):
        DummyCheckpoint.Options(sed=1)
