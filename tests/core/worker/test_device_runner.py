"""The device runner gives the tokens of the plain one, however late the device is: `FakeStream` is late on purpose."""

from __future__ import annotations

import random

import pytest
import torch

from interlace.messages import StepPlan
from interlace.sampling.sampler import Sampler
from interlace.testing.executor_driver import NO_SUCH_SLOT, UnhealthyError, WorkerExecutor
from interlace.testing.executor_suite import add_traffic
from interlace.testing.fake_stream import FakeStream

GREEDY = {"temperature": 0.0, "max_tokens": 8}


def alone(drive, spec, prompt, **params):
    """What a worker in step with the host generates for one request alone."""
    driver = drive(spec, WorkerExecutor())
    request = driver.add(prompt, **params)
    driver.run()
    return driver.tokens[request]


def add_plain_traffic(driver, source):
    """Requests that need nothing from the host: greedy, and drawn in all ways that the device knows."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 1.0, "stop_token_ids": list(range(0, 300, 9)), "logprobs": 3},
    ]
    shared = [source.randrange(300) for _ in range(20)]
    for number in range(12):
        prompt = shared[: source.choice((0, 8, 17))] + [source.randrange(300) for _ in range(source.randint(1, 40))]
        params = kinds[source.randrange(len(kinds))] if number else kinds[0]
        driver.add(prompt, seed=source.randrange(1 << 40), max_tokens=source.randint(1, 24), **params)


TRAFFIC = {"device only": add_plain_traffic, "with host features": add_traffic}


def rows_of(driver, slot=0):
    return sum(plan.slots.count(slot) for plan, _ in driver.steps)


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_traffic_has_the_tokens_of_the_plain_runner(tiny_spec, drive, traffic, graphs, seed):
    """Chunked prefill, prefix hits, preemption, mixed steps, penalties, log probabilities, seeds."""
    spec = tiny_spec(graphs)
    plain, ahead = drive(spec, WorkerExecutor()), drive(spec, stream := FakeStream((0.0, 0.3, 0.6)[seed], seed))
    for driver in (plain, ahead):
        TRAFFIC[traffic](driver, random.Random(seed))
        driver.run()
    assert ahead.tokens == plain.tokens
    assert ahead.most_in_flight == 2
    assert (stream.num_replayed > 0) == graphs
    assert stream.most_waiting == 2 or traffic == "with host features"


def test_the_traffic_is_worth_it(tiny_spec, drive):
    """Everything happens that could go wrong in a step that is planned while another runs."""
    driver = drive(tiny_spec(graphs=False), FakeStream())
    for seed in range(3):
        add_plain_traffic(driver, random.Random(seed))
    driver.run()
    plans = [plan for plan, _ in driver.steps]
    assert any(plan.preempted for plan in plans)
    assert any(plan.finished for plan in plans)
    assert any(admission.num_cached_tokens for plan in plans for admission in plan.admitted)
    assert any(1 in plan.num_tokens and max(plan.num_tokens) > 1 for plan in plans)
    assert any(not all(plan.sample) for plan in plans)


def test_the_host_runs_ahead(tiny_spec, drive):
    """Two steps wait when both are submitted; the tokens of the first reach the second without the host."""
    spec = tiny_spec(graphs=False)
    driver = drive(spec, stream := FakeStream())
    request = driver.add([5, 6, 7], **GREEDY)
    first, second = driver.submit_all()
    assert stream.most_waiting == 2 and not first.done() and not second.done()
    assert driver.result(second).token_ids and first.done(), "steps are settled in order"
    driver.run()
    assert driver.tokens[request] == alone(drive, spec, [5, 6, 7], **GREEDY)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_any_number_of_steps_in_flight(tiny_spec, drive, depth):
    spec = tiny_spec(**{"gpu.steps_in_flight": depth})
    driver = drive(spec, FakeStream())
    add_plain_traffic(driver, random.Random(7))
    driver.run()
    plain = drive(spec, WorkerExecutor())
    add_plain_traffic(plain, random.Random(7))
    plain.run()
    assert driver.tokens == plain.tokens
    assert driver.most_in_flight == depth


def test_a_stop_is_noticed_one_step_late(tiny_spec, drive):
    """The row that was computed too far is dropped, and its neighbour does not notice."""
    spec = tiny_spec()
    output = alone(drive, spec, [1, 2, 3], temperature=0.0, max_tokens=20)
    stop = next(token for token in output[2:] if output.index(token) >= 2)
    end = output.index(stop) + 1
    driver = drive(spec, FakeStream())
    stopped = driver.add([1, 2, 3], temperature=0.0, max_tokens=20, stop_token_ids=[stop])
    other = driver.add([9, 8], temperature=0.0, max_tokens=20)
    driver.run()
    assert driver.tokens[stopped] == output[:end]
    assert driver.tokens[other] == alone(drive, spec, [9, 8], temperature=0.0, max_tokens=20)
    assert rows_of(driver) == end + 1, "one step too many for the slot of the stopped request"


def test_a_length_is_noticed_in_time(tiny_spec, drive):
    driver = drive(tiny_spec(), FakeStream())
    driver.add([1, 2, 3], **GREEDY)
    driver.run()
    assert rows_of(driver) == 8


def test_a_slot_changes_hands_while_steps_are_in_flight(tiny_spec, drive):
    """A request is aborted with two steps under way; the next one takes its slot, and never hears of its tokens."""
    spec = tiny_spec(**{"scheduler.max_num_seqs": 1})
    driver = drive(spec, FakeStream())
    first = driver.add([1, 2, 3], temperature=0.0, max_tokens=30)
    for _ in range(4):
        driver.step()
    driver.submit_all()
    driver.core.abort([first], 0.0)
    second = driver.add([40, 41], **GREEDY)
    driver.run()
    assert driver.tokens[second] == alone(drive, spec, [40, 41], **GREEDY)
    expected = alone(drive, spec, [1, 2, 3], temperature=0.0, max_tokens=30)
    assert driver.tokens[first] == expected[: len(driver.tokens[first])]


@pytest.mark.parametrize("seed", range(3))
def test_aborts_at_any_time(tiny_spec, drive, seed):
    spec = tiny_spec()
    source = random.Random(seed)
    plain, ahead = drive(spec, WorkerExecutor()), drive(spec, FakeStream(0.3, seed))
    for driver in (plain, ahead):
        add_plain_traffic(driver, random.Random(seed))
    plain.run()
    aborted = set()
    while ahead.step():
        ahead.submit_all()
        if source.random() < 0.2:
            aborted.add(f"r{source.randrange(12)}")
            ahead.core.abort(sorted(aborted), 0.0)
        ahead.core.check_integrity()
    for request, tokens in plain.tokens.items():
        found = ahead.tokens[request]
        assert found == (tokens[: len(found)] if request in aborted else tokens)


def test_only_rows_that_need_the_host_are_sampled_there(tiny_spec, drive, monkeypatch):
    """A neighbour with a penalty changes nothing about how a request is sampled."""
    seen = []
    sample = Sampler.sample
    monkeypatch.setattr(
        Sampler, "sample", lambda self, logits, slots, *rest: seen.append(slots) or sample(self, logits, slots, *rest)
    )
    spec = tiny_spec()
    driver = drive(spec, FakeStream())
    seeded = driver.add([3, 4], seed=11, temperature=1.0, top_p=0.8, max_tokens=6)
    driver.add([5], temperature=1.0, repetition_penalty=1.5, max_tokens=6)
    driver.run()
    assert seen and {tuple(slots) for slots in seen} == {(1,)}
    assert driver.tokens[seeded] == alone(drive, spec, [3, 4], seed=11, temperature=1.0, top_p=0.8, max_tokens=6)


# ── log probabilities ─────────────────────────────────────────────────────────────────────────────────────────


REPORTING = [
    {"temperature": 0.0, "logprobs": 2, "max_tokens": 9},
    {"temperature": 0.0, "max_tokens": 12},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 0, "max_tokens": 7},
    {"temperature": 1.4, "logprobs": 20, "max_tokens": 12},
]


def reports(driver, requests):
    """Run `requests`, which are given the slots in their order; what their steps reported, by slot, the ids and ranks
    apart from the values."""
    for number, params in enumerate(requests):
        driver.add([3 + number, 5, 40 * number], seed=number, **params)
    driver.run()
    found = {}
    for plan, result in driver.steps:
        for row, (entry,) in result.logprobs.items():
            found.setdefault(plan.slots[row], []).append(entry)
    exact = {slot: [(entry.token_ids, entry.rank) for entry in entries] for slot, entries in found.items()}
    return exact, [value for slot in sorted(found) for entry in found[slot] for value in entry.logprobs]


@pytest.mark.parametrize("graphs", [True, False])
def test_log_probabilities_come_with_the_tokens(tiny_spec, drive, graphs):
    """Those of the plain runner, for the rows that asked; and the host runs ahead as ever."""
    spec = tiny_spec(graphs)
    plain, wanted = reports(drive(spec, WorkerExecutor()), REPORTING)
    driver = drive(spec, stream := FakeStream())
    found, values = reports(driver, REPORTING)
    assert found == plain and values == pytest.approx(wanted, abs=1e-5)
    assert {slot: len(entries) for slot, entries in found.items()} == {0: 9, 2: 7, 3: 12}
    assert {slot: {len(ids) for ids, _ in entries} for slot, entries in found.items()} == {0: {3}, 2: {1}, 3: {21}}
    assert stream.most_waiting == 2 and all(not driver.errors[request] for request in driver.errors)


def test_log_probabilities_beside_a_row_that_needs_the_host(tiny_spec, drive):
    """The neighbour's penalty does not touch the distribution that is reported, neither its own nor the others'."""
    requests = [*REPORTING, {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 1, "max_tokens": 12}]
    spec = tiny_spec()
    plain, wanted = reports(drive(spec, WorkerExecutor()), requests)
    found, values = reports(drive(spec, FakeStream()), requests)
    assert found == plain and values == pytest.approx(wanted, abs=1e-5) and len(found[4]) == 12


def test_log_probabilities_of_the_prompt_wait_for_the_prompt_only(tiny_spec, drive):
    """Afterwards the request decodes like any other: the host runs ahead."""
    spec = tiny_spec(**{"scheduler.max_num_batched_tokens": 8})
    found = []
    for runs_on in (WorkerExecutor(), stream := FakeStream()):
        driver = drive(spec, runs_on)
        request = driver.add(list(range(20)), prompt_logprobs=2, **GREEDY)
        driver.run()
        parts = [part for _, result in driver.steps for part in result.prompt_logprobs.get(0, [])]
        found.append((driver.tokens[request], [part.token_ids for part in parts]))
        assert len(parts) == 19
    assert found[0] == found[1]
    assert stream.most_waiting == 2


def test_a_row_without_a_distribution_fails_alone(tiny_spec, drive, monkeypatch):
    """NaN in a row's logits: that request ends with an error, also where its next step is under way."""
    spec = tiny_spec(graphs=False)
    driver = drive(spec, FakeStream())
    model = driver.executor._worker._runner._model
    logits = model.logits

    def spoiled(hidden):
        found = logits(hidden)
        if len(found) == 2:
            found[1] = torch.nan
        return found

    model.logits = spoiled
    good = driver.add([1, 2], **GREEDY)
    bad = driver.add([3, 4], logprobs=1, **GREEDY)
    driver.run()
    assert "NaN" in driver.errors[bad] and driver.tokens[bad] == []
    assert all(not result.logprobs for _, result in driver.steps)
    assert driver.tokens[good] == alone(drive, spec, [1, 2], **GREEDY)


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_step_that_fails_on_the_device(tiny_spec, drive, which):
    """It fails its successor, too, and the engine goes on: what comes later is right."""
    spec = tiny_spec(graphs=False)
    driver = drive(spec, stream := FakeStream())
    request = driver.add([1, 2, 3], **GREEDY)
    stream.failures[stream.num_submitted + which] = RuntimeError("an illegal memory access was encountered")
    futures = []
    while not any(future.done() and future.exception() for future in futures):
        futures += driver.submit_all()
        plan, oldest = driver._in_flight[0]
        if oldest.exception() is None:
            driver.step()
        else:
            assert plan.step_id == which
            assert "illegal memory access" in str(oldest.exception())
            for _, later in list(driver._in_flight)[1:]:
                assert f"step {which} before it failed" in str(later.exception())
            driver._in_flight.clear()
            driver._absorb(driver.core.fail(str(oldest.exception()), 0.0))
    assert "illegal memory access" in driver.errors[request]
    driver.check_health()
    later = driver.add([7, 8, 9], **GREEDY)
    driver.run()
    assert driver.tokens[later] == alone(drive, spec, [7, 8, 9], **GREEDY)


