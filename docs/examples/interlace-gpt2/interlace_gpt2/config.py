"""What the names in a GPT-2 configuration mean. Read by the front, so torch stays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def standard_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the names that Interlace reads; defaults are those of transformers' `GPT2Config`."""
    return {
        "hidden_size": raw["n_embd"],
        "intermediate_size": raw.get("n_inner") or 4 * raw["n_embd"],
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": raw["n_head"],
        "max_position_embeddings": raw["n_positions"],
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-5),  # that of any norm, in spite of the name
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
    }
