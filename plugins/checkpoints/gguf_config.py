"""From GGUF metadata to a Hugging Face style configuration, and from GGUF tensor names to Hugging Face ones."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec

from interlace.errors import CheckpointError, did_you_mean
from interlace.plugins.checkpoints.gguf_reader import GgufFile, TensorInfo


class Family(msgspec.Struct, frozen=True):
    """What sets one GGUF architecture apart."""

    architecture: str
    """Hugging Face architecture string."""
    permuted: bool = False
    """Whether the converter reordered the rows of the query and key projections for llama.cpp's kind of rope."""
    norm_offset: float = 0.0
    """What the converter added to every norm weight (Gemma computes with weight + 1)."""
    tensors: tuple[tuple[str, str], ...] = ()
    """Names of layer tensors that differ from, or come on top of, the common ones."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", permuted=True),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        tensors=(
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ),
    ),
}
"""By `general.architecture`. Mistral files declare themselves as llama, and compute the same."""

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
IGNORED_TENSORS = ("rope_freqs.weight",)
"""Read into the configuration, not a weight."""

_GEMMA3_PERIOD = 6
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA3_27B_LAYERS = 62


def family_of(file: GgufFile) -> Family:
    """The family of a file. Raises `CheckpointError` for an architecture that is not known."""
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{file.path}: general.architecture is {name!r}; known: {', '.join(FAMILIES)}."
            f"{did_you_mean(str(name), FAMILIES)} Use the model's safetensors files instead"
        )
    return FAMILIES[name]


def hf_name(family: Family, name: str) -> str | None:
    """Hugging Face name of a GGUF tensor, or None if the family has no such tensor."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")  # blk.7.attn_q.weight
    layer_names = {**_LAYER_NAMES, **dict(family.tensors)}
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal() or parts[2] not in layer_names:
        return None
    return f"model.layers.{parts[1]}.{layer_names[parts[2]]}.{parts[3]}"


