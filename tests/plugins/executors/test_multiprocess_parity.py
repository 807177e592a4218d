"""A real model over several processes gives what it gives in one: SmolLM2 with tensor ranks, stages, and both.

Its heads do not go evenly into two (9 query heads in 3 groups) nor its layers into anything but divisors of 30.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from interlace import LLM, SamplingParams
from interlace.testing.parity import Agreement, Reference, agreement

REFERENCES = Path(__file__).parents[2] / "e2e" / "references" / "smollm2.json"
NUM_PROMPTS, NUM_TOKENS = 6, 16
RANKS = [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2)]


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    """The shortest of the stored greedy references of transformers."""
    stored = msgspec.convert(msgspec.json.decode(REFERENCES.read_bytes())["references"], list[Reference])
    return sorted(stored, key=lambda reference: len(reference.prompt_token_ids))[:NUM_PROMPTS]


def forced(references):
    """Prompts that end at several places of known answers: what is sampled next depends on nothing sampled before."""
    return [
        [*reference.prompt_token_ids, *reference.token_ids[:length]]
        for reference in references
        for length in (1, 5, 9, 14)
    ]


def answers(references, **executor):
    """(greedy tokens, seeded samples) of an engine."""
    settings = {"dtype": "float32", "max_model_len": 512, "cache": {"memory": "512MiB"}, "threads": 2}
    with LLM("smollm2", executor=executor, **settings) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([reference.prompt_token_ids for reference in references], greedy, progress=False)
        prompts = forced(references)
        seeded = [SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=1) for seed in range(len(prompts))]
        samples = llm.generate(prompts, seeded, progress=False)
    assert not [output.error for output in (*outputs, *samples) if output.error]
    return [output.outputs[0].token_ids for output in outputs], [output.outputs[0].token_ids for output in samples]


@pytest.fixture(scope="module")
def alone(references):
    return answers(references, use="uniprocess")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), RANKS)
def test_tokens_are_those_of_one_process(references, alone, tensor_parallel, pipeline_parallel):
    options = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    greedy, seeded = answers(references, use="multiprocess", options={"multiprocess": options})
    ties = 0
    for reference, tokens, expected in zip(references, greedy, alone[0], strict=True):
        if tokens != expected:
            short = Reference(reference.prompt_token_ids, reference.token_ids[:NUM_TOKENS], reference.gaps)
            assert agreement(short, tokens)[0] is not Agreement.DIFFERENT, f"{tokens}, alone {expected}"
            ties += 1
    assert ties <= 1
    assert seeded == alone[1]
