"""Qwen 2, 2.5 and 3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping

from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.model import BuildContext
from interlace.layers.attention import attention_specs
from interlace.layers.decoder import CausalLM, DecoderLayer, PreNormLayer
from interlace.layers.rotary import RotaryEmbedding
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig


class Qwen2ForCausalLM(CausalLM):
    """Pre-norm layers with a bias on query, key and value; the upper layers may have a sliding window."""

    qk_norm = False

    @classmethod
    def attention_specs(cls, config: ModelConfig, tensor_parallel: int = 1, rank: int = 0) -> list[AttentionSpec]:
        return attention_specs(config, tensor_parallel, rank)

    def build_layers(
        self, build: BuildContext, weights: WeightTable, specs: Mapping[int, AttentionSpec]
    ) -> list[DecoderLayer]:
        config = self.config
        rotary = RotaryEmbedding(build, config.rope, config.head_size, config.max_position_embeddings)
        qkv_bias, out_bias = self.attention_biases(config)
        return [
            PreNormLayer(
                build,
                weights.at(str(layer)),
                config,
                spec,
                layer,
                rotary,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
                qk_norm=self.qk_norm,
            )
            for layer, spec in specs.items()
        ]

    def attention_biases(self, config: ModelConfig) -> tuple[bool, bool]:
        """Whether (query, key, value) and the output projection have a bias."""
        return True, False


class Qwen3ForCausalLM(Qwen2ForCausalLM):
    """Qwen 2 with query and key normed per head, and no bias unless the config asks for it."""

    qk_norm = True

    def attention_biases(self, config: ModelConfig) -> tuple[bool, bool]:
        bias = bool(config.raw.get("attention_bias"))
        return bias, bias
