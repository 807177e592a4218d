"""GGUF metadata becomes the configuration Hugging Face would have."""

from __future__ import annotations

import numpy as np
import pytest

from interlace.errors import CheckpointError
from interlace.plugins.checkpoints.gguf import GgufCheckpoint


def config_of(path):
    return GgufCheckpoint(GgufCheckpoint.Options(), path).config()


def test_smollm2(smollm2_path):
    config = config_of(smollm2_path)
    assert (config.architecture, config.num_layers, config.hidden_size) == ("LlamaForCausalLM", 30, 576)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (9, 3, 64)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (1536, 49152, 8192)
    assert config.norm_eps == 1e-5 and config.tie_word_embeddings
    assert config.rope == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


@pytest.mark.slow
def test_gemma3(gemma3_path):
    config = config_of(gemma3_path)
    assert (config.architecture, config.num_layers, config.hidden_size) == ("Gemma3ForCausalLM", 18, 640)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (4, 1, 256)
    assert config.norm_eps == 1e-6 and config.tie_word_embeddings and config.sliding_window == 512
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope["rope_theta"] == 1e6 and config.local_rope["rope_theta"] == 1e4
    assert config.raw["query_pre_attn_scalar"] == 256


def test_linear_and_yarn_scaling(tiny_gguf):
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert config_of(tiny_gguf(metadata=scaled)).rope == {
        "rope_type": "linear",
        "rope_theta": 50000.0,
        "factor": 4.0,
    }
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    rope = config_of(tiny_gguf(metadata=yarn)).rope
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2.0, 64)
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type is 'longrope'"):
        config_of(tiny_gguf(metadata={"llama.rope.scaling.type": "longrope"}))


def test_gemma3_scales_only_the_global_rope(tiny_gguf):
    scaled = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = config_of(tiny_gguf(arch="gemma3", metadata=scaled))
    assert config.rope["factor"] == 8.0 and config.local_rope == {"rope_type": "default", "rope_theta": 10000.0}


def llama3_divisors(theta, head_size, factor):
    """From transformers' own rope: default frequencies over scaled ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=head_size, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (theta ** -(np.arange(0, head_size, 2) / head_size) / scaled.numpy()).astype(np.float32), rope


def test_llama3_scaling_is_recovered(tiny_gguf, tiny_weights):
    theta, hidden = 500000.0, 512
    divisors, rope = llama3_divisors(theta, hidden // 4, 32.0)
    weights = tiny_weights("llama", hidden=hidden)
    path = tiny_gguf(
        weights=weights | {"rope_freqs.weight": divisors},
        hidden=hidden,
        metadata={"llama.rope.freq_base": theta},
    )
    assert config_of(path).rope == rope
    assert "rope_freqs.weight" not in dict(GgufCheckpoint(GgufCheckpoint.Options(), path).weights())
    odd = divisors.copy()
    odd[3] *= 2
    with pytest.raises(CheckpointError, match="not those of Llama 3"):
        config_of(tiny_gguf(weights=weights | {"rope_freqs.weight": odd}, hidden=hidden))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": 2**31}, "block_count 2147483648.*2 layers"),
        ({"llama.embedding_length": 63}, "embedding_length 63.*width 64"),
        ({"llama.attention.head_count": 0}, "head_count 0"),
        ({"llama.attention.head_count_kv": "two"}, "head_count_kv is 'two', a number is expected"),
        ({"llama.feed_forward_length": None}, r"llama\.feed_forward_length is missing"),
        ({"llama.context_length": 0}, "max_position_embeddings is 0"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"tokenizer.ggml.tokens": ["x"] * 263, "tokenizer.ggml.token_type": None}, "263 tokens.*262 rows"),
        ({"general.architecture": None}, None),
    ],
)
def test_wrong_numbers_are_named(tiny_gguf, metadata, message):
    if message is None:
        path = tiny_gguf(arch="lama", metadata=metadata)
        message = r"general\.architecture is 'lama'.*Did you mean 'llama'"
    else:
        path = tiny_gguf(metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as raised:
        config_of(path)
    assert str(path) in str(raised.value)


def test_a_file_without_embedding_is_no_model(tiny_gguf, tiny_weights):
    weights = tiny_weights("llama")
    del weights["token_embd.weight"]
    with pytest.raises(CheckpointError, match=r"token_embd\.weight"):
        config_of(tiny_gguf(weights=weights))
