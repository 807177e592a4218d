"""The checks of the random histories are themselves tested: each fault below, put into the engine, is caught."""

import logging

import msgspec
import pytest

from interlace.engine.core import EngineCore
from interlace.kv.block_pool import BlockPool
from interlace.kv.manager import KVManager
from interlace.messages import StepPlan
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.scheduling.queues import Queues
from interlace.scheduling.step_builder import StepBuilder
from interlace.testing.histories import run_history

SEEDS = range(40)
"""A fault must show within this many histories."""


def find_fault(caught=AssertionError) -> str:
    """The first complaint about the engine as it is patched now; fails when there is none."""
    logging.disable(logging.CRITICAL)
    try:
        for seed in SEEDS:
            try:
                run_history(seed, lambda random: Fcfs(Fcfs.Options()))
            except caught as error:
                return str(error)
    finally:
        logging.disable(logging.NOTSET)
    return pytest.fail("no history noticed the fault")


def wrap(monkeypatch, owner, name, change):
    """Replace a method by `change(original, *arguments)`."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **more: change(original, *arguments, **more))


def test_the_engine_as_it_is_passes():
    for seed in SEEDS:
        run_history(seed, lambda random: Fcfs(Fcfs.Options()))


def test_a_leaked_block(monkeypatch):
    def leak(original, pool, blocks):
        return original(pool, [block for block in blocks if block != 5])

    wrap(monkeypatch, BlockPool, "release", leak)
    assert "leaked" in find_fault()


def test_a_block_released_twice(monkeypatch):
    def twice(original, kv, request):
        tables = [list(table) for table in request.blocks]
        freed = original(kv, request)
        if request.num_known % 7 == 0 and any(tables):
            kv.pool.release(next(table for table in tables if table))
        return freed

    wrap(monkeypatch, KVManager, "free", twice)
    find_fault((AssertionError, ValueError))


def test_a_block_given_to_two_requests(monkeypatch):
    def share(original, pool, count):
        blocks = original(pool, count)
        return [6 if block == 7 else block for block in blocks]

    wrap(monkeypatch, BlockPool, "allocate", share)
    find_fault()


def test_a_wrong_block_in_a_table_that_the_worker_gets(monkeypatch):
    def misprint(original, core, step):
        deltas = original(core, step)
        if core._next_step_id == 9 and deltas and deltas[0].block_ids:
            deltas[0].block_ids[-1] = 1 + deltas[0].block_ids[-1] % (core.kv.pool.num_usable - 1)
        return deltas

    wrap(monkeypatch, EngineCore, "_block_deltas", misprint)
    complaint = find_fault()
    assert "does not hold them" in complaint or "both write" in complaint


def test_a_request_scheduled_twice(monkeypatch):
    def repeat(original, core, step, now):
        plan = original(core, step, now)
        if plan.step_id == 12:
            rows = ("slots", "num_tokens", "sample")
            return StepPlan(
                step_id=12,
                blocks=plan.blocks,
                admitted=plan.admitted,
                finished=plan.finished,
                preempted=plan.preempted,
                **{name: getattr(plan, name) * 2 for name in rows},
            )
        return plan

    wrap(monkeypatch, EngineCore, "_seal", repeat)
    assert "scheduled twice" in find_fault()


def test_a_row_with_fewer_tokens_than_were_counted(monkeypatch):
    def shorten(original, self, state, chunk):
        original(self, state, chunk)
        if state.num_known % 5 == 0:
            self.rows[state] = 1

    wrap(monkeypatch, StepBuilder, "_place", shorten)
    find_fault()


def test_a_lost_abort(monkeypatch):
    def lose(original, queues, request):
        original(queues, request)
        if request.num_known % 3 == 0:
            queues.released.clear()

    wrap(monkeypatch, Queues, "finish", lose)
    find_fault()


def test_an_abort_that_forgets_the_front(monkeypatch):
    def forget(original, core, request_ids, now):
        for request_id in request_ids:
            state = core.queues.requests.get(request_id)
            if state is not None:
                core.kv.free(state)
                core.queues.finish(state)

    wrap(monkeypatch, EngineCore, "abort", forget)
    assert "gone without an end" in find_fault()


def test_an_abort_that_keeps_the_request(monkeypatch):
    wrap(monkeypatch, Queues, "finish", lambda original, queues, request: queues.requests.pop(request.id))
    assert "lost, or in two queues" in find_fault()


def test_a_stale_result_that_is_taken_for_new(monkeypatch):
    def same_generation(original, queues, request):
        slot = original(queues, request)
        request.generation -= 1
        return slot

    wrap(monkeypatch, Queues, "_leave", same_generation)
    find_fault((AssertionError, KeyError, ValueError))


def test_a_prefix_published_before_it_is_known(monkeypatch):
    def eager(original, kv, request):
        request.num_planned += kv.block_size
        try:
            return original(kv, request)
        finally:
            request.num_planned -= kv.block_size

    wrap(monkeypatch, KVManager, "publish", eager)
    find_fault((AssertionError, IndexError))


def test_a_failed_step_that_leaves_its_prefixes_published(monkeypatch):
    wrap(monkeypatch, KVManager, "withdraw", lambda original, kv, published: None)
    assert "does not hold them" in find_fault()


def test_salts_that_share_blocks(monkeypatch):
    monkeypatch.setattr("interlace.kv.manager.chain_root", lambda *keys: b"the same for all")
    assert "does not hold them" in find_fault()


def test_a_window_freed_one_block_too_early(monkeypatch):
    def early(original, kv, num_tokens, window):
        return original(kv, num_tokens + kv.block_size, window)

    wrap(monkeypatch, KVManager, "_first_visible", early)
    find_fault((AssertionError, IndexError))


def test_the_last_token_taken_from_the_cache(monkeypatch):
    def whole(original, kv, request):
        request.num_known += 1
        try:
            return original(kv, request)
        finally:
            request.num_known -= 1

    wrap(monkeypatch, KVManager, "find_prefix", whole)
    find_fault((AssertionError, IndexError))


def test_a_step_over_budget(monkeypatch):
    def generous(original, self, todo, max_tokens):
        return todo

    wrap(monkeypatch, StepBuilder, "_chunk", generous)
    message = find_fault()
    assert "token budget" in message or "chunk is too long" in message


def test_a_token_out_of_order(monkeypatch):
    def swap(original, core, step, result):
        owners = [state for state, count in zip(step.requests, result.counts, strict=True) for _ in range(count)]
        pairs = zip(owners, result.token_ids, strict=True)
        token_ids = [token + (state.num_known == 11) for state, token in pairs]
        return original(core, step, msgspec.structs.replace(result, token_ids=token_ids))

    wrap(monkeypatch, EngineCore, "_confirm", swap)
    find_fault()


def test_an_unfair_end(monkeypatch):
    def all_fail(original, core, message, now):
        for state in list(core.queues.requests.values()):
            core._end_with_error(state, message, "step_failed")
        return original(core, message, now)

    wrap(monkeypatch, EngineCore, "fail", all_fail)
    assert "failed with a step it had no part in" in find_fault()
