"""Llama (1 to 3.x, and the many models of its shape such as SmolLM2) and Mistral."""

from __future__ import annotations

from collections.abc import Mapping

from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.model import BuildContext
from interlace.layers.attention import attention_specs
from interlace.layers.decoder import CausalLM, DecoderLayer, PreNormLayer
from interlace.layers.rotary import RotaryEmbedding
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig


class LlamaForCausalLM(CausalLM):
    """Pre-norm layers; biases only where the config says so."""

    @classmethod
    def attention_specs(cls, config: ModelConfig, tensor_parallel: int = 1, rank: int = 0) -> list[AttentionSpec]:
        return attention_specs(config, tensor_parallel, rank)

    def build_layers(
        self, build: BuildContext, weights: WeightTable, specs: Mapping[int, AttentionSpec]
    ) -> list[DecoderLayer]:
        config = self.config
        rotary = RotaryEmbedding(build, config.rope, config.head_size, config.max_position_embeddings)
        attention_bias = bool(config.raw.get("attention_bias"))
        mlp_bias = bool(config.raw.get("mlp_bias"))
        return [
            PreNormLayer(
                build,
                weights.at(str(layer)),
                config,
                spec,
                layer,
                rotary,
                qkv_bias=attention_bias,
                out_bias=attention_bias,
                mlp_bias=mlp_bias,
            )
            for layer, spec in specs.items()
        ]


class MistralForCausalLM(LlamaForCausalLM):
    """Llama's layers; those with a sliding window are named by `config.layer_types`, as in every architecture."""
