"""The embedded SmolLM2 against transformers on the same weights, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from interlace.plugins.attention.torch import TorchAttention
from interlace.plugins.checkpoints.gguf import GgufCheckpoint
from interlace.plugins.kernels.torch import TorchKernels
from interlace.plugins.models.llama import LlamaForCausalLM
from interlace.testing.model_harness import ModelHarness

PROMPT = [1, 4093, 198, 62, 1102, 253, 1217, 3800, 1701, 260, 6376, 314, 4461, 30, 2, 198, 1, 520, 9531, 198]
NUM_TOKENS = 64


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own GGUF reader warns about its own things
def test_smollm2_greedy_tokens_equal_transformers(smollm2_path: Path):
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    checkpoint = GgufCheckpoint(GgufCheckpoint.Options(), smollm2_path)
    harness = ModelHarness(
        LlamaForCausalLM,
        checkpoint.config(),
        checkpoint.weights(),
        attention=TorchAttention,
        kernels=TorchKernels,
        block_size=16,
        num_blocks=32,
    )
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0].tolist()
        logits = reference(torch.tensor([expected])).logits[0]
    assert harness.generate(PROMPT, NUM_TOKENS) == expected[len(PROMPT) :]
    # Logits reach 38 here, so this is 1e-5 of their size.
    assert (harness.run(expected, chunk=17) - logits).abs().max() < 5e-4
