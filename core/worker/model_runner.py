"""`ModelRunner`: turns a `StepPlan` into a `StepResult` on one device.

`forward` and `sample` are apart; between them only the rows that sample are given logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from interlace.interfaces.attention import AttentionBackend
from interlace.interfaces.kernels import Peaks, StepProgram
from interlace.interfaces.model import ForwardContext, LayerCache, Model, Parallel
from interlace.messages import SampledTokens, StepPlan, StepResult, TokenLogprobs
from interlace.sampling.sampler import Sampler
from interlace.worker.batch import ForwardBatch
from interlace.worker.persistent_batch import PersistentBatch

PROMPT_LOGPROBS_ROWS = 256
"""Prompt positions turned into logits at a time, which bounds memory at large vocabularies."""


class ModelRunner:
    """Runs steps in order. Used from one thread."""

    def __init__(
        self,
        model: Model,
        layers: Mapping[int, LayerCache],
        backends: Sequence[AttentionBackend],
        batch: PersistentBatch,
        sampler: Sampler | None,
        now: Callable[[], float],
        program: StepProgram | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        """`layers`: attention layer of this stage → where its data lies; `backends`: one per KV group. `sampler`: None
        on ranks that do not sample. `program`: the model's step as one call, where the kernels could make one; else
        it runs op by op."""
        self._model = model
        self._layers = layers
        self._backends = backends
        self._batch = batch
        self._sampler = sampler
        self._now = now
        self._program = program
        self._has_head = (parallel or Parallel()).is_last_stage
        self._prompt_logprobs: set[int] = set()  # slots that asked

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sampled: Sequence[SampledTokens] = ()) -> StepResult:
        """Run one step. An exception means that the whole step failed; errors of single rows are in the result.

        `sampled`: tokens of earlier steps, for ranks that do not sample; the results of such ranks are empty."""
        started = self._now()
        if self._sampler is None:
            for tokens in sampled:
                self._batch.hear(tokens)
        self._apply(plan)
        if not plan.slots:
            return self._empty(plan, started)
        batch = self._batch.build(plan)
        rows = _sampling_rows(plan) if self._has_head else ()
        hidden, logits = self.forward(batch, _outputs_of(batch, rows))
        prompt_logprobs = self._compute_prompt_logprobs(plan, batch, hidden) if self._prompt_logprobs else {}
        self._batch.advance(plan)
        if self._sampler is None:
            return self._empty(plan, started)
        errors: dict[int, str] = {}
        counts, token_ids, logprobs = self.sample(plan, rows, logits, errors)
        return StepResult(
            step_id=plan.step_id,
            counts=counts,
            token_ids=token_ids,
            duration=self._now() - started,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            plugin_seconds=self._sampler.take_plugin_seconds(),
        )

    def _empty(self, plan: StepPlan, started: float) -> StepResult:
        return StepResult(step_id=plan.step_id, counts=[], token_ids=[], duration=self._now() - started)

    @torch.inference_mode()
    def profile(self, plan: StepPlan) -> dict[str, float]:
        """Run one step; seconds by part of it. For benchmarks: a program's ops are run one by one, so their sum is
        more than the step would take in one call."""
        marks = [self._now()]
        self._apply(plan)
        batch = self._batch.build(plan)
        rows = _sampling_rows(plan)
        outputs = _outputs_of(batch, rows)
        marks.append(self._now())
        _, logits = self.forward(batch, outputs)
        marks.append(self._now())
        ops = self._program.profile(batch, outputs) if self._program else {}
        self._batch.advance(plan)
        marks.append(self._now())
        self.sample(plan, rows, logits, {})
        parts = {"batch": marks[1] - marks[0], "model": marks[2] - marks[1], "sampling": self._now() - marks[3]}
        return parts | {f"model: {name}": seconds for name, seconds in ops.items()}

    def _apply(self, plan: StepPlan) -> None:
        """Take in what changed since the last step."""
        for slot in (*plan.finished, *plan.preempted):
            if self._sampler is not None:
                self._sampler.remove(slot)
            self._prompt_logprobs.discard(slot)
        for admission in plan.admitted:
            self._batch.admit(admission, plan.step_id)
            if self._sampler is not None:
                self._sampler.add(admission.slot, admission)
            if admission.params.prompt_logprobs is None or not self._has_head:
                self._prompt_logprobs.discard(admission.slot)  # a plan that failed may have carried its release
            else:
                self._prompt_logprobs.add(admission.slot)
        self._batch.append_blocks(plan)

    def forward(self, batch: ForwardBatch, outputs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | Peaks]:
        """Hidden states [tokens, hidden] of the flattened batch; logits [outputs, vocab] of its places `outputs`, or
        their argmax where that is all that the requests at hand need and it is quicker to have. Before the last
        pipeline stage there is nothing of either: the next stage has them."""
        if self._program is not None:
            greedy = self._program.run_greedy(batch, outputs) if self._sampler and self._sampler.is_greedy else None
            return greedy or self._program.run(batch, outputs)
        metadata: list[Any] = [backend.prepare(batch, group) for group, backend in enumerate(self._backends)]
        hidden = self._model.forward(batch.token_ids, batch.positions, ForwardContext(self._layers, metadata)).hidden
        if not outputs:  # prefill chunks that are not their prompts' last
            return hidden, hidden.new_empty(0)
        if len(outputs) == batch.num_tokens:  # a pure decode step needs no gather
            return hidden, self._model.logits(hidden)
        return hidden, self._model.logits(hidden[torch.tensor(outputs, dtype=torch.int64, device=hidden.device)])

    def sample(
        self, plan: StepPlan, rows: Sequence[int], logits: torch.Tensor | Peaks, errors: dict[int, str]
    ) -> tuple[list[int], list[int], dict[int, list[TokenLogprobs]]]:
        """Sample for `rows` of the plan, given what the last `forward` gave of them; fills `errors` for rows that
        cannot be.

        Returns (tokens per row of the plan, token ids, logprobs by row)."""
        if not rows:
            return [0] * len(plan.slots), [], {}
        slots = plan.slots if len(rows) == len(plan.slots) else [plan.slots[row] for row in rows]
        assert self._sampler is not None
        if isinstance(logits, torch.Tensor):
            peaks = self._program.peaks() if self._program is not None else None
            sampled = self._sampler.sample(logits, slots, self._batch.histories(slots), peaks)
        else:
            sampled = self._sampler.choose(logits, slots)
        token_ids = sampled.token_ids
        if sampled.errors:
            for index, message in sampled.errors.items():
                errors[rows[index]] = message
            sound = [index for index in range(len(rows)) if index not in sampled.errors]
            slots, token_ids = [slots[index] for index in sound], [token_ids[index] for index in sound]
        self._batch.append_tokens(slots, token_ids)
        logprobs = {rows[index]: [entry] for index, entry in sampled.logprobs.items()}
        if len(slots) == len(plan.slots):
            return [1] * len(slots), token_ids, logprobs
        counts = [0] * len(plan.slots)
        for row in rows:
            counts[row] = 0 if row in errors else 1
        return counts, token_ids, logprobs

    def _compute_prompt_logprobs(
        self, plan: StepPlan, batch: ForwardBatch, hidden: torch.Tensor
    ) -> dict[int, list[TokenLogprobs]]:
        """For rows that asked: log probability of each prompt token that a token of this step predicts. All ranks that
        hold a part of the head make the logits together; only the one that samples has a use for them."""
        found: dict[int, list[TokenLogprobs]] = {}
        for row, slot in enumerate(plan.slots):
            if slot not in self._prompt_logprobs:
                continue
            start = batch.context_lens[row]
            end = min(batch.seq_lens[row], int(self._batch.num_prompt_tokens[slot]) - 1)
            targets = self._batch.token_ids[slot, start + 1 : end + 1]
            states = hidden[batch.query_start[row] :][: max(0, end - start)]
            for first in range(0, len(states), PROMPT_LOGPROBS_ROWS):
                part = slice(first, first + PROMPT_LOGPROBS_ROWS)
                logits = self._model.logits(states[part])
                if self._sampler is not None:
                    entries = self._sampler.prompt_logprobs(slot, logits, targets[part].tolist())
                    found.setdefault(row, []).extend(entries)
        return found


def _sampling_rows(plan: StepPlan) -> Sequence[int]:
    return range(len(plan.sample)) if all(plan.sample) else [row for row, wanted in enumerate(plan.sample) if wanted]


def _outputs_of(batch: ForwardBatch, rows: Sequence[int]) -> Sequence[int]:
    """The place of each row's last token."""
    if len(rows) == batch.num_tokens:  # a row is a token
        return rows
    ends = batch.query_start
    return [ends[row + 1] - 1 for row in rows]
