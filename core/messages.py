"""READ FIRST: the plain types that cross a border of the engine.

    front ── EngineRequest ──► engine core ── StepPlan ──► executor / worker
    front ◄── StepOutput ───── engine core ◄── StepResult ── executor / worker
    user  ◄── RequestOutput ── front

No torch, no behaviour beyond validation. Everything is a `msgspec.Struct`, so each type travels between processes
as msgpack without pickle. Per step there is one object, in columns; there is none per token.
"""

from __future__ import annotations

import msgspec

from interlace.sampling.params import SamplingParams

__all__ = [
    "Admission",
    "BlockDelta",
    "CompletionOutput",
    "EngineRequest",
    "FinishInfo",
    "KVBlockTimes",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestSummary",
    "SampledTokens",
    "SamplingParams",
    "StepOutput",
    "StepPlan",
    "StepResult",
    "StepStats",
    "TokenLogprobs",
    "Usage",
]

Attachments = dict[str, bytes]
"""Feature data keyed by plugin name and encoded by its owner: the one deliberate looseness of the messages."""


class EngineRequest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One sequence to generate, as the front hands it to the engine core.

    A user request with `n > 1` is `n` of these sharing `group`: the siblings share prompt blocks without copying.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    """`Clock.now()` at the front."""
    seed: int
    """Never None here: the front draws one when the user gave none."""
    sample_index: int = 0
    """Which of the `n` samples this is; a key of the random generator, so that siblings differ."""
    group: str | None = None
    priority: int = 0
    """Lower runs earlier under priority-aware policies."""
    deadline: float | None = None
    """`Clock.now()` after which the request ends with error code `deadline`."""
    cache_salt: str | None = None
    adapter: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    labels: dict[str, str] = {}
    """Free words for policies (tenant, class of service, …); the core does not read them."""
    task: str = "generate"
    blocked_on: tuple[str, ...] = ()
    """Open names (`grammar`, `remote_kv`, `sibling`) that must be lifted before the request may be planned."""


# ── engine core ► worker ────────────────────────────────────────────────────────────────────────────────────────


class Admission(msgspec.Struct, frozen=True, gc=False):
    """A request takes a slot: first admission, or again after preemption (then the tokens include its output)."""

    slot: int
    generation: int
    """Grows each time a request takes a slot; a result of an older generation is dropped."""
    token_ids: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int
    """Leading tokens whose KV is already in the cache; computation starts after them."""
    params: SamplingParams
    seed: int
    sample_index: int
    stop_token_ids: tuple[int, ...]
    """Tokens that end the request: masked by the sampler until `min_tokens` have been generated."""


class BlockDelta(msgspec.Struct, frozen=True, gc=False):
    """New entries of block tables for one KV group: `counts[i]` ids of `block_ids` are appended for `slots[i]`."""

    slots: list[int]
    counts: list[int]
    block_ids: list[int]


