"""What plugins cost is in the stats: seconds by plugin and step, from a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interlace import hookimpl
from interlace.clock import VirtualClock
from interlace.engine.core import EngineCore
from interlace.engine.front import Front
from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.messages import Admission, EngineRequest, SamplingParams
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.sampling.sampler import Sampler
from interlace.spec import SchedulerLimits
from interlace.testing.executor import ScriptedExecutor, scripted_spec
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly
from interlace.testing.harness import EngineHarness


class CountedClock(VirtualClock):
    """A virtual clock that knows how often it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.readings = 0

    def now(self) -> float:
        self.readings += 1
        return super().now()


class Slow(Fcfs):
    """Each method takes its own number of seconds."""

    def __init__(self, clock):
        super().__init__(self.Options())
        self.clock = clock

    def plan(self, step):
        self.clock.advance(1.0)
        super().plan(step)

    def order_key(self, request):
        self.clock.advance(10.0)
        return 0

    def on_arrival(self, request, now):
        self.clock.advance(100.0)

    def on_update(self, progress, now):
        self.clock.advance(1000.0)

    def on_finish(self, request, now):
        self.clock.advance(10000.0)


class Engine:
    """An engine core and a scripted executor, by hand: one call of the core at a time."""

    def __init__(self, policy, clock):
        limits = SchedulerLimits()
        self.executor = ScriptedExecutor(ScriptedExecutor.Options())
        info = self.executor.start(scripted_spec("nowhere:Nothing", limits=limits), lambda event: None)
        self.core = EngineCore(policy, "slow", limits, info, max_model_len=64, timer=clock.now)

    def add(self, name, max_tokens=2):
        params = SamplingParams(max_tokens=max_tokens)
        request = EngineRequest(id=name, prompt_token_ids=[1, 2], params=params, arrival_time=0.0, seed=0)
        self.core.add(request, 0.0)

    def step(self):
        """One step; the seconds its stats tell."""
        plan = self.core.plan(0.0)
        output = self.core.update(self.executor.submit(plan).result(), 0.0)
        return output.stats.plugin_seconds


def test_seconds_of_every_method_are_in_the_stats():
    clock = VirtualClock()
    engine = Engine(Slow(clock), clock)
    engine.add("a")
    engine.add("b")
    assert engine.step() == {"schedulers:slow": 2 * 110.0 + 1.0 + 1000.0}
    assert engine.step() == {"schedulers:slow": 1.0 + 1000.0 + 2 * 10000.0}
    engine.add("c")
    engine.core.abort(["c"], 0.0)
    engine.add("d", max_tokens=1)
    assert engine.step() == {"schedulers:slow": 2 * 110.0 + 10000.0 + 1.0 + 1000.0 + 10000.0}


def test_a_plan_that_raises_is_accounted():
    class Breaks(Slow):
        def plan(self, step):
            super().plan(step)
            raise RuntimeError("late")

    clock = VirtualClock()
    engine = Engine(Breaks(clock), clock)
    engine.add("a")
    assert engine.step() == {"schedulers:slow": 1111.0}


@pytest.mark.parametrize("count", [1, 50])
def test_the_clock_is_read_a_few_times_a_step_however_many_run(count):
    clock = CountedClock()
    engine = Engine(Fcfs(Fcfs.Options()), clock)
    for number in range(count):
        engine.add(f"r{number}", max_tokens=4)
    assert clock.readings == 0, "who overrides nothing is not asked"
    engine.step()
    engine.step()
    assert clock.readings == 4
    slow = CountedClock()
    engine = Engine(Slow(slow), slow)
    for number in range(count):
        engine.add(f"r{number}", max_tokens=3)
    assert slow.readings == 4 * count, "order_key and on_arrival, once in the life of a request"
    for _ in range(3):
        engine.step()
    assert slow.readings == 4 * count + 3 * 4 + 2, "plan and on_update; on_finish once for all that end"


def test_without_a_timer_nothing_is_counted():
    clock = VirtualClock()
    engine = EngineHarness(Slow(clock))
    engine.add([1, 2], max_tokens=3)
    assert engine.step().stats.plugin_seconds == {"schedulers:slow": 0.0}
    assert clock.now() > 1000


class Stamp(LogitsProcessor):
    """Takes a second to hear of a request, and two to do its work."""

    def __init__(self, clock, log, name):
        super().__init__(self.Options(), 8)
        self.clock, self.log, self.name = clock, log, name

    class Args(LogitsProcessor.Args):
        factor: float = 1.0
        shift: float = 0.0

    def add(self, slot, args, prompt_token_ids):
        self.clock.advance(1.0)
        self.args = args

    def remove(self, slot):
        pass

    def apply(self, logits, rows):
        self.clock.advance(2.0)
        self.log.append(self.name)
        for row in rows:
            logits[row.row] = logits[row.row] * self.args.factor + self.args.shift


def sampled(order, **wanted):
    """(what was called, seconds, logits afterwards) of one row with the named processors' arguments."""
    clock, log = VirtualClock(), []
    sampler = Sampler(8, {name: Stamp(clock, log, name) for name in order}, clock.now)
    params = SamplingParams(temperature=0.0, logits_processors=wanted)
    sampler.add(0, Admission(0, 0, [1], 1, 0, params, 0, 0, ()))
    logits = torch.ones(1, 8)
    sampler.sample(logits, [0], [np.array([1], dtype=np.int32)])
    return log, sampler.take_plugin_seconds(), logits[0, 0].item()


def test_processors_are_applied_in_declared_order_whatever_the_request_says():
    wanted = {"shift": {"shift": 3.0}, "scale": {"factor": 10.0}}
    log, _, value = sampled(["scale", "shift", "idle"], **wanted)
    assert (log, value) == (["scale", "shift"], 13.0)
    log, _, value = sampled(["idle", "shift", "scale"], **wanted)
    assert (log, value) == (["shift", "scale"], 40.0)


def test_seconds_of_processors_are_those_of_the_requests_that_name_them():
    assert sampled(["a", "b"], a={})[1] == {"logits_processors:a": 3.0}
    assert sampled(["a", "b"])[1] == {}


def test_subscribers_see_what_the_engine_and_the_subscribers_cost():
    clock, seen = VirtualClock(), []

    class Watch:
        @hookimpl
        def on_step(self, stats):
            clock.advance(0.5)
            seen.append(stats.plugin_seconds)

    client = ScriptedClient(lambda request: [1, 2, 3], auto=False, clock=clock)
    front = Front(fake_assembly(client, clock=clock, subscribers=(Watch(),)))
    front.submit([front.prepare([1], SamplingParams(max_tokens=3))], Silent(), streaming=False)
    client.step()
    client.step()
    front.shutdown()
    assert [list(seconds.values()) for seconds in seen] == [[], [0.5]]
    assert all(name.startswith("events:") and "Watch" in name for name in seen[1])


class Silent:
    def deliver(self, requests):
        pass
