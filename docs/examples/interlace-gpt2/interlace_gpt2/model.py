"""GPT-2 (Radford et al. 2019): learned positions, layer norms before attention and feed-forward, a tied head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from interlace.errors import CheckpointError
from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.model import BuildContext, ForwardContext, Model, ModelOutput
from interlace.layers.attention import attention_specs
from interlace.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from interlace.layers.linear import RowParallelLinear
from interlace.layers.parallel import share_heads
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig

from interlace_gpt2.layers import MLP, Conv1DTable, FusedQKV, LayerNorm


class Block:
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self, build: BuildContext, weights: WeightTable, config: ModelConfig, spec: AttentionSpec, layer: int
    ) -> None:
        size, eps = config.hidden_size, config.norm_eps
        attention = Conv1DTable(weights.at("attn"))
        self._layer = layer
        self._heads = (-1, 3 * spec.num_heads, config.head_size)
        self._norm1 = LayerNorm(build, weights.at("ln_1"), size, eps)
        parallel = build.parallel
        heads = [share_heads(config.num_heads, config.num_heads, rank, parallel.size) for rank in range(parallel.size)]
        parts = [held.query_part(config.head_size) for held in heads]
        self._qkv = FusedQKV(build, attention, "c_attn", size, parts[parallel.rank])
        self._out = RowParallelLinear(build, attention, "c_proj", size, size, bias=True, columns=parts)
        self._norm2 = LayerNorm(build, weights.at("ln_2"), size, eps)
        activation = config.raw.get("activation_function", "gelu_new")
        self._mlp = MLP(build, Conv1DTable(weights.at("mlp")), size, config.intermediate_size, activation)

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        query, key, value = self._qkv(self._norm1(x)).view(self._heads).chunk(3, dim=1)  # [tokens, heads, head_size]
        x = x + self._out(ctx.attend(self._layer, query, key, value).flatten(1))
        return x + self._mlp(self._norm2(x))


class GPT2LMHeadModel(Model):
    """The language model of a GPT-2 checkpoint."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.raw.get(key):
                raise CheckpointError(f"{key} = true: this variant of GPT-2 is not supported")
        weights = self._weights = WeightTable()
        for buffer in (".attn.bias", ".attn.masked_bias"):  # the causal mask, shipped by old checkpoints
            weights.ignore(buffer)
        body, vocab, size = weights.at("transformer"), config.vocab_size, config.hidden_size
        self._tokens = VocabParallelEmbedding(build, body.at("wte"), vocab, size)
        self._positions = VocabParallelEmbedding(build, body.at("wpe"), config.max_position_embeddings, size)
        self._blocks = [
            Block(build, body.at(f"h.{layer}"), config, spec, layer)
            for layer, spec in enumerate(self.attention_specs(config, build.parallel.size, build.parallel.rank))
        ]
        self._norm = LayerNorm(build, body.at("ln_f"), size, config.norm_eps)
        tied = self._tokens if config.tie_word_embeddings else None
        self._head = VocabParallelHead(build, weights.at("lm_head"), vocab, size, tied)

    @classmethod
    def attention_specs(cls, config: ModelConfig, tensor_parallel: int = 1, rank: int = 0) -> list[AttentionSpec]:
        scale = 0.0 if config.raw.get("scale_attn_weights", True) else 1.0
        return attention_specs(config, tensor_parallel, rank, scale=scale)

    @property
    def num_parameters(self) -> int:
        return self._weights.num_parameters

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        # Checkpoints of the bare body, the first ones among them, have no prefix.
        self._weights.load(
            (name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}", tensor)
            for name, tensor in weights
        )
        self._head.finish()

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> ModelOutput:
        x = self._tokens(token_ids) + self._positions(positions)  # [tokens, hidden]
        for block in self._blocks:
            x = block(x, ctx)
        return ModelOutput(self._norm(x), {})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)
