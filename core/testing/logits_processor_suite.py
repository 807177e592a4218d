"""Conformance suite for logits processors. A third party subclasses it:

    class TestMine(LogitsProcessorConformance):
        logits_processor = "mine"
        args = {"strength": 2.0}
        bad_args = [{"strength": "much"}, {}]

Requests with random prompts and outputs share batches in every way an engine puts them together. A row's result must
depend on that row and its request only, so it is compared with a fresh processor that sees nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from interlace.interfaces.logits_processor import LogitsProcessor, LogitsRow
from interlace.messages import Admission
from interlace.sampling.params import SamplingParams
from interlace.sampling.sampler import Sampler
from interlace.testing.conformance import Conformance, shuffled, skip


class Request(NamedTuple):
    """A request that names the processor."""

    slot: int
    args: BaseModel
    prompt: list[int]


class Position(NamedTuple):
    """One row to compute: a request, and the tokens it has generated at that point."""

    request: Request
    output: list[int]
    logits: torch.Tensor
    """[vocab]."""


class _Shift(LogitsProcessor):
    """Adds to each logit what says whether it came before or after another processor."""

    def add(self, slot: int, args: Any, prompt_token_ids: Sequence[int]) -> None: ...

    def remove(self, slot: int) -> None: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        chosen = [row.row for row in rows]
        logits[chosen] = shift(logits[chosen])


def shift(logits: torch.Tensor) -> torch.Tensor:
    """A change that commutes with little: where a processor comes in the order shows."""
    return logits.roll(1, dims=-1) * 0.5 + 1


class LogitsProcessorConformance(Conformance):
    """What every logits processor must do."""

    kind = "logits_processors"
    selector = "logits_processor"
    logits_processor: ClassVar[str | type[LogitsProcessor]]
    args: ClassVar[Mapping[str, Any]] = {}
    """Valid arguments of a request, under which the processor does something to `random_tokens`."""
    other_args: ClassVar[Mapping[str, Any] | None] = None
    """Different valid arguments, for requests in the same batch; None: there are no others."""
    bad_args: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Arguments that must be refused; at least one where there are arguments."""
    vocab_size: ClassVar[int] = 40
    seeds = range(30)

    def random_tokens(self, rng: random.Random, count: int) -> list[int]:
        """Tokens of prompts and outputs: from the whole vocabulary, or a few of it that repeat."""
        below = rng.choice([self.vocab_size, 3])
        return [rng.randrange(below) for _ in range(count)]

    # ── Arguments ───────────────────────────────────────────────────────────────────────────────────────────────

    def test_valid_args_are_accepted(self) -> None:
        for args in (self.args, *(() if self.other_args is None else (self.other_args,))):
            model = self.target.Args.model_validate(dict(args))
            again = self.target.Args.model_validate(model.model_dump())
            assert again == model, f"Args of {args} do not come back from plain data"

    def test_bad_args_are_refused(self) -> None:
        assert self.bad_args or not self.target.Args.model_fields, "state `bad_args`: the processor takes arguments"
        unknown = {**self.args, "no_such_argument": 1}
        for args in (*self.bad_args, unknown):
            try:
                self.target.Args.model_validate(dict(args))
            except ValidationError:
                continue
            raise AssertionError(f"the arguments {args} are accepted; a request with a slip in them must be refused")

    def test_unknown_options_are_refused(self) -> None:
        try:
            self.target.Options.model_validate({**self.options, "no_such_option": 1})
        except ValidationError:
            return
        raise AssertionError("Options accepts 'no_such_option': a slip in the configuration would pass in silence")

    # ── Rows ────────────────────────────────────────────────────────────────────────────────────────────────────

    def test_something_changes(self) -> None:
        """Without effect nothing below would show anything."""
        for seed in self.seeds:
            rng = random.Random(seed)
            position = self._position(rng, self._request(rng, 0))
            if not torch.equal(self._alone(position), position.logits):
                return
        raise AssertionError(f"under {self.args} no logits change; override `random_tokens` so that some do")

    def test_batch_equals_one_at_a_time(self, seed: int) -> None:
        """Several positions of several requests, in any order, among rows of other requests."""
        rng = random.Random(seed)
        requests = [self._request(rng, slot) for slot in rng.sample(range(12), rng.randint(1, 6))]
        positions = [self._position(rng, request) for request in requests for _ in range(rng.choice([1, 1, 3]))]
        processor = self._make(requests)
        for _ in range(3):  # what was computed before leaves no trace
            self._check(processor, rng, rng.sample(positions, rng.randint(1, len(positions))))

    def test_positions_of_a_draft(self, seed: int) -> None:
        """While drafts are verified a request has a row per position; afterwards it goes on with other tokens."""
        rng = random.Random(seed)
        request = self._request(rng, 3)
        processor = self._make([request])
        output = self.random_tokens(rng, rng.randint(0, 6))
        for _ in range(4):
            draft = self.random_tokens(rng, 4)
            self._check(
                processor, rng, [self._position(rng, request, output + draft[:length]) for length in range(len(draft))]
            )
            output = output + draft[: rng.randint(0, 3)] + self.random_tokens(rng, 1)

    def test_slots_are_used_again(self, seed: int) -> None:
        """A request that leaves takes all its traces with it; the others in the batch do not notice."""
        rng = random.Random(seed)
        here = {slot: self._request(rng, slot) for slot in range(3)}
        processor = self._make(list(here.values()))
        for _ in range(5):
            self._check(processor, rng, [self._position(rng, request) for request in here.values()])
            slot = rng.randrange(3)
            if slot in here:
                processor.remove(slot)
                del here[slot]
            if rng.random() < 0.7:
                here[slot] = self._request(rng, slot)
                self._add(processor, here[slot])

    def test_nothing_to_do(self, seed: int) -> None:
        processor = self._make([self._request(random.Random(seed), 0)])
        logits = torch.randn(3, self.vocab_size)
        before = logits.clone()
        processor.apply(logits, [])
        assert torch.equal(logits, before), "logits were changed although no row was given"

    def test_tokens_excluded_before_stay_numbers(self, seed: int) -> None:
        """Earlier processors exclude tokens with -inf; no NaN may come of it, nor of finite logits."""
        rng = random.Random(seed)
        request = self._request(rng, 0)
        position = self._position(rng, request)
        for excluded in (0, self.vocab_size // 2, self.vocab_size - 1):
            logits = position.logits.clone()
            logits[rng.sample(range(self.vocab_size), excluded)] = -torch.inf
            result = self._alone(position._replace(logits=logits))
            assert not result.isnan().any(), f"NaN in the logits; {excluded} of {self.vocab_size} came as -inf"

    # ── In the engine ───────────────────────────────────────────────────────────────────────────────────────────

    def test_composes_in_declared_order(self, seed: int) -> None:
        """With another processor before or after it, each sees what the one before it left."""
        rng = random.Random(seed)
        position = self._position(rng, self._request(rng, 0))
        for mine_first in (True, False):
            between = position._replace(logits=shift(position.logits))
            expected = shift(self._alone(position)) if mine_first else self._alone(between)
            if expected.isneginf().all() or expected.isnan().any():
                skip("every token is excluded")
            mine: dict[str, LogitsProcessor] = {"mine": self._make([])}
            other: dict[str, LogitsProcessor] = {"shift": _Shift(_Shift.Options(), self.vocab_size)}
            sampler = Sampler(self.vocab_size, {**mine, **other} if mine_first else {**other, **mine})
            token, error = self._sample(sampler, position)
            assert error is None, f"the request fails: {error}"
            wanted = int(expected.argmax())
            order = "before" if mine_first else "after"
            assert token == wanted, f"the best token is {token} instead of {wanted} with the processor {order} another"

    def _sample(self, sampler: Sampler, position: Position) -> tuple[int, str | None]:
        """Greedy token of a position whose request names both processors, or the error."""
        named = {"mine": position.request.args.model_dump(), "shift": {}}
        params = SamplingParams(temperature=0.0, logits_processors=named)
        prompt = position.request.prompt
        sampler.add(0, Admission(0, 0, prompt, len(prompt), 0, params, 0, 0, ()))
        history = np.array([*prompt, *position.output], dtype=np.int32)
        result = sampler.sample(position.logits.clone()[None], [0], [history])
        return result.token_ids[0], result.errors.get(0)

    # ── Making cases ────────────────────────────────────────────────────────────────────────────────────────────

    def _make(self, requests: Sequence[Request]) -> LogitsProcessor:
        processor: LogitsProcessor = self.target(self.target_options, self.vocab_size)
        for request in requests:
            self._add(processor, request)
        return processor

    def _add(self, processor: LogitsProcessor, request: Request) -> None:
        processor.add(request.slot, request.args, list(request.prompt))

    def _request(self, rng: random.Random, slot: int) -> Request:
        args = self.args if self.other_args is None else rng.choice([self.args, self.other_args])
        prompt = self.random_tokens(rng, rng.randint(1, 12))
        return Request(slot, self.target.Args.model_validate(dict(args)), prompt)

    def _position(self, rng: random.Random, request: Request, output: list[int] | None = None) -> Position:
        if output is None:
            output = self.random_tokens(rng, rng.choice([0, 1, 5, 15]))
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        return Position(request, output, torch.randn(self.vocab_size, generator=generator) * 3)

    def _alone(self, position: Position) -> torch.Tensor:
        """What a fresh processor makes of this position alone: [vocab]."""
        logits = position.logits.clone()[None]
        self._make([position.request]).apply(logits, [_row(0, position)])
        return logits[0]

    def _check(self, processor: LogitsProcessor, rng: random.Random, positions: Sequence[Position]) -> None:
        """Apply to these positions, at random rows of a batch whose other rows are poisoned."""
        num_rows = len(positions) + rng.randint(0, 4)
        places = rng.sample(range(num_rows), len(positions))
        logits = torch.full((num_rows, self.vocab_size), torch.nan)
        for place, position in zip(places, positions, strict=True):
            logits[place] = position.logits
        rows = [_row(place, position) for place, position in zip(places, positions, strict=True)]
        processor.apply(logits, shuffled(rows, rng))
        foreign = [row for row in range(num_rows) if row not in places]
        assert logits[foreign].isnan().all(), f"rows {foreign} were changed, the rows given were {sorted(places)}"
        for place, position in zip(places, positions, strict=True):
            expected, found = self._alone(position), logits[place]
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (
                f"row {place} (slot {position.request.slot}, prompt {position.request.prompt}, output "
                f"{position.output}) differs from the same row alone, at tokens "
                f"{(found != expected).nonzero().flatten().tolist()}; rows given: {[row[:2] for row in rows]}"
            )


def _row(place: int, position: Position) -> LogitsRow:
    output = np.array(position.output, dtype=np.int32)
    output.flags.writeable = False
    return LogitsRow(place, position.request.slot, output)