def test_a_plan_that_cannot_be_launched(tiny_spec, drive):
    """The step before it is sound, those after it fail with it, and the failure is heard of once."""
    driver = drive(tiny_spec(graphs=False), FakeStream())
    driver.add([1, 2, 3], **GREEDY)
    (good, *_) = driver.submit_all()[:1]
    empty = driver.core.plans_in_flight[0].blocks
    deltas = [type(delta)([], [], []) for delta in empty]
    bad = StepPlan(step_id=90, slots=[NO_SUCH_SLOT], num_tokens=[1], sample=[True], blocks=deltas)
    after = StepPlan(step_id=91, slots=[], num_tokens=[], sample=[], blocks=deltas)
    failing, follower = driver.submit(bad), driver.submit(after)
    assert good.result().token_ids
    assert isinstance(failing.exception(), IndexError)
    assert "step 90 before it failed" in str(follower.exception()) or "a step before it failed" in str(
        follower.exception()
    )
    assert driver.submit(after).result().counts == []


def test_a_device_that_is_gone(tiny_spec, drive):
    driver = drive(tiny_spec(graphs=False), stream := FakeStream())
    driver.add([1, 2, 3], **GREEDY)
    stream.failures[stream.num_submitted] = RuntimeError("CUDA error: unspecified launch failure")
    stream.broken = RuntimeError("CUDA error: unspecified launch failure")
    (first, *_) = driver.submit_all()
    assert "launch failure" in str(first.exception())
    with pytest.raises(UnhealthyError, match="does no more work: CUDA error"):
        driver.check_health()


