"""Tiny random checkpoints made by transformers, the reference for every architecture."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from interlace.interfaces.model import Model
from interlace.model_config import ModelConfig
from interlace.plugins.attention.torch import TorchAttention
from interlace.plugins.kernels.torch import TorchKernels
from interlace.plugins.models import interlace_models
from interlace.testing.model_harness import ModelHarness

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.4,  # large, so that attention patterns and logits differ visibly
}


class Tiny(NamedTuple):
    """A transformers model, and what our side is built from."""

    reference: Any
    config: ModelConfig
    model: type[Model]

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.reference.state_dict().items())

    def harness(self, **settings: Any) -> ModelHarness:
        settings = {"attention": TorchAttention, "kernels": TorchKernels, **settings}
        return ModelHarness(self.model, self.config, self.weights(), **settings)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[tokens, vocab] by transformers."""
        return self.reference(torch.tensor([token_ids]), use_cache=False).logits[0]


def make_tiny(architecture: str, **changes: Any) -> Tiny:
    torch.manual_seed(1)
    reference_class = getattr(transformers, architecture)
    config = reference_class.config_class(architectures=[architecture], **{**TINY, **changes})
    config._attn_implementation = "eager"
    reference = reference_class(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # ones and zeros at first, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    target = {provider.name: provider.target for provider in interlace_models()}[architecture]
    module, _, name = target.partition(":")
    model = getattr(importlib.import_module(module), name)
    return Tiny(reference, ModelConfig.from_hf(config.to_dict(), "test"), model)


@pytest.fixture
def tiny() -> Any:
    """`tiny("LlamaForCausalLM", head_dim=16)` → Tiny."""
    return make_tiny


@pytest.fixture
def prompt() -> list[int]:
    return torch.randint(3, 97, (29,), generator=torch.Generator().manual_seed(7)).tolist()