class _Metadata:
    """Typed access to `<architecture>.*` keys."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.prefix = file.metadata["general.architecture"]

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, or `default`; an error if it is missing without default, or not a number."""
        full = f"{self.prefix}.{key}"
        value = self.file.metadata.get(full, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some converters write one number per layer
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "is missing" if value is None else f"is {value!r}, a number is expected"
            raise CheckpointError(f"{self.file.path}: the metadata key {full} {found}")
        return _shortest(value) if isinstance(value, float) else value

    def optional(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{key}")


def _shortest(value: float) -> float:
    """1e-05 for the float32 9.999999747378752e-06: what the converter read before it stored single precision."""
    short = float(f"{value:.7g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value


def read_config(file: GgufFile, tensors: dict[str, TensorInfo], eos_token_ids: list[int]) -> dict[str, Any]:
    """A Hugging Face style configuration. `tensors`: of all shards. Checks the numbers against the tensors."""
    family, meta = family_of(file), _Metadata(file)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: no matrix 'token_embd.weight'; the file holds no complete model")
    if meta.optional("expert_count"):
        raise CheckpointError(f"{file.path}: a mixture of experts cannot be read from GGUF; use its safetensors files")
    hidden, num_heads, num_layers = (
        meta.number(key) for key in ("embedding_length", "attention.head_count", "block_count")
    )
    stored_layers = {parts[1] for name in tensors if len(parts := name.split(".")) == 4 and parts[0] == "blk"}
    if hidden != embedding.shape[1] or num_layers != len(stored_layers) or num_heads <= 0:
        raise CheckpointError(
            f"{file.path}: the metadata (embedding_length {hidden}, block_count {num_layers}, head_count {num_heads}) "
            f"does not fit the tensors (width {embedding.shape[1]}, {len(stored_layers)} layers)"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > embedding.shape[0]:
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens in the vocabulary, but {embedding.shape[0]} rows in 'token_embd.weight'"
        )
    head_size = meta.number("attention.key_length", hidden // num_heads)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": meta.prefix,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.number("attention.head_count_kv", num_heads),
        "head_dim": head_size,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.number("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids,
        "dtype": _float_type(tensors),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    rope = _read_rope(file, meta, tensors, head_size)
    if meta.prefix == "gemma3":
        config |= _gemma3(meta, rope, hidden, num_heads, num_layers, head_size)
    else:
        config["rope_parameters"] = rope
    return config


def _gemma3(
    meta: _Metadata, rope: dict[str, Any], hidden: int, num_heads: int, num_layers: int, head_size: int
) -> dict[str, Any]:
    """What Gemma 3 has on top. llama.cpp fixes the layer pattern, the local rope base and the 27B scale in its code."""
    pattern = meta.optional("attention.sliding_window_pattern")
    period = pattern if isinstance(pattern, int) and pattern > 0 else _GEMMA3_PERIOD
    sliding = [(index + 1) % period != 0 for index in range(num_layers)]
    if isinstance(pattern, list) and len(pattern) == num_layers:
        sliding = [bool(flag) for flag in pattern]
    local_theta = meta.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // num_heads if num_layers == _GEMMA3_27B_LAYERS else head_size,
        "sliding_window": meta.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in sliding],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _read_rope(file: GgufFile, meta: _Metadata, tensors: dict[str, TensorInfo], head_size: int) -> dict[str, Any]:
    """Rope parameters in Hugging Face terms."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base", 10000.0)}
    if meta.number("rope.dimension_count", head_size) != head_size:
        raise CheckpointError(f"{file.path}: rope over a part of the head is not supported ({meta.prefix})")
    if "rope_freqs.weight" in tensors:
        return rope | _llama3_scaling(file, tensors["rope_freqs.weight"], rope["rope_theta"], head_size)
    kind = meta.optional("rope.scaling.type") or "none"
    factor = meta.number("rope.scaling.factor", 1.0)
    original = meta.number("rope.scaling.original_context_length", meta.number("context_length"))
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        # llama.cpp multiplies the usual factor of yarn by its own, Hugging Face's key replaces it.
        extra = meta.number("rope.scaling.attn_factor", 1.0)
        attention = {} if extra == 1.0 else {"attention_factor": extra * (0.1 * math.log(max(factor, 1.0)) + 1.0)}
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | attention
    raise CheckpointError(
        f"{file.path}: {meta.prefix}.rope.scaling.type is {kind!r}; none, linear and yarn can be read from GGUF"
    )


def _llama3_scaling(file: GgufFile, info: TensorInfo, theta: float, head_size: int) -> dict[str, Any]:
    """Llama 3.1 and later store the divisors of the frequencies instead of the parameters they came from.

    The parameters are recovered (all published models share all but the factor) and checked against the divisors."""
    import numpy as np

    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if info.type_name != "F32" or info.shape != (head_size // 2,):
        raise CheckpointError(f"{file.path}: 'rope_freqs.weight' must be {head_size // 2} F32 values")
    stored = file.raw(info).view("<f4").reshape(-1).astype(np.float64)
    factor = float(f"{stored.max():.6g}")  # computed in single precision
    with np.errstate(all="ignore"):
        wavelengths = 2 * np.pi * float(theta) ** (np.arange(0, head_size, 2) / head_size)
        turns = known["original_max_position_embeddings"] / wavelengths
        smooth = ((turns - 1.0) / (4.0 - 1.0)).clip(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        fits = bool(np.allclose(stored, expected, rtol=1e-3))
    if not fits:
        raise CheckpointError(
            f"{file.path}: the rope divisors in 'rope_freqs.weight' are not those of Llama 3 scaling; "
            "use the model's safetensors files instead"
        )
    return {"rope_type": "llama3", "factor": factor, **known}


def _float_type(tensors: dict[str, TensorInfo]) -> str:
    """The torch dtype the weights are worth: that of the largest matrix kept as floats, else float32."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    matrices = [info for info in tensors.values() if len(info.shape) > 1]
    if any(info.type_name not in names for info in matrices):
        return "float32"
    return names[max(matrices, key=lambda info: info.nbytes).type_name]