def test_shutdown_settles_what_is_open(tiny_spec, drive):
    driver = drive(tiny_spec(), FakeStream())
    driver.add([1, 2, 3], **GREEDY)
    futures = driver.submit_all()
    driver.executor.shutdown()
    assert [future.done() for future in futures] == [True, True]
    assert all(future.result().token_ids for future in futures)


# ── with Triton's kernels ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [True, False])
def test_triton_kernels_under_the_device_runner(tiny_spec, drive, graphs):
    """Attention, sampling and log probabilities in Triton (interpreted), in graphs that read what the runner fills:
    torch's tokens."""
    triton = {"attention.use": "triton", "kernels.use": "triton", "cache.block_size": 16, "gpu.graphs": graphs}
    tokens, chances = [], []
    for settings, runs_on in ((triton, stream := FakeStream()), ({"cache.block_size": 16}, WorkerExecutor())):
        driver = drive(tiny_spec(graphs=False, **settings), runs_on)
        driver.add([1, 2, 3, 4, 5], temperature=0.0, max_tokens=6)
        driver.add([9, 8], temperature=1.0, seed=3, top_p=0.9, max_tokens=4)
        driver.add([7] * 20, temperature=0.7, seed=4, max_tokens=3, logprobs=3)
        driver.run()
        tokens.append(driver.tokens)
        entries = [entry for _, result in driver.steps for entry, *_ in result.logprobs.values()]
        assert [len(entry.token_ids) for entry in entries] == [4] * 3
        chances.append([value for entry in entries for value in (*entry.logprobs, *entry.token_ids, entry.rank)])
    assert tokens[0] == tokens[1]
    assert chances[0] == pytest.approx(chances[1], abs=1e-4)
    assert (stream.num_replayed > 0) == graphs
