"""Random traffic over queues, step builder, KV manager and engine core, under good and bad policies.

Each test is one history, replayed by its id: `pytest "tests/properties/test_random_traffic.py::test_history[6-Fcfs]"`.
What is checked on the way and at the end: see `interlace.testing.harness` and `interlace.testing.checked_worker`.
"""

import pytest

from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.plugins.schedulers.priority import Priority
from interlace.testing.adversaries import ADVERSARIES
from interlace.testing.histories import run_history

POLICIES = {
    "Fcfs": lambda random: Fcfs(Fcfs.Options()),
    "Priority": lambda random: Priority(Priority.Options(aging_s=random.choice((0, 0.5)))),
} | {name: lambda random, make=make: make(random.randrange(2**32)) for name, make in ADVERSARIES.items()}

FAST = 108
SLOW = 2200


def policy_of(seed: int) -> str:
    """Every third history is one of a policy that users run; the others take the adversaries in turn."""
    if seed % 3 == 0:
        return ("Fcfs", "Priority")[seed // 3 % 2]
    return list(ADVERSARIES)[(seed - seed // 3) % len(ADVERSARIES)]


def histories(seeds, *marks):
    return [pytest.param(seed, policy_of(seed), id=f"{seed}-{policy_of(seed)}", marks=marks) for seed in seeds]


@pytest.mark.parametrize(
    ("seed", "policy"), [*histories(range(FAST)), *histories(range(FAST, FAST + SLOW), pytest.mark.slow)]
)
def test_history(seed, policy):
    report = run_history(seed, POLICIES[policy], min_steps=50)
    assert report.num_steps >= 50


def test_every_policy_is_among_the_fast_histories():
    assert {policy_of(seed) for seed in range(FAST)} == set(POLICIES)


def test_histories_meet_what_they_are_about():
    """Guards against traffic that is too tame to find anything."""
    reports = [run_history(seed, POLICIES["Fcfs"]) for seed in range(20)]
    for fact, least in (("num_preemptions", 20), ("num_hit_tokens", 1000), ("num_aborted", 50), ("num_failed", 50)):
        assert sum(getattr(report, fact) for report in reports) >= least, fact


def test_a_seed_gives_the_same_history_again():
    assert run_history(7, POLICIES["Anything"]) == run_history(7, POLICIES["Anything"])


def test_a_failing_history_names_its_seed(monkeypatch):
    monkeypatch.setattr("interlace.testing.harness.EngineHarness.check_end", lambda self: pytest.fail("no end"))
    monkeypatch.setattr("interlace.kv.manager.KVManager.free", lambda self, request: 0)
    with pytest.raises(AssertionError, match="history 3: "):
        run_history(3, POLICIES["Fcfs"])
