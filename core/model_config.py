"""`ModelConfig`: the numbers of a model, under one set of names, whatever checkpoint format they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from interlace.errors import CheckpointError

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "max_position_embeddings",
)


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
            return cls(**_read(raw, read_architecture(raw, where)))
        except KeyError as error:
            raise CheckpointError(f"{where}: the model configuration lacks {error}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{where}: the model configuration is malformed: {error}") from error


def read_architecture(raw: dict[str, Any], where: str) -> str:
    """The architecture a Hugging Face style config names. Raises `CheckpointError` if it names none."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(f"{where}: the model configuration lacks 'architectures'")
    return str(architectures[0])


def _read(raw: dict[str, Any], architecture: str) -> dict[str, Any]:
    num_heads = int(raw["num_attention_heads"])
    rope, local_rope = _read_rope(raw)
    window, layer_types = _read_windows(raw, architecture)
    eos = raw.get("eos_token_id")
    numbers: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": int(raw["vocab_size"]),
        "hidden_size": int(raw["hidden_size"]),
        "intermediate_size": int(raw["intermediate_size"]),
        "num_layers": int(raw["num_hidden_layers"]),
        "num_heads": num_heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or num_heads),
        "head_size": int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": int(raw.get("max_position_embeddings", 2048)),
        # Gemma's configs leave it out when it is true, the others when it is false.
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", architecture.startswith("Gemma"))),
        "rope": rope,
        "local_rope": local_rope,
        "sliding_window": window,
        "layer_types": layer_types,
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        "dtype": str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        "raw": raw,
    }
    for key in _POSITIVE:
        if numbers[key] <= 0:
            raise ValueError(f"{key} is {numbers[key]}, it must be positive")
    return numbers


def _read_windows(raw: dict[str, Any], architecture: str) -> tuple[int, tuple[str, ...]]:
    """(sliding window, type of each layer); (0, ()) where no layer has a window, whatever the config mentions."""
    window = int(raw.get("sliding_window") or 0)
    num_layers = int(raw["num_hidden_layers"])
    # Llama has no window; Qwen's configs mention one that is off unless `use_sliding_window` is set.
    used = raw.get("use_sliding_window", not architecture.startswith(("Llama", "Qwen")))
    if not window or not used:
        return 0, ()
    if raw.get("layer_types"):
        types = tuple(str(kind) for kind in raw["layer_types"])
    else:
        types = tuple(_layer_type(raw, architecture, index) for index in range(num_layers))
    if len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries for {num_layers} layers")
    return (window, types) if "sliding_attention" in types else (0, ())


def _layer_type(raw: dict[str, Any], architecture: str, index: int) -> str:
    """The rule of each family for configs that do not list `layer_types`."""
    sliding = True  # Mistral: every layer
    if architecture.startswith("Gemma3"):
        sliding = (index + 1) % int(raw.get("sliding_window_pattern", 6)) != 0
    elif architecture.startswith("Qwen"):
        sliding = index >= int(raw.get("max_window_layers", 28))
    return "sliding_attention" if sliding else "full_attention"


def _read_rope(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(global, local) rope parameters: transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    parameters = raw.get("rope_parameters")
    if parameters and "full_attention" in parameters:
        return dict(parameters["full_attention"]), dict(parameters.get("sliding_attention") or {})
    if parameters:
        return {"rope_theta": float(raw.get("rope_theta", 10000.0)), **parameters}, {}
    rope = dict(raw.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope["rope_theta"] = float(raw.get("rope_theta", 10000.0))
    # Some families state these at the top; transformers gives that place priority too.
    rope |= {key: raw[key] for key in ("original_max_position_embeddings", "partial_rotary_factor") if raw.get(key)}
    local_theta = raw.get("rope_local_base_freq")
    return rope, {"rope_type": "default", "rope_theta": float(local_theta)} if local_theta else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in one of a model's files. Raises `CheckpointError` naming file, cause and cure."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing; copy or fetch it into the model's directory") from error
    except (OSError, UnicodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); it may be truncated: fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value
