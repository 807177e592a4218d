"""Rope tables, number by number, against transformers' own rules."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from interlace.errors import CheckpointError
from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.layers.rotary import rope_table

HEAD_SIZE = 64
LENGTH = 300
FACTORS = torch.linspace(1.0, 6.0, HEAD_SIZE // 2).tolist()

CASES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-partial": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-partial": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5},
    "yarn-exact-range": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (HEAD_SIZE // 2),
        "long_factor": FACTORS,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("case", CASES)
def test_table_equals_transformers(case, theta):
    parameters = {"rope_theta": theta, **CASES[case]}
    config = LlamaConfig(
        head_dim=HEAD_SIZE, max_position_embeddings=256, rope_parameters=dict(parameters), num_attention_heads=2
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=LENGTH)
    angles = torch.arange(LENGTH, dtype=torch.float32)[:, None] * frequencies
    expected = torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1)
    table = rope_table(parameters, HEAD_SIZE, 256, LENGTH)
    assert torch.equal(table, expected)


def test_default_table_is_the_textbook_formula():
    table = rope_table({"rope_type": "default", "rope_theta": 10_000.0}, 8, 64, 5)
    for position in range(5):
        for pair in range(4):
            angle = position / 10_000 ** (2 * pair / 8)
            assert table[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert table[position, 4 + pair].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_partial_rotary_leaves_the_other_channels_alone():
    table = rope_table({"rope_theta": 100.0, "partial_rotary_factor": 0.5}, 8, 64, 10)
    assert table.shape == (10, 4)
    kernels = Kernels(Kernels.Options(), KernelSpec("float32", "cpu"))
    query, key = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    turned, turned_key = kernels.rope(query, key, torch.tensor([4, 0, 9]), table)
    assert torch.equal(turned[..., 4:], query[..., 4:]) and torch.equal(turned_key[..., 4:], key[..., 4:])
    assert torch.equal(turned[1], query[1]), "position 0 turns nothing"
    assert not torch.allclose(turned[0, :, :4], query[0, :, :4])
    assert torch.allclose(turned.norm(dim=-1), query.norm(dim=-1), atol=1e-5), "rotations keep lengths"


def test_unknown_type_and_missing_key_are_named():
    with pytest.raises(CheckpointError, match=r"rope_type = 'yarm' .* Did you mean 'yarn'\?"):
        rope_table({"rope_type": "yarm"}, 8, 64, 8)
    with pytest.raises(CheckpointError, match="rope_type 'llama3' lack 'factor'"):
        rope_table({"rope_type": "llama3"}, 8, 64, 8)
