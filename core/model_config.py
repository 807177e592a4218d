"""`ModelConfig`: the numbers of a model, under one set of names, whatever checkpoint format they came from."""

from __future__ import annotations

from typing import Any

import msgspec
from interlace.errors import CheckpointError


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine and the model classes read. `raw` keeps the Hugging Face style config for the rest."""

    architecture: str
    """Hugging Face architecture string, e.g. `LlamaForCausalLM`: the name of the model plugin."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    rope: dict[str, Any] = {}
    """Rope parameters in Hugging Face names (`rope_type`, `rope_theta`, `factor`, …)."""
    local_rope: dict[str, Any] = {}
    """Rope parameters of sliding-window layers where they differ (Gemma 3)."""
    sliding_window: int = 0
    """0: none."""
    layer_types: tuple[str, ...] = ()
    """Per layer `full_attention` or `sliding_attention`; empty: all full."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    """Type of the weights as shipped (a torch dtype name)."""
    raw: dict[str, Any] = {}

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str) -> ModelConfig:
        """Read a Hugging Face style config. `where` names the file in errors.

        Raises `CheckpointError` naming the missing or malformed key."""
        try:
            return cls(**_read(raw))
        except KeyError as error:
            raise CheckpointError(f"{where}: the model configuration lacks {error}") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: the model configuration is malformed: {error}") from error


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    architectures = raw.get("architectures") or []
    if not architectures:
        raise KeyError("architectures")
    num_heads = int(raw["num_attention_heads"])
    rope, local_rope = _read_rope(raw)
    eos = raw.get("eos_token_id")
    return {
        "architecture": str(architectures[0]),
        "vocab_size": int(raw["vocab_size"]),
        "hidden_size": int(raw["hidden_size"]),
        "intermediate_size": int(raw["intermediate_size"]),
        "num_layers": int(raw["num_hidden_layers"]),
        "num_heads": num_heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or num_heads),
        "head_size": int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": int(raw.get("max_position_embeddings", 2048)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "rope": rope,
        "local_rope": local_rope,
        "sliding_window": int(raw.get("sliding_window") or 0),
        "layer_types": tuple(raw.get("layer_types") or ()),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        "dtype": str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        "raw": raw,
    }


def _read_rope(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(global, local) rope parameters: transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    parameters = raw.get("rope_parameters")
    if parameters and "full_attention" in parameters:
        return dict(parameters["full_attention"]), dict(parameters.get("sliding_attention") or {})
    if parameters:
        return dict(parameters), {}
    rope = dict(raw.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope["rope_theta"] = float(raw.get("rope_theta", 10000.0))
    local_theta = raw.get("rope_local_base_freq")
    return rope, {"rope_type": "default", "rope_theta": float(local_theta)} if local_theta else {}
