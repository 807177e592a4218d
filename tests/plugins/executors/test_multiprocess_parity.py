"""A real model over several processes gives what it gives in one: SmolLM2 with tensor ranks, stages, and both, in every
form of weights.

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


# ── Ranks that gather ───────────────────────────────────────────────────────────────────────────────────────────────

BLOCKS = {"dtype": "bfloat16"}  # those of the file stay, and are multiplied with activations in 8 bits
ROUNDING = [
    BLOCKS,
    {"dtype": "float32", "weights": "as-shipped"},
    {"dtype": "bfloat16", "weights": "int8"},
    {"dtype": "float32", "weights": "int8"},
]
OTHERS = [
    {"dtype": "float32", "weights": "bf16"},
    {"dtype": "float32", "deterministic": True},
    {"dtype": "bfloat16", "weights": "bf16", "deterministic": True},
]
CASES = [
    *((settings, layout) for settings in ROUNDING for layout in ((2, 1), (3, 1), (2, 2))),
    *((settings, (2, 2)) for settings in OTHERS),
]


def bits(references, settings, **executor):
    """Of an engine: greedy tokens with all their log probabilities in full, and samples of the same steps."""
    with LLM("smollm2", executor=executor, max_model_len=512, cache={"memory": "256MiB"}, threads=2, **settings) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=3, ignore_eos=True)
        seeded = [SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=9) for seed in range(3)]
        prompts = [reference.prompt_token_ids for reference in references]
        outputs = llm.generate([*prompts, *prompts[:3]], [greedy] * len(prompts) + seeded, progress=False)
    assert not [output.error for output in outputs if output.error]
    return [
        (one.token_ids, list(map(in_full, one.logprobs or ()))) for one in (output.outputs[0] for output in outputs)
    ]


def in_full(place):
    """Token → its log probability, to the last bit."""
    return {token: entry.logprob.hex() for token, entry in place.items()}


@pytest.fixture(scope="module")
def whole():
    """Form of weights → the bits of one process."""
    return {}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("settings", "layout"), CASES, ids=str)
def test_bits_are_those_of_one_process(references, whole, settings, layout):
    """Blocks, int8 and whatever else rounds activations; with `deterministic` all weights."""
    key = msgspec.json.encode(settings)
    if key not in whole:
        whole[key] = bits(references, settings, use="uniprocess")
    options = {"tensor_parallel": layout[0], "pipeline_parallel": layout[1]}
    assert bits(references, settings, use="multiprocess", options={"multiprocess": options}) == whole[key]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gloo_gathers_the_same_bits(references):
    """Two ranks hold six and three heads: what they gather is not of equal length."""
    options = {"tensor_parallel": 2, "all_reduce": "gloo"}
    found = bits(references, BLOCKS, use="multiprocess", options={"multiprocess": options})
    assert found == bits(references, BLOCKS, use="uniprocess")
