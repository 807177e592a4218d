"""A real model over two nodes gives what it gives in one process: SmolLM2, whose 9 heads in 3 groups part unevenly."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from interlace import LLM, SamplingParams
from interlace.testing.parity import Agreement, Reference, agreement

REFERENCES = Path(__file__).parents[2] / "e2e" / "references" / "smollm2.json"
NUM_PROMPTS, NUM_TOKENS = 4, 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    """The shortest of the stored greedy references of transformers."""
    stored = msgspec.convert(msgspec.json.decode(REFERENCES.read_bytes())["references"], list[Reference])
    return sorted(stored, key=lambda reference: len(reference.prompt_token_ids))[:NUM_PROMPTS]


def answers(references, dtype="float32", **executor):
    settings = {"dtype": dtype, "max_model_len": 256, "cache": {"memory": "64MiB"}, "threads": 2}
    with LLM("smollm2", executor=executor, **settings) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([reference.prompt_token_ids for reference in references], greedy, progress=False)
    assert not [output.error for output in outputs if output.error]
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.timeout(300)
def test_tokens_are_those_of_one_process(references, ray_cluster):
    alone = answers(references, use="uniprocess")
    for ranks in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}):
        options = {**ranks, "address": ray_cluster.address, "placement": "strict_spread"}
        found = answers(references, use="ray", options={"ray": options})
        for reference, tokens, expected in zip(references, found, alone, strict=True):
            if tokens != expected:
                short = Reference(reference.prompt_token_ids, reference.token_ids[:NUM_TOKENS], reference.gaps)
                assert agreement(short, tokens)[0] is not Agreement.DIFFERENT, f"{ranks}: {tokens}, alone {expected}"
        assert sum(tokens != expected for tokens, expected in zip(found, alone, strict=True)) <= 1


@pytest.mark.timeout(300)
def test_blocks_as_shipped_give_the_very_tokens_of_one_process(references, ray_cluster):
    """In bfloat16 the file's blocks stay blocks: ranks gather, by gloo, parts that are not of equal length."""
    options = {"tensor_parallel": 2, "address": ray_cluster.address, "placement": "strict_spread"}
    found = answers(references, "bfloat16", use="ray", options={"ray": options})
    assert found == answers(references, "bfloat16", use="uniprocess")
