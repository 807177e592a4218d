"""Greedy tokens equal transformers' in float32: alone, together, in chunks, with prefix hits, with preemption.

The fast tests compare a few prompts with live transformers; the slow ones all stored references (made by
references/make.py). A difference is admitted only where transformers' two best logits lie within 1e-3.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlace import LLM, SamplingParams
from interlace.catalog import resolve_model
from interlace.plugins.native.library import supported_isas
from interlace.testing.parity import Agreement, Reference, agreement, load_transformers, transformers_greedy

FOLDER = Path(__file__).with_name("references")
BLOCK = 32
FAST_PROMPTS, FAST_TOKENS = 8, 32

SETTINGS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks of 16": {"scheduler": {"max_num_batched_tokens": 16}},
    "chunks of 64": {"scheduler": {"max_num_batched_tokens": 64}},
    "chunks of 512": {"scheduler": {"max_num_batched_tokens": 512}},
    "no prefix caching": {"cache": {"prefix_caching": False}},
}
ALLOWED_TIES = {"smollm2": 3, "gemma3-270m": 1}


def stored(model: str) -> list[Reference]:
    """The stored references of a model, after checking that they were made with the weights at hand."""
    document = msgspec.json.decode((FOLDER / f"{model}.json").read_bytes())
    weights = hashlib.sha256(Path(resolve_model(model).path).read_bytes()).hexdigest()
    assert document["weights_sha256"] == weights, "the references were made with other weights: run references/make.py"
    return msgspec.convert(document["references"], list[Reference])


@pytest.fixture(scope="module")
def live() -> Iterator[list[Reference]]:
    """Live references of the first prompts, in one pass of transformers."""
    prompts = [reference.prompt_token_ids for reference in stored("smollm2")[:FAST_PROMPTS]]
    model = load_transformers(str(resolve_model("smollm2").path))
    yield [transformers_greedy(model, prompt, FAST_TOKENS) for prompt in prompts]
    del model
    gc.collect()


def engine(model: str, settings: dict[str, Any]) -> LLM:
    merged = {"cache": {"memory": "2GiB"}, "max_model_len": 2048, **settings}
    merged["cache"] = {"memory": "2GiB", "block_size": BLOCK, **settings.get("cache", {})}
    return LLM(model, dtype="float32", seed=0, **merged)


def check(name: str, references: list[Reference], outputs: list[Any], max_ties: int) -> None:
    """Every output equals its reference, but for at most `max_ties` ties, which are counted and printed."""
    ties, different = [], []
    for number, (reference, output) in enumerate(zip(references, outputs, strict=True)):
        assert output.error is None, output.error
        result, position = agreement(reference, output.outputs[0].token_ids)
        if result is Agreement.TIE:
            ties.append((number, position, reference.gaps[position]))
        elif result is Agreement.DIFFERENT:
            gap = reference.gaps[min(position, len(reference.gaps) - 1)]
            different.append(f"prompt {number} at token {position} (gap {gap})")
    print(f"{name}: {len(outputs) - len(ties)} of {len(outputs)} equal, ties (prompt, token, gap): {ties}")
    assert not different, f"{name}: {'; '.join(different)}"
    assert len(ties) <= max_ties, f"{name}: {len(ties)} ties, {max_ties} are admitted"


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def compare(model: str, name: str, references: list[Reference], max_tokens: int, max_ties: int) -> None:
    """All prompts at once under one of `SETTINGS`; then again, so that every prompt is a prefix hit."""
    prompts = [reference.prompt_token_ids for reference in references]
    with engine(model, SETTINGS[name]) as llm:
        check(name, references, llm.generate(prompts, params(max_tokens), progress=False), max_ties)
        if name == "together":
            again = llm.generate(prompts, params(max_tokens), progress=False)
            long_enough = [output for output in again if len(output.prompt_token_ids) > BLOCK]
            assert long_enough and all(output.usage.cached_tokens >= BLOCK for output in long_enough)
            check("prefix hits", references, again, max_ties)


def compare_alone(model: str, references: list[Reference], max_tokens: int, max_ties: int) -> None:
    with engine(model, {"cache": {"prefix_caching": False}}) as llm:
        outputs = [
            llm.generate(reference.prompt_token_ids, params(max_tokens), progress=False)[0] for reference in references
        ]
    check("alone", references, outputs, max_ties)


class PreemptionCounter:
    """An event subscriber, so that the test can see that preemption really happened."""

    def __init__(self) -> None:
        self.preempted = 0

    def plugin(self) -> Any:
        from interlace import hookimpl

        counter = self

        class Plugin:
            @hookimpl
            def on_request_finished(self, summary: Any) -> None:
                counter.preempted += summary.num_preemptions

        return Plugin()


def compare_preempted(model: str, references: list[Reference], max_tokens: int, max_ties: int, groups: int = 1) -> None:
    """A cache that holds about two and a half of the longest requests, under all of them at once."""
    longest = max(len(reference.prompt_token_ids) for reference in references) + max_tokens
    blocks = 1 + groups * (5 * longest // (2 * BLOCK) + 1)
    counter = PreemptionCounter()
    settings = {"cache": {"memory": "2GiB", "block_size": BLOCK, "max_blocks": blocks}, "max_model_len": 2048}
    with LLM(model, dtype="float32", plugins=[counter.plugin()], **settings) as llm:
        outputs = llm.generate(
            [reference.prompt_token_ids for reference in references], params(max_tokens), progress=False
        )
    check(f"preempted {counter.preempted} times", references, outputs, max_ties)
    assert counter.preempted > 0


def test_alone_equals_live_transformers(live: list[Reference]) -> None:
    compare_alone("smollm2", live, FAST_TOKENS, max_ties=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_equals_live_transformers(name: str, live: list[Reference]) -> None:
    compare("smollm2", name, live, FAST_TOKENS, max_ties=1)


@pytest.mark.parametrize("isa", [isa for isa in supported_isas() if isa != supported_isas()[0]])
def test_every_instruction_set_equals_live_transformers(live: list[Reference], isa: str) -> None:
    """The best one of this CPU is what all the other tests run on."""
    forced = {"use": "native", "options": {"native": {"isa": isa}}}
    with engine("smollm2", {"attention": forced, "kernels": forced}) as llm:
        assert isa in dict(llm.front.report())["step"]
        prompts = [reference.prompt_token_ids for reference in live]
        outputs = llm.generate(prompts, params(FAST_TOKENS), progress=False)
    check(isa, live, outputs, max_ties=0)


def test_preemption_equals_live_transformers(live: list[Reference]) -> None:
    compare_preempted("smollm2", live, FAST_TOKENS, max_ties=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
class TestAllReferences:
    def test_alone(self, model: str) -> None:
        compare_alone(model, stored(model), 128, ALLOWED_TIES[model])

    @pytest.mark.parametrize("name", SETTINGS)
    def test_setting(self, model: str, name: str) -> None:
        compare(model, name, stored(model), 128, ALLOWED_TIES[model])

    def test_preemption(self, model: str) -> None:
        groups = 6 if model.startswith("gemma") else 1
        compare_preempted(model, stored(model), 128, ALLOWED_TIES[model], groups)


def test_a_difference_beyond_a_tie_is_caught() -> None:
    reference = Reference([1], [5, 6, 7], [0.5, 0.0005, 2.0])
    assert agreement(reference, [5, 6, 7]) == (Agreement.EQUAL, 3)
    assert agreement(reference, [5, 9, 7]) == (Agreement.TIE, 1)
    assert agreement(reference, [4, 6, 7]) == (Agreement.DIFFERENT, 0)
    assert agreement(reference, [5, 6]) == (Agreement.DIFFERENT, 2)
