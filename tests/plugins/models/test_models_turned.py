"""Models over an attention backend that norms and turns heads itself: the same results as with separate steps."""

from __future__ import annotations

from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.testing.model_suite import ModelConformance
from interlace.testing.reference import ReferenceAttention

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class TurningAttention(ReferenceAttention):
    """The reference, with the reference's norms and rotary embedding before it."""

    turns_heads = True

    def forward_turned(self, query, key, value, positions, cache, metadata, turn):
        kernels = Kernels(Kernels.Options(), KernelSpec(self.dtype, self.device))
        if turn.norms is not None:
            eps, offset = turn.norms.eps, turn.norms.unit_offset
            query = kernels.rms_norm(query, turn.norms.query, eps, offset)
            key = kernels.rms_norm(key, turn.norms.key, eps, offset)
        return self.forward(*kernels.rope(query, key, positions, turn.cos_sin), value, cache, metadata)


class Turned(ModelConformance):
    attention = TurningAttention
    seeds = range(1)


class TestLlama(Turned):
    model = "LlamaForCausalLM"

    def transformers_config(self):
        return LlamaConfig(**TINY)


class TestQwen3(Turned):
    """Norms of heads."""

    model = "Qwen3ForCausalLM"

    def transformers_config(self):
        return Qwen3Config(**TINY)


class TestGemma3(Turned):
    """Norms that are stored less 1, and two rotary tables."""

    model = "Gemma3ForCausalLM"

    def transformers_config(self):
        return Gemma3TextConfig(**TINY, sliding_window=6)
