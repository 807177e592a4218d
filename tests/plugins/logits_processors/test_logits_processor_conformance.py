"""The conformance suite of logits processors: the built-in passes it, processors that are wrong on purpose do not."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from pydantic import BaseModel, Field

from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.sampling.sampler import Sampler
from interlace.testing.conformance import failures
from interlace.testing.logits_processor_suite import LogitsProcessorConformance


class TestNoRepeatNGram(LogitsProcessorConformance):
    logits_processor = "no_repeat_ngram"
    args: ClassVar = {"size": 2}
    other_args: ClassVar = {"size": 3}
    bad_args: ClassVar = [{}, {"size": 0}, {"size": "3"}, {"size": 2.0}, {"size": None}]


class Bias(LogitsProcessor):
    """Right: adds `amount` to the token after the last one, and to the first of the prompt."""

    class Args(BaseModel, extra="forbid"):
        amount: float = Field(strict=True)

    def __init__(self, options, vocab_size):
        super().__init__(options, vocab_size)
        self.requests = {}

    def add(self, slot, args, prompt_token_ids):
        self.requests[slot] = (args.amount, prompt_token_ids)

    def remove(self, slot):
        del self.requests[slot]

    def apply(self, logits, rows):
        for row, slot, output in rows:
            amount, prompt = self.requests[slot]
            self.change(logits[row], amount, [*prompt, *output.tolist()])

    def change(self, logits, amount, tokens):
        logits[(tokens[-1] + 1) % self.vocab_size] += amount
        logits[tokens[0]] += amount


class BiasConformance(LogitsProcessorConformance):
    args: ClassVar = {"amount": 4.0}
    other_args: ClassVar = {"amount": -2.0}
    bad_args: ClassVar = [{"amount": "1"}, {}]


class TestBias(BiasConformance):
    logits_processor = Bias


class AllRows(Bias):
    def apply(self, logits, rows):
        super().apply(logits, rows)
        logits += 1


class InGivenOrder(Bias):
    """Takes the n-th row given for row n."""

    def apply(self, logits, rows):
        super().apply(logits, [row._replace(row=number) for number, row in enumerate(rows)])


class OnePositionPerRequest(Bias):
    def apply(self, logits, rows):
        super().apply(logits, {row.slot: row for row in rows}.values())


class CountsCalls(Bias):
    calls = 0

    def apply(self, logits, rows):
        self.calls += 1
        super().apply(logits, rows)
        logits[[row.row for row in rows]] += self.calls


class KeepsFirst(Bias):
    """The first request of a slot decides for all that follow."""

    def add(self, slot, args, prompt_token_ids):
        self.requests.setdefault(slot, (args.amount, prompt_token_ids))

    def remove(self, slot):
        pass


class ForgetsAll(Bias):
    def remove(self, slot):
        self.requests = dict.fromkeys(self.requests, (0.0, [0]))


class MeanOfBatch(Bias):
    def apply(self, logits, rows):
        chosen = [row.row for row in rows]
        logits[chosen] = logits[chosen] - logits[chosen].mean()


class Noise(Bias):
    def change(self, logits, amount, tokens):
        logits += torch.rand(1)


class Accumulates(Bias):
    """Collects the output by itself, as if no draft were ever rejected."""

    def apply(self, logits, rows):
        for row, slot, output in rows:
            seen = self.requests[slot][1]
            seen += output.tolist()[-1:]
            self.change(logits[row], self.requests[slot][0], seen)


class Idle(Bias):
    def apply(self, logits, rows):
        pass


class Normalises(Bias):
    def change(self, logits, amount, tokens):
        logits[:] = logits - logits.mean()


class LaxArgs(Bias):
    class Args(BaseModel):
        amount: float


class LaxOptions(Bias):
    class Options(BaseModel):
        pass


class NewTensor(Bias):
    def apply(self, logits, rows):
        logits = logits.clone()
        super().apply(logits, rows)


class NeedsRows(Bias):
    def apply(self, logits, rows):
        super().apply(logits, rows)
        logits[rows[0].row] += 0 if rows else 1


class WritesOutput(Bias):
    def apply(self, logits, rows):
        for row in rows:
            row.output_token_ids[:1] = 0
        super().apply(logits, rows)


WRONG = [
    (AllRows, "test_nothing_to_do", "although no row was given"),
    (InGivenOrder, "test_batch_equals", "differs from the same row alone|were changed"),
    (OnePositionPerRequest, "test_positions_of_a_draft", "differs from the same row alone"),
    (CountsCalls, "test_batch_equals", "differs from the same row alone"),
    (KeepsFirst, "test_slots_are_used_again", "differs from the same row alone"),
    (ForgetsAll, "test_slots_are_used_again", "differs from the same row alone"),
    (MeanOfBatch, "test_batch_equals", "differs from the same row alone"),
    (Noise, "test_batch_equals", "differs from the same row alone"),
    (Accumulates, "test_positions_of_a_draft", "differs from the same row alone"),
    (Idle, "test_something_changes", "no logits change"),
    (NewTensor, "test_something_changes", "no logits change"),
    (Normalises, "test_tokens_excluded", "NaN in the logits"),
    (LaxArgs, "test_bad_args", r"arguments {'amount': '1'} are accepted"),
    (LaxOptions, "test_unknown_options", "no_such_option"),
    (NeedsRows, "test_nothing_to_do", "IndexError"),
    (WritesOutput, "test_batch_equals", "read-only"),
]


@pytest.mark.parametrize(("wrong", "test", "message"), WRONG, ids=[entry[0].__name__ for entry in WRONG])
def test_wrong_processors_fail(wrong, test, message):
    class Suite(BiasConformance):
        logits_processor = wrong

    ((name, found),) = failures(Suite, only=test).items()
    assert name.startswith(test)
    assert re.search(message, found), found


def test_arguments_need_bad_examples():
    class Suite(BiasConformance):
        logits_processor = Bias
        bad_args = ()

    assert "state `bad_args`" in failures(Suite, only="bad_args")["test_bad_args_are_refused"]


def test_an_engine_that_applied_processors_in_another_order_would_fail(monkeypatch):
    class Suite(BiasConformance):
        logits_processor = Bias

    start = Sampler.__init__
    monkeypatch.setattr(
        Sampler, "__init__", lambda self, size, given, *rest: start(self, size, dict(sorted(given.items())), *rest)
    )
    assert "with the processor after another" in failures(Suite, only="declared")["test_composes_in_declared_order"]
