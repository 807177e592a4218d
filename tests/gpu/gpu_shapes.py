"""The models and layers that the jobs work with: shapes of real models, weights at random."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.checkpoints.dummy import DummyCheckpoint

ATTENTION_SHAPES = {
    "Llama 8B (32/8 x 128)": AttentionSpec(32, 8, 128),
    "Llama 1B (32/8 x 64)": AttentionSpec(32, 8, 64),
    "Qwen3 0.6B (16/8 x 128)": AttentionSpec(16, 8, 128),
    "Gemma 3 1B (4/1 x 256)": AttentionSpec(4, 1, 256),
    "Gemma 3 1B, window 512": AttentionSpec(4, 1, 256, kind="window", window=512),
    "soft cap 50 (16/8 x 256)": AttentionSpec(16, 8, 256, softcap=50.0),
    "SmolLM2 (9/3 x 64)": AttentionSpec(9, 3, 64),
}

_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _ROPE,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA_8B: dict[str, Any] = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
LARGE_MODELS = {"1B": LLAMA_1B, "8B": LLAMA_8B}

_SMALL: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_OWN: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 64},
}
SMALL_MODELS = tuple(_OWN)


def small_config(architecture: str, tiny: bool = False) -> dict[str, Any]:
    """A config.json of that architecture; `tiny` for the interpreter."""
    common = {"architectures": [architecture], "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2}
    return {**common, **(_TINY if tiny else _SMALL), "tie_word_embeddings": True, **_OWN[architecture]}


def write_config(config: dict[str, Any], folder: str = "") -> Path:
    """A model directory that holds this config.json and nothing else."""
    path = Path(folder or tempfile.mkdtemp(prefix="interlace-gpu-model-"))
    (path / "config.json").write_text(json.dumps(config))
    return path


def open_dummy(config: dict[str, Any], folder: str = "") -> DummyCheckpoint:
    """Random weights for `config`, the same every time."""
    return DummyCheckpoint(DummyCheckpoint.Options(), write_config(config, folder))