class StepPlan(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One step of work, in columns. Workers keep the persistent batch, so a decode-only plan is small.

    Order of effect on a worker: release `finished` and `preempted` slots, take `admitted`, append `blocks`, then
    compute row `i`: the next `num_tokens[i]` tokens of slot `slots[i]` (of which the last `num_drafts[i]` are
    drafts), and sample after them where `sample[i]`. A plan without rows is legal and returns an empty result.
    """

    step_id: int
    slots: list[int]
    num_tokens: list[int]
    sample: list[bool]
    num_drafts: list[int] = []
    """Empty: no drafts in this step."""
    blocks: list[BlockDelta] = []
    """One entry per KV group."""
    admitted: list[Admission] = []
    finished: list[int] = []
    preempted: list[int] = []
    attachments: Attachments = {}


class SampledTokens(msgspec.Struct, frozen=True, gc=False):
    """What a step sampled, for ranks that do not sample; travels with a later plan. `token_ids[i]` is the next token of
    slot `slots[i]`; a slot stands there once per token."""

    step_id: int
    """The step that sampled them: they are not for a request that took its slot in a later one."""
    slots: list[int]
    token_ids: list[int]


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Log probabilities at one position: entry 0 is the chosen token, then the most likely ones in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the chosen token, 1 = most likely."""


class StepResult(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a step gave, in the row order of its plan.

    `counts[i]` ids of `token_ids` belong to row `i`: 0 where nothing was sampled, more than 1 with speculation.
    """

    step_id: int
    counts: list[int]
    token_ids: list[int]
    duration: float
    """Seconds the executor spent; simulated executors state a modelled one."""
    logprobs: dict[int, list[TokenLogprobs]] = {}
    """Row → one entry per sampled token, for rows that asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    """Row → one entry per prompt position predicted in this step (position p+1 from token p)."""
    errors: dict[int, str] = {}
    """Row → why only this request failed. What it computed into the KV cache is sound: others may share it."""
    plugin_seconds: dict[str, float] = {}
    """`kind:name` → seconds the step spent in each logits processor."""
    attachments: Attachments = {}


# ── engine core ► front ─────────────────────────────────────────────────────────────────────────────────────────


class FinishInfo(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Why and when a request ended, with the times (`Clock.now()`) of its life."""

    reason: str
    """stop | length | abort | error"""
    stop_reason: int | str | None = None
    """The stop token id or stop string, where one ended the request; None for end-of-sequence."""
    error: str | None = None
    error_code: str | None = None
    num_preemptions: int = 0


class KVBlockTimes(msgspec.Struct, frozen=True, gc=False):
    """Seconds in the lives of a sample of the KV blocks (`interlace.kv.block_lives`). A block is used when it is taken,
    and whenever a prefix hit finds it."""

    lifetimes: list[float]
    """From being taken to the loss of its content to another request (eviction)."""
    idle_before_evict: list[float]
    """From its last use to eviction, in the same order."""
    reuse_gaps: list[float]
    """Between one use and the next, a prefix hit."""


class StepStats(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The engine core seen from outside after one step; what `on_step` subscribers and metrics read."""

    step_id: int
    now: float
    duration: float
    """Seconds the executor spent on the step."""
    num_running: int
    num_waiting: int
    """Requests without a seat, blocked ones included."""
    num_scheduled_requests: int
    num_scheduled_tokens: int
    num_prefill_tokens: int
    num_sampled_tokens: int
    num_preemptions: int
    """Preemptions in this step."""
    kv_usage: float
    """Share of KV blocks in use, 0 to 1."""
    prefix_queries: int
    """Prompt tokens of first admissions since the engine started. Like the count below it starts again from 0 when
    the engine process is restarted."""
    prefix_hits: int
    """Tokens of those found in the prefix cache."""
    num_blocked: int = 0
    """Requests that wait for something other than room (`EngineRequest.blocked_on`)."""
    num_failed_requests: int = 0
    """Requests for which this step could not choose a token (NaN in the logits, everything excluded)."""
    kv_block_times: KVBlockTimes | None = None
    """What ended with the plans since the stats before these; None: nothing did."""
    engine: int = 0
    """Which replica it is about; 0 where there is one engine."""
    degraded: str | None = None
    """Why health is degraded (a policy that keeps failing or starves requests), or None."""
    plugin_seconds: dict[str, float] = {}
    """`kind:name` → seconds spent in each selected plugin since the stats before these: in the scheduler's methods
    (what its `plan` has the core do included), in logits processors, in the router (for all replicas), and, under
    `events:package:entry_point`, in every `on_step` subscriber, its call with the stats before these included."""


class StepOutput(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The same step for the front: `counts[i]` ids of `token_ids` are new for request `request_ids[i]`."""

    step_id: int
    now: float
    request_ids: list[str]
    counts: list[int]
    token_ids: list[int]
    finished: dict[str, FinishInfo] = {}
    first_scheduled: dict[str, float] = {}
    """Requests planned for the first time in this step, with the time of planning."""
    cached_tokens: dict[str, int] = {}
    """Prefix-cache hits in tokens, stated once per request at its first admission."""
    logprobs: dict[str, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
    stats: StepStats | None = None
    engine: int = 0
    """Which replica made the step; 0 where there is one engine."""


class RequestSummary(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One finished request, for `on_request_finished` subscribers."""

    request_id: str
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    metrics: RequestMetrics
    labels: dict[str, str] = {}
    error_code: str | None = None
    """With `finish_reason` "error": `deadline`, `kv_capacity`, `step_failed`, `rejected`, `engine_dead`, …"""
    finish_reasons: tuple[str, ...] = ()
    """Of each of its `n` samples; `finish_reason` is the worst."""
    sample_lengths: tuple[int, ...] = ()
    """Output tokens of each sample; `num_output_tokens` is their sum."""
    max_tokens: int = 0
    """Most output tokens of each sample: as asked for, or as many as fit."""
    priority: int = 0

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first, of the longest sample; None for fewer than two tokens."""
        decode, longest = self.metrics.decode_time, max(self.sample_lengths, default=0)
        return None if decode is None or longest < 2 else decode / (longest - 1)


# ── front ► user ────────────────────────────────────────────────────────────────────────────────────────────────


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """Log probability of one token at one position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct, gc=False, kw_only=True):
    """One of the `n` answers to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """None while running; then stop | length | abort | error."""
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class Usage(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Token counts of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class RequestMetrics(msgspec.Struct, gc=False, kw_only=True):
    """Times of one request in `Clock.now()` seconds; None where not reached."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to first output token, seconds."""
        return _span(self.arrival_time, self.first_token_time)

    @property
    def queue_time(self) -> float | None:
        """Arrival to the first step that computes anything of it, seconds."""
        return _span(self.arrival_time, self.first_scheduled_time)

    @property
    def prefill_time(self) -> float | None:
        """First step to first output token, seconds."""
        return _span(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_time(self) -> float | None:
        """First to last output token, seconds."""
        return _span(self.first_token_time, self.last_token_time)

    @property
    def inference_time(self) -> float | None:
        """First step to last output token, seconds."""
        return _span(self.first_scheduled_time, self.last_token_time)

    @property
    def e2e_latency(self) -> float | None:
        """Arrival to finish, seconds."""
        return _span(self.arrival_time, self.finished_time)


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


class RequestOutput(msgspec.Struct, gc=False, kw_only=True):
    """What the user gets. `LLM` returns whole outputs; `AsyncLLM` yields deltas (text and ids since the last one)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage
    metrics: RequestMetrics
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry per prompt token; the first is None (nothing predicts it)."""

    @property
    def error(self) -> str | None:
        """The first error among the outputs, or None."""
        return next((output.error for output in self.outputs if output.error), None)
