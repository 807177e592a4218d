"""The attention layer: projections, optional q/k norm, rotary embedding, paged attention, output projection."""

from __future__ import annotations

import msgspec
import torch

from interlace.interfaces.attention import AttentionSpec, HeadNorms, HeadTurn
from interlace.interfaces.model import BuildContext, ForwardContext
from interlace.layers.linear import QKVLinear, RowParallelLinear
from interlace.layers.norm import RMSNorm
from interlace.layers.parallel import share_heads
from interlace.layers.rotary import RotaryEmbedding
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig


def attention_specs(
    config: ModelConfig, tensor_parallel: int = 1, rank: int = 0, *, scale: float = 0.0, softcap: float = 0.0
) -> list[AttentionSpec]:
    """One spec per layer as rank `rank` of `tensor_parallel` sees it; windows as `config.layer_types` says."""
    heads = share_heads(config.num_heads, config.num_kv_heads, rank, tensor_parallel)
    common = AttentionSpec(
        num_heads=heads.query, num_kv_heads=heads.kv, head_size=config.head_size, scale=scale, softcap=softcap
    )
    sliding = msgspec.structs.replace(common, kind="window", window=config.sliding_window)
    kinds = config.layer_types or ("full_attention",) * config.num_layers
    return [sliding if kind == "sliding_attention" else common for kind in kinds]


class Attention:
    """Self-attention of layer `layer`: hidden [tokens, hidden] -> [tokens, hidden].

    `qk_norm`: queries and keys are normed per head before the rotary embedding (Qwen 3, Gemma 3)."""

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        config: ModelConfig,
        spec: AttentionSpec,
        layer: int,
        rotary: RotaryEmbedding,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        unit_offset: bool = False,
    ) -> None:
        size, parallel = config.head_size, build.parallel
        self._layer = layer
        self._head_size = size
        self._heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self._sizes = [heads * size for heads in self._heads]
        self._rotary = rotary
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        ranks = [share_heads(heads, kv_heads, rank, parallel.size) for rank in range(parallel.size)]
        self._qkv = QKVLinear(build, weights, hidden, heads, kv_heads, size, ranks[parallel.rank], qkv_bias)
        columns = [held.query_part(size) for held in ranks]
        self._out = RowParallelLinear(build, weights, "o_proj", heads * size, hidden, out_bias, columns)
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        if qk_norm:
            self._norms = (
                RMSNorm(build, weights.at("q_norm"), size, config.norm_eps, unit_offset),
                RMSNorm(build, weights.at("k_norm"), size, config.norm_eps, unit_offset),
            )
        norms = None
        if self._norms is not None:
            norms = HeadNorms(self._norms[0].weight, self._norms[1].weight, config.norm_eps, unit_offset)
        self._turn = HeadTurn(rotary.cos_sin, norms)

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        query, key, value = (
            part.view(-1, heads, self._head_size)
            for part, heads in zip(torch.split(self._qkv(hidden), self._sizes, dim=-1), self._heads, strict=True)
        )  # [tokens, heads, head_size]
        if ctx.turns_heads(self._layer):
            attended = ctx.attend_turned(self._layer, query, key, value, positions, self._turn)
            return self._out(attended.flatten(1))
        if self._norms is not None:
            query, key = self._norms[0](query), self._norms[1](key)
        query, key = self._rotary(query, key, positions)
        return self._out(ctx.attend(self._layer, query, key, value).flatten(1))
