"""What every model must do. The package has to be installed: the suite finds `GPT2LMHeadModel` as an engine does."""

from __future__ import annotations

from interlace.testing import ModelConformance


class TestGPT2LMHeadModel(ModelConformance):
    model = "GPT2LMHeadModel"
