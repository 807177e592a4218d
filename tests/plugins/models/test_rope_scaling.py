"""Rope scalings of whole models against transformers, beyond the trained length."""

from __future__ import annotations

import pytest
import torch

from interlace.model_config import ModelConfig

TRAINED = 16  # shorter than the prompt, so that scaling acts

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn-all-keys": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 0.8,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": TRAINED,
    "factor": 4.0,
}


def largest_difference(checkpoint, prompt: list[int], max_model_len: int) -> float:
    harness = checkpoint.harness(max_model_len=max_model_len)
    actual = harness.run(prompt, chunk=7)
    return (actual - checkpoint.logits(prompt)).abs().max().item()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_exact_scalings(tiny, prompt, scaling):
    parameters = {"rope_theta": 500.0, **SCALINGS[scaling]}
    checkpoint = tiny("LlamaForCausalLM", rope_parameters=parameters)
    assert largest_difference(checkpoint, prompt, max_model_len=64) < 1e-4
    unscaled = tiny("LlamaForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert (unscaled.logits(prompt) - checkpoint.logits(prompt)).abs().max() > 1e-2, "scaling must matter here"


def test_dynamic_acts_as_if_every_sequence_had_max_model_len(tiny, prompt):
    parameters = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    checkpoint = tiny("LlamaForCausalLM", rope_parameters=parameters, max_position_embeddings=TRAINED)
    assert largest_difference(checkpoint, prompt, max_model_len=len(prompt)) < 1e-4
    assert largest_difference(checkpoint, prompt[:12], max_model_len=TRAINED) < 1e-4  # all within the trained length
    assert largest_difference(checkpoint, prompt, max_model_len=64) > 1e-3  # documented: the longer table is used


def test_longrope_picks_its_factors_by_max_model_len(tiny, prompt):
    parameters = {"rope_theta": 500.0, **LONGROPE}
    checkpoint = tiny("LlamaForCausalLM", rope_parameters=parameters)
    assert largest_difference(checkpoint, prompt, max_model_len=64) < 1e-4  # both beyond the trained length
    assert largest_difference(checkpoint, prompt[:12], max_model_len=TRAINED) < 1e-4  # both within
    assert largest_difference(checkpoint, prompt[:12], max_model_len=64) > 1e-3  # documented: long factors are used


def test_gemma_scales_its_full_layers_only(tiny, prompt):
    parameters = {
        "full_attention": {"rope_type": "linear", "rope_theta": 800.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    checkpoint = tiny("Gemma3ForCausalLM", num_hidden_layers=6, sliding_window=8, rope_parameters=parameters)
    assert largest_difference(checkpoint, prompt, max_model_len=64) < 1e-4


def test_old_style_config_keys(tiny, prompt):
    """Configs written before transformers 5 have `rope_theta` and `rope_scaling` at the top."""
    checkpoint = tiny("LlamaForCausalLM", rope_parameters={"rope_theta": 500.0, **SCALINGS["llama3"]})
    raw = dict(checkpoint.config.raw)
    scaling = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = scaling.pop("rope_theta")
    raw["rope_scaling"] = scaling
    old = checkpoint._replace(config=ModelConfig.from_hf(raw, "test"))
    assert torch.equal(old.harness().run(prompt), checkpoint.harness().run(prompt))


def test_old_style_keys_stated_at_the_top():
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 1, "partial_rotary_factor": 0.5, "rope_theta": 70.0}
    raw |= {"original_max_position_embeddings": 16, "rope_scaling": {"type": "linear", "factor": 2.0}}
    expected = {"rope_type": "linear", "factor": 2.0, "rope_theta": 70.0}
    expected |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}
    assert ModelConfig.from_hf(raw, "test").rope == expected
