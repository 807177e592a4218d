"""`CheckedWorker`: carries out step plans without a model, and checks each as a real worker would have to trust it.

In place of keys and values, every token's place in the cache holds a hash of the request's tokens up to it, which is
what real keys and values depend on. Before a row samples, everything its attention would read is compared with what
ought to be there. A block that is leaked to two owners, shared wrongly, overwritten too late, freed from a window too
early or published without having been computed therefore shows as a `PlanError` in the step that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from interlace.kv.specs import NULL_BLOCK, KVCacheConfig
from interlace.messages import Admission, BlockDelta, EngineRequest, StepPlan, StepResult

NextToken = Callable[[Sequence[int], Admission], int]
"""(all tokens so far, the request as the worker knows it) → next token."""
ContentRoot = Callable[[Admission], int]
"""What keys and values depend on besides tokens, as a number: requests that differ in it must never share a block."""

_GARBAGE = -1
"""In a cell: computed from a token that was never sampled, because the row failed. Nobody may read it."""


class PlanError(AssertionError):
    """A plan that a worker could not carry out, or would carry out with wrong results."""


class _Sequence:
    """What the worker keeps per slot."""

    __slots__ = ("admission", "failed", "hashes", "num_computed", "tables", "tokens")

    def __init__(self, admission: Admission, root: int, num_groups: int) -> None:
        self.admission = admission
        self.tokens: list[int] = []
        self.hashes: list[int] = [root]  # hashes[i + 1] stands for token i and all before it
        self.num_computed = admission.num_cached_tokens
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.failed = False
        for token in admission.token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.hashes.append(hash((self.hashes[-1], token)))


class CheckedWorker:
    """One rank. `apply` and `compute` together carry out one plan; plans come in the order of their steps."""

    def __init__(
        self,
        kv: KVCacheConfig,
        *,
        max_num_seqs: int,
        max_model_len: int,
        next_token: NextToken,
        content_root: ContentRoot | None = None,
    ) -> None:
        self._kv = kv
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._next_token = next_token
        self._content_root = content_root
        self._slots: dict[int, _Sequence] = {}
        self._uncertain: set[int] = set()  # slots named by plans that never ran
        self._cells: list[list[int | None]] = [[None] * kv.block_size for _ in range(kv.num_blocks)]
        self._group_of: list[int] = [-1] * kv.num_blocks  # whose layers wrote the block last
        self._step = -1

    @property
    def occupied(self) -> set[int]:
        """Slots that hold a request, as far as plans that ran have said."""
        return set(self._slots) - self._uncertain

    def skip(self, plan: StepPlan) -> None:
        """The plan will never run, because it or a step before it failed."""
        self._uncertain.update(plan.finished, plan.preempted, (admission.slot for admission in plan.admitted))

    def apply(self, plan: StepPlan) -> None:
        """Release, admit, and extend block tables. Raises `PlanError`."""
        self._step = plan.step_id
        for slot in (*plan.finished, *plan.preempted):
            if self._slots.pop(slot, None) is None and slot not in self._uncertain:
                self._refuse(f"slot {slot} is released, but nobody holds it")
            self._uncertain.discard(slot)
        for admission in plan.admitted:
            self._admit(admission)
        if len(plan.blocks) != len(self._kv.groups):
            self._refuse(f"{len(plan.blocks)} block deltas for {len(self._kv.groups)} KV groups")
        for group, delta in enumerate(plan.blocks):
            self._extend(group, delta)

    def compute(self, plan: StepPlan, row_errors: dict[int, str], duration: float = 0.0) -> StepResult:
        """Write, then read, then sample every row; rows of `row_errors` fail after their keys and values are computed.

        Raises `PlanError`."""
        if len(set(plan.slots)) != len(plan.slots):
            self._refuse(f"a slot has two rows: {plan.slots}")
        if not len(plan.slots) == len(plan.num_tokens) == len(plan.sample):
            self._refuse("the columns differ in length")
        rows = list(zip(plan.slots, plan.num_tokens, plan.sample, strict=True))
        writers: dict[int, int] = {}
        for slot, count, samples in rows:  # a layer stores all keys and values before it attends
            self._check_row(slot, count, samples)
            self._write(slot, count, writers)
        for slot, count, _ in rows:
            self._read(slot, count)
        counts, token_ids = [], []
        for row, (slot, count, samples) in enumerate(rows):
            sequence = self._slots[slot]
            sequence.num_computed += count
            sequence.failed = sequence.failed or row in row_errors
            counts.append(int(samples and not sequence.failed))
            if counts[-1]:
                token = choose(self._next_token, sequence.tokens, sequence.admission)
                sequence.append(token)
                token_ids.append(token)
        return StepResult(
            step_id=plan.step_id, counts=counts, token_ids=token_ids, duration=duration, errors=row_errors
        )

    # ── one rule each ─────────────────────────────────────────────────────────────────────────────────────────

    def _refuse(self, reason: str) -> NoReturn:
        raise PlanError(f"step {self._step}: {reason}")

    def _admit(self, admission: Admission) -> None:
        slot = admission.slot
        if not 0 <= slot < self._max_num_seqs:
            self._refuse(f"there is no slot {slot}")
        if slot in self._slots and slot not in self._uncertain:
            self._refuse(f"slot {slot} is given to a second request")
        if not 0 <= admission.num_cached_tokens < len(admission.token_ids):
            self._refuse(
                f"slot {slot} has {len(admission.token_ids)} tokens and {admission.num_cached_tokens} cached: "
                "the last one is always to be computed"
            )
        self._uncertain.discard(slot)
        root = self._content_root(admission) if self._content_root is not None else 0
        self._slots[slot] = _Sequence(admission, root, len(self._kv.groups))

    def _extend(self, group: int, delta: BlockDelta) -> None:
        start = 0
        for slot, count in zip(delta.slots, delta.counts, strict=True):
            if slot not in self._slots:
                self._refuse(f"blocks for slot {slot}, which nobody holds")
            blocks = delta.block_ids[start : start + count]
            if not all(0 <= block < self._kv.num_blocks for block in blocks):
                self._refuse(f"blocks {blocks} for slot {slot}: there are {self._kv.num_blocks}")
            self._slots[slot].tables[group] += blocks
            start += count
        if start != len(delta.block_ids):
            self._refuse(f"{len(delta.block_ids)} block ids for counts that add up to {start}")

    def _check_row(self, slot: int, count: int, samples: bool) -> None:
        sequence = self._slots.get(slot)
        if sequence is None:
            self._refuse(f"a row for slot {slot}, which nobody holds")
        if count < 1:
            self._refuse(f"slot {slot} has a row of {count} tokens")
        end = sequence.num_computed + count
        if end > self._max_model_len:
            self._refuse(f"slot {slot} reaches {end} tokens, max_model_len is {self._max_model_len}")
        for table in sequence.tables:
            if end > len(table) * self._kv.block_size:
                self._refuse(f"slot {slot} has {len(table)} blocks for {end} tokens")
        if sequence.failed:
            return
        if end > len(sequence.tokens):
            self._refuse(f"slot {slot} has {len(sequence.tokens)} tokens and shall compute {end}")
        if samples != (end == len(sequence.tokens)):
            self._refuse(f"slot {slot} shall {'' if samples else 'not '}sample at {end} of {len(sequence.tokens)}")

    def _write(self, slot: int, count: int, writers: dict[int, int]) -> None:
        sequence, size = self._slots[slot], self._kv.block_size
        start, end = sequence.num_computed, sequence.num_computed + count
        for group, table in enumerate(sequence.tables):
            for index in range(start // size, -(-end // size)):
                block = table[index]
                if block == NULL_BLOCK:
                    self._refuse(f"slot {slot} writes position {index * size} into the null block")
                if writers.setdefault(block, slot) != slot:
                    self._refuse(f"slots {writers[block]} and {slot} both write block {block}")
                if self._group_of[block] != group:
                    self._group_of[block] = group
                    self._cells[block] = [None] * size
                low, high = max(start, index * size), min(end, (index + 1) * size)
                content: list[int | None] = [*sequence.hashes[low + 1 : high + 1]]
                content += [_GARBAGE] * (high - low - len(content))  # follows a sample that failed
                self._cells[block][low - index * size : high - index * size] = content

    def _read(self, slot: int, count: int) -> None:
        sequence, size = self._slots[slot], self._kv.block_size
        if sequence.failed:
            return
        start, end = sequence.num_computed, sequence.num_computed + count
        for group, table in enumerate(sequence.tables):
            window = self._kv.groups[group].window
            first = max(0, start - window + 1) if window else 0
            for index in range(first // size, -(-end // size)):
                block = table[index]
                low, high = max(first, index * size), min(end, (index + 1) * size)
                held = self._cells[block][low - index * size : high - index * size]
                if block == NULL_BLOCK or self._group_of[block] != group or held != sequence.hashes[low + 1 : high + 1]:
                    self._refuse(
                        f"slot {slot} reads positions {low} to {high - 1} from block {block} (KV group {group}), "
                        "which does not hold them"
                    )


def choose(next_token: NextToken, tokens: Sequence[int], admission: Admission) -> int:
    """The next token, with stop tokens masked until `min_tokens` have been generated, as a sampler does."""
    token = next_token(tokens, admission)
    if len(tokens) - admission.num_prompt_tokens < admission.params.min_tokens:
        while token in admission.stop_token_ids:
            token += 1
    return token


def generate_alone(request: EngineRequest, next_token: NextToken, max_model_len: int) -> tuple[list[int], str]:
    """The output of a request that nothing disturbs, and its finish reason: what any schedule must come to."""
    params = request.params
    room = max_model_len - len(request.prompt_token_ids)
    most = room if params.max_tokens is None else min(params.max_tokens, room)
    stops = (*(() if params.ignore_eos else request.eos_token_ids), *(params.stop_token_ids or ()))
    tokens = list(request.prompt_token_ids)
    admission = Admission(0, 0, tokens, len(tokens), 0, params, request.seed, request.sample_index, stops)
    output: list[int] = []
    while len(output) < most:
        output.append(choose(next_token, tokens + output, admission))
        if output[-1] in stops and len(output) >= params.min_tokens:
            return output, "stop"
    return output, "length"
