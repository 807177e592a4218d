"""`Sampler`: chooses the next token of every row of a batch, doing only the work that the batch asks for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from interlace.errors import InvalidRequestError
from interlace.interfaces.kernels import Peaks
from interlace.interfaces.logits_processor import LogitsProcessor, LogitsRow
from interlace.messages import Admission, TokenLogprobs
from interlace.sampling.argmax import argmax
from interlace.sampling.distribution import Shape, draw_rows, take_rows
from interlace.sampling.logprobs import prompt_logprobs, select_logprobs
from interlace.sampling.random import uniform
from interlace.sampling.slots import Histories, SlotSampling, edit_logits
from interlace.sampling.validation import validate_processor_args, validate_token_ids

_log = logging.getLogger(__name__)

NOT_A_NUMBER = "the logits contain NaN or +inf: the model or a logits processor computed invalid numbers"
_NOTHING_LEFT = (
    "no token is left to choose from: allowed_token_ids, bad_words, min_tokens and logits processors together "
    "exclude the whole vocabulary"
)
Argmax = Callable[[torch.Tensor], Peaks]
"""`Kernels.argmax`."""
Draw = Callable[[torch.Tensor, list[int], Sequence[Shape], npt.NDArray[np.float64]], npt.NDArray[np.int64]]
"""`Kernels.draw`."""


class SampledRows(NamedTuple):
    """What `Sampler.sample` gave, by row."""

    token_ids: list[int]
    """One per row; -1 where the row failed."""
    logprobs: dict[int, TokenLogprobs]
    """Rows whose request asked for them."""
    errors: dict[int, str]
    """Row → why its request cannot go on. The other rows are unharmed."""


class Sampler:
    """Sampling state of the persistent batch and the sampling of its rows. One per sampling worker, one thread.

    A row's token is a function of that row's logits, its request's parameters, seed and sample index, and its own
    tokens: never of its slot or of the other rows.
    """

    def __init__(
        self,
        vocab_size: int,
        processors: Mapping[str, LogitsProcessor],
        timer: Callable[[], float] = float,
        argmax: Argmax = argmax,
        draw: Draw = draw_rows,
    ) -> None:
        """`vocab_size` is the width of the logits; `processors` are applied in their order here. `timer` gives seconds
        for the account of what they cost, by default always 0."""
        self.vocab_size = vocab_size
        self._processors = dict(processors)
        self._timer = timer
        self._argmax = argmax
        self._draw_rows = draw
        self._seconds: dict[str, float] = {}
        self._slots: dict[int, SlotSampling] = {}
        # Slots that need more than an argmax, kept up to date by `add` and `remove`, so that a step asks once per
        # feature whether it is used at all.
        self._random: set[int] = set()
        self._edited: set[int] = set()
        self._reporting: set[int] = set()
        self._processed: dict[str, set[int]] = {name: set() for name in processors}
        self._refused: dict[int, str] = {}
        self._on_host: set[int] = set()

    def add(self, slot: int, admission: Admission) -> None:
        """A request took `slot`. Never raises for what a request or a processor does: its rows then fail."""
        params = admission.params
        self.remove(slot)
        try:
            validate_token_ids(params, self.vocab_size)
            arguments = validate_processor_args({name: type(p) for name, p in self._processors.items()}, params)
        except InvalidRequestError as error:
            self._refused[slot] = str(error)
            arguments = {}
        state = self._slots[slot] = SlotSampling.from_admission(admission, self.vocab_size)
        if slot in self._refused or arguments or state.edits:
            self._on_host.add(slot)
        if slot in self._refused:
            return
        if not params.greedy:
            self._random.add(slot)
        if state.edits:
            self._edited.add(slot)
        if params.logprobs is not None:
            self._reporting.add(slot)
        prompt = admission.token_ids[: admission.num_prompt_tokens]
        for name, args in arguments.items():
            began = self._timer()
            try:
                self._processors[name].add(slot, args, prompt)
                self._processed[name].add(slot)
            except Exception as error:
                self._refused[slot] = _report(name, "add", error)
            self._account(name, began)

    def remove(self, slot: int) -> None:
        """The request in `slot` left it. Nothing happens when the slot is empty."""
        if self._slots.pop(slot, None) is None:
            return
        self._random.discard(slot)
        self._edited.discard(slot)
        self._reporting.discard(slot)
        self._on_host.discard(slot)
        self._refused.pop(slot, None)
        for name, slots in self._processed.items():
            if slot in slots:
                slots.remove(slot)
                try:
                    self._processors[name].remove(slot)
                except Exception as error:
                    _report(name, "remove", error)

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], histories: Histories, peaks: Peaks | None = None
    ) -> SampledRows:
        """Choose one token per row.

        Args:
            logits: [rows, vocab] float32 of the model; overwritten.
            slots: the slot of each row. A slot may have several rows (draft positions).
            histories: `histories[row]` gives all tokens before the one to choose, prompt first, as an int32 array;
                their number decides the output position. Asked only for rows that are random or look back, so that
                views made on demand cost a greedy batch nothing. Not changed, and not kept.
            peaks: the argmax of `logits`, where it is known; overwritten.
        """
        errors = self._rows_of_refused(slots)
        reporting = _rows_in(self._reporting, slots)
        raw = torch.log_softmax(take_rows(logits, reporting), dim=1) if reporting else None
        if self._edited:
            edit_logits(logits, [(row, self._slots[slots[row]]) for row in _rows_in(self._edited, slots)], histories)
        self._apply_processors(logits, slots, histories, errors)
        if peaks is None or self._edited or any(self._processed.values()):
            peaks = self._argmax(logits)
        token_ids, values = peaks
        _note_unsound(values, errors)
        rows = [row for row in _rows_in(self._random, slots) if row not in errors]
        if rows:
            self._draw(logits, rows, slots, histories, token_ids, errors)
        chosen = _sound(token_ids, errors)
        return SampledRows(chosen, {} if raw is None else self._logprobs(raw, reporting, slots, chosen), errors)

    @property
    def is_greedy(self) -> bool:
        """Whether the requests at hand need nothing of their logits but the argmax: `choose` then does for `sample`."""
        return not (self._random or self._edited or self._reporting or any(self._processed.values()))

    def choose(self, peaks: Peaks, slots: Sequence[int]) -> SampledRows:
        """`sample` of greedy requests, given the argmax of their logits; overwritten."""
        token_ids, values = peaks
        errors = self._rows_of_refused(slots)
        _note_unsound(values, errors)
        return SampledRows(_sound(token_ids, errors), {}, errors)

    def rows_on_host(self, slots: Sequence[int]) -> list[int]:
        """Rows that need this sampler: they ask for more than `Kernels.sample` and `Kernels.logprobs` do."""
        return _rows_in(self._on_host, slots)

    def take_plugin_seconds(self) -> dict[str, float]:
        """`logits_processors:name` → seconds spent in its `add` and `apply` since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def prompt_logprobs(self, slot: int, logits: torch.Tensor, next_token_ids: Sequence[int]) -> list[TokenLogprobs]:
        """Log probabilities of prompt tokens, as many as the request in `slot` asked for.

        Args:
            logits: [positions, vocab] float32, raw; not changed.
            next_token_ids: the prompt token that follows each position.
        """
        return prompt_logprobs(logits, next_token_ids, self._slots[slot].params.prompt_logprobs or 0)

    def _rows_of_refused(self, slots: Sequence[int]) -> dict[int, str]:
        return {row: self._refused[slots[row]] for row in _rows_in(self._refused, slots)}

    def _apply_processors(
        self, logits: torch.Tensor, slots: Sequence[int], histories: Histories, errors: dict[int, str]
    ) -> None:
        """Custom processors; one that raises fails the rows it was given."""
        for name, processor in self._processors.items():
            rows = [row for row in _rows_in(self._processed[name], slots) if row not in errors]
            if not rows:
                continue
            views = [LogitsRow(row, slots[row], self._output(row, slots[row], histories)) for row in rows]
            began = self._timer()
            try:
                processor.apply(logits, views)
            except Exception as error:
                errors.update(dict.fromkeys(rows, _report(name, "apply", error)))
            self._account(name, began)

    def _account(self, name: str, began: float) -> None:
        account = f"logits_processors:{name}"
        self._seconds[account] = self._seconds.get(account, 0.0) + self._timer() - began

    def _output(self, row: int, slot: int, histories: Histories) -> npt.NDArray[np.int32]:
        """The row's output tokens, as a view through which a processor cannot change them."""
        output = histories[row][self._slots[slot].num_prompt_tokens :].view()
        output.flags.writeable = False
        return output

    def _draw(
        self,
        logits: torch.Tensor,
        rows: list[int],
        slots: Sequence[int],
        histories: Histories,
        token_ids: npt.NDArray[np.int64],
        errors: dict[int, str],
    ) -> None:
        """Draw the tokens of `rows` into `token_ids`."""
        states = [self._slots[slots[row]] for row in rows]
        numbers = uniform(
            [state.seed for state in states],
            [state.sample_index for state in states],
            [len(histories[row]) - state.num_prompt_tokens for row, state in zip(rows, states, strict=True)],
        )
        drawn = self._draw_rows(logits, rows, [state.shape for state in states], numbers)
        token_ids[rows] = drawn
        for index in np.flatnonzero(drawn < 0).tolist():
            errors[rows[index]] = NOT_A_NUMBER

    def _logprobs(
        self, raw: torch.Tensor, rows: Sequence[int], slots: Sequence[int], chosen: Sequence[int]
    ) -> dict[int, TokenLogprobs]:
        counts = [self._slots[slots[row]].params.logprobs or 0 for row in rows]
        # a failed row has no token; it is computed along and left out
        entries = select_logprobs(raw, [max(chosen[row], 0) for row in rows], counts)
        return {row: entry for row, entry in zip(rows, entries, strict=True) if chosen[row] >= 0}


def _rows_in(chosen: set[int] | dict[int, str], slots: Sequence[int]) -> list[int]:
    """Rows whose slot is one of `chosen`."""
    return [row for row, slot in enumerate(slots) if slot in chosen] if chosen else []


def _note_unsound(values: npt.NDArray[np.float32], errors: dict[int, str]) -> None:
    """Rows whose largest logit is no finite number, unless they have failed already."""
    if not np.isfinite(values).all():
        for row in np.flatnonzero(~np.isfinite(values)).tolist():
            errors.setdefault(row, _NOTHING_LEFT if values[row] == -math.inf else NOT_A_NUMBER)


def _sound(token_ids: npt.NDArray[np.int64], errors: Mapping[int, str]) -> list[int]:
    """-1 in failed rows."""
    for row in errors:
        token_ids[row] = -1
    chosen: list[int] = token_ids.tolist()
    return chosen


def _report(name: str, action: str, error: Exception) -> str:
    """Log a processor's failure with its traceback; returns the text for the requests it concerns."""
    message = f"logits processor '{name}' failed in {action}: {type(error).__name__}: {error}"
    _log.error(message, exc_info=error)
    return message
