"""What every model must do. The package has to be installed: the suite finds `GPT2LMHeadModel` as an engine does."""

from __future__ import annotations

from interlace.testing import ModelConformance
from transformers import GPT2Config


class TestGPT2LMHeadModel(ModelConformance):
    model = "GPT2LMHeadModel"

    def transformers_config(self) -> GPT2Config:
        return GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4)
