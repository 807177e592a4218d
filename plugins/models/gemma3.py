"""Gemma 3, text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interlace.errors import CheckpointError
from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.model import BuildContext, ForwardContext
from interlace.layers.attention import Attention, attention_specs
from interlace.layers.decoder import CausalLM, DecoderLayer
from interlace.layers.mlp import GatedMLP
from interlace.layers.norm import RMSNorm
from interlace.layers.rotary import RotaryEmbedding
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig

_LOCAL_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}


class Gemma3Layer(DecoderLayer):
    """A norm before and after both attention and feed-forward; all norms store weight - 1."""

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        config: ModelConfig,
        spec: AttentionSpec,
        layer: int,
        rotary: RotaryEmbedding,
    ) -> None:
        bias = bool(config.raw.get("attention_bias"))
        self._attention = Attention(
            build,
            weights.at("self_attn"),
            config,
            spec,
            layer,
            rotary,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            unit_offset=True,
        )
        raw = config.raw
        activation = raw.get("hidden_activation") or raw.get("hidden_act") or "gelu_pytorch_tanh"
        self._mlp = GatedMLP(build, weights.at("mlp"), config.hidden_size, config.intermediate_size, activation)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(build, weights.at(name), config.hidden_size, config.norm_eps, unit_offset=True)

        self._before_attention = norm("input_layernorm")
        self._after_attention = norm("post_attention_layernorm")
        self._before_mlp = norm("pre_feedforward_layernorm")
        self._after_mlp = norm("post_feedforward_layernorm")

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            hidden, residual = self._before_attention(hidden), hidden
        else:
            hidden, residual = self._before_attention.add(hidden, residual)
        hidden = self._after_attention(self._attention(hidden, positions, ctx))
        hidden, residual = self._before_mlp.add(hidden, residual)
        return self._after_mlp(self._mlp(hidden)), residual


class Gemma3ForCausalLM(CausalLM):
    """Scaled embeddings; five sliding-window layers for each full one, with a rotary table of their own."""

    norm_unit_offset = True

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        if config.raw.get("use_bidirectional_attention"):
            raise CheckpointError("use_bidirectional_attention = true: this is an encoder, which cannot generate text")
        super().__init__(config, build)
        # transformers rounds the factor to the type of the weights; so do we.
        self._scale = build.kernels.scale
        self._embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=build.dtype))
        self._logit_softcap = float(config.raw.get("final_logit_softcapping") or 0.0)

    @classmethod
    def attention_specs(cls, config: ModelConfig, tensor_parallel: int = 1, rank: int = 0) -> list[AttentionSpec]:
        raw = config.raw
        scale = float(raw.get("query_pre_attn_scalar") or config.head_size) ** -0.5
        softcap = float(raw.get("attn_logit_softcapping") or 0.0)
        return attention_specs(config, tensor_parallel, rank, scale=scale, softcap=softcap)

    def build_layers(
        self, build: BuildContext, weights: WeightTable, specs: Mapping[int, AttentionSpec]
    ) -> list[DecoderLayer]:
        config = self.config
        size, length = config.head_size, config.max_position_embeddings
        wide = RotaryEmbedding(build, config.rope, size, length)
        local = RotaryEmbedding(build, config.local_rope or _LOCAL_ROPE, size, length)
        return [
            Gemma3Layer(build, weights.at(str(layer)), config, spec, layer, local if spec.window else wide)
            for layer, spec in specs.items()
        ]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._scale(super().embed(token_ids), self._embedding_scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        return self._logit_softcap * torch.tanh(logits / self._logit_softcap) if self._logit_softcap else logits
