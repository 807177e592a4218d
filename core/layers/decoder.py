"""The frame every decoder-only model shares, and the layer most of them are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch

from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.model import BuildContext, ForwardContext, Model, ModelOutput
from interlace.interfaces.weights import BlockWeight
from interlace.layers.attention import Attention
from interlace.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from interlace.layers.mlp import GatedMLP
from interlace.layers.norm import RMSNorm
from interlace.layers.rotary import RotaryEmbedding
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig


class DecoderLayer(ABC):
    """One layer of the residual stream.

    A layer gets its predecessor's output and the residual apart, so that the addition is fused with its first norm:
    the stream is `hidden + residual` (`hidden` alone before the first layer, `residual` being None)."""

    @abstractmethod
    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) of the next layer; all [tokens, hidden]."""


class PreNormLayer(DecoderLayer):
    """norm → attention → add → norm → gated feed-forward → add: Llama, Mistral, Qwen."""

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
        mlp_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self._attention_norm = RMSNorm(build, weights.at("input_layernorm"), size, eps)
        self._attention = Attention(
            build,
            weights.at("self_attn"),
            config,
            spec,
            layer,
            rotary,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
        )
        self._mlp_norm = RMSNorm(build, weights.at("post_attention_layernorm"), size, eps)
        activation = config.raw.get("hidden_act") or "silu"
        self._mlp = GatedMLP(build, weights.at("mlp"), size, config.intermediate_size, activation, mlp_bias)

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            hidden, residual = self._attention_norm(hidden), hidden
        else:
            hidden, residual = self._attention_norm.add(hidden, residual)
        hidden = self._attention(hidden, positions, ctx)
        hidden, residual = self._mlp_norm.add(hidden, residual)
        return self._mlp(hidden), residual


class CausalLM(Model):
    """Embedding, decoder layers, final norm, output head. An architecture says what its layers are made of.

    As a pipeline stage it has its run of the layers; the embedding is on the first stage, norm and head on the last,
    where a tied head has the embedding's weight as its own."""

    takes_blocks = True
    supports_pipeline = True
    norm_unit_offset = False
    """Whether the checkpoint's final norm stores weight - 1 (Gemma)."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self._parallel, self._dtype = build.parallel, build.dtype
        self._embedding: VocabParallelEmbedding | None = None
        self._norm: RMSNorm | None = None
        self._head: VocabParallelHead | None = None
        weights = self._weights = WeightTable()
        weights.ignore("rotary_emb.inv_freq")  # computed, but shipped by old checkpoints
        body, layers, parallel = weights.at("model"), weights.at("model").at("layers"), build.parallel
        if parallel.is_first_stage:
            self._embedding = VocabParallelEmbedding(
                build, body.at("embed_tokens"), config.vocab_size, config.hidden_size
            )
        specs = self.attention_specs(config, parallel.size, parallel.rank)
        here = parallel.layers_here(len(specs))
        for layer in range(len(specs)):
            if layer not in here:
                layers.leave(str(layer))
        self._layers = self.build_layers(build, layers, {layer: specs[layer] for layer in here})
        if parallel.is_last_stage:
            self._norm = RMSNorm(build, body.at("norm"), config.hidden_size, config.norm_eps, self.norm_unit_offset)
            self._head = self._build_head(build)
        else:
            body.leave("norm")
            weights.leave("lm_head")
        if self._embedding is None and not (parallel.is_last_stage and config.tie_word_embeddings):
            body.leave("embed_tokens")

    def _build_head(self, build: BuildContext) -> VocabParallelHead:
        config, weights, tied = self.config, self._weights.at("lm_head"), None
        if config.tie_word_embeddings:
            self._weights.ignore("lm_head.weight")  # some checkpoints ship the tied weight twice
            weights, tied = self._weights.at("model").at("embed_tokens"), self._embedding
        elsewhere = config.tie_word_embeddings and tied is None
        return VocabParallelHead(build, weights, config.vocab_size, config.hidden_size, tied, elsewhere)

    @abstractmethod
    def build_layers(
        self, build: BuildContext, weights: WeightTable, specs: Mapping[int, AttentionSpec]
    ) -> list[DecoderLayer]:
        """The decoder layers of this stage in order. `specs`: number of each in the whole model → its attention; layer
        i expects its tensors below `weights.at(str(i))`."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden], on the first stage; an architecture that scales its embeddings extends this."""
        assert self._embedding is not None
        return self._embedding(token_ids)

    @property
    def num_parameters(self) -> int:
        return self._weights.num_parameters

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor | BlockWeight]]) -> None:
        self._weights.load(weights)
        if self._head is not None:
            self._head.finish()

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> ModelOutput:
        residual: torch.Tensor | None = None
        if self._embedding is not None:
            hidden = self.embed(token_ids)
        else:
            hidden, residual = self._parallel.receive(len(token_ids), self.config.hidden_size, self._dtype)
        for layer in self._layers:
            hidden, residual = layer(hidden, residual, positions, ctx)
        if self._norm is None:
            assert residual is not None  # a stage has a layer at least
            self._parallel.send(hidden, residual)
            return ModelOutput(hidden[:0], {})
        hidden = self._norm(hidden) if residual is None else self._norm.add(hidden, residual)[0]
        return ModelOutput(hidden, {})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            raise RuntimeError("the output head is on the last pipeline stage, and this is another")
        return self._head(hidden)
