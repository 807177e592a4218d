"""Checkpoint `dummy`: random weights for a config.json, for benchmarks and tests without a download.

Never found by itself: only `checkpoint.use = "dummy"` selects it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from interlace.errors import CheckpointError
from interlace.interfaces.checkpoint import Checkpoint
from interlace.model_config import ModelConfig, read_json
from interlace.plugins.checkpoints.safetensors import read_directory_config
from interlace.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_BOS, _EOS = "<bos>", "<eos>"
_BYTE_VOCABULARY = 256 + 2
_MAX_LAYERS = 10_000  # far beyond any model; what asks for more is a slip


class DummyCheckpoint(Checkpoint):
    """`path` is a directory with a config.json, or such a JSON file. Same configuration and seed, same weights.

    Without tokenizer.json, a byte-level vocabulary of 258 tokens stands in (BOS 256, EOS 257)."""

    class Options(BaseModel):
        """Options of the random weights."""

        model_config = ConfigDict(extra="forbid")

        seed: int = Field(default=0, ge=0, description="Seed of the random weights.")

    @classmethod
    def matches(cls, path: Path) -> bool:
        return False

    def raw_config(self) -> dict[str, Any]:
        raw = read_json(self.path) if self.path.is_file() else read_directory_config(self.path)
        size = raw.get("vocab_size")
        if self._has_tokenizer or not isinstance(size, int) or size < _BYTE_VOCABULARY:
            return raw
        return {**raw, "bos_token_id": _BYTE_VOCABULARY - 2, "eos_token_id": _BYTE_VOCABULARY - 1}

    def tokenizer(self) -> Tokenizer:
        """The directory's own, else a byte tokenizer: BOS and EOS are its last two tokens."""
        if self._has_tokenizer:
            return Tokenizer.from_directory(self.path)
        if (size := self.config().vocab_size) < _BYTE_VOCABULARY:
            raise CheckpointError(
                f"{self.path}: vocab_size is {size}; the byte tokenizer that stands in for a missing tokenizer.json "
                f"needs {_BYTE_VOCABULARY}"
            )
        return byte_tokenizer(self.path.name)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        config = self.config()
        dtype = getattr(torch, config.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointError(f"{self.path}: '{config.dtype}' is no type weights can have; use float32 or bfloat16")
        for name, shape in self._shapes.items():
            try:
                tensor = _random_tensor(shape, name, config.architecture, self.options.seed).to(dtype)
            except (RuntimeError, MemoryError) as error:
                raise CheckpointError(
                    f"{self.path}: tensor '{name}' of shape {list(shape)} cannot be made ({error}); use a smaller model"
                ) from error
            yield name, tensor

    def num_weights(self) -> int:
        return len(self._shapes)

    @property
    def _has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return weight_shapes(self.config(), str(self.path))


def _random_tensor(shape: tuple[int, ...], name: str, architecture: str, seed: int) -> torch.Tensor:
    import torch

    # torch's CPU generator takes 32 bits of a seed
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if len(shape) > 1:  # keeps the size of activations: the logits stay finite at any depth
        values: torch.Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return values
    if name.endswith("norm.weight") and not architecture.startswith("Gemma"):
        return torch.ones(shape)
    return torch.zeros(shape)  # biases; and Gemma's norms, which count from one


def weight_shapes(config: ModelConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Hugging Face weight names and shapes of the dense decoder families (Llama, Mistral, Qwen 2 and 3, Gemma 3).

    `where` names the file in errors."""
    known = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")
    family = config.architecture.removesuffix("ForCausalLM")
    if family not in known:
        raise CheckpointError(
            f"{where}: random weights cannot be made for {config.architecture}; "
            f"known: {', '.join(f'{name}ForCausalLM' for name in known)}"
        )
    if config.num_layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{where}: random weights cannot be made for num_hidden_layers = {config.num_layers}; at most {_MAX_LAYERS}"
        )
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_size
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if family == "Qwen2" or config.raw.get("attention_bias"):
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", queries), ("k", keys), ("v", keys))}
    if family != "Qwen2" and config.raw.get("attention_bias"):
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.raw.get("mlp_bias"):
        layer |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
    if family in ("Qwen3", "Gemma3"):
        layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if family == "Gemma3":
        layer |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def byte_tokenizer(name: str) -> Tokenizer:
    """One token per UTF-8 byte, then BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate([*alphabet, _BOS, _EOS])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (_BOS, _EOS)])
    return Tokenizer(
        backend,
        name=name,
        bos_token_id=vocabulary[_BOS],
        eos_token_ids=(vocabulary[_EOS],),
        special_tokens={"bos_token": _BOS, "eos_token": _EOS},
    )
