"""`OrderingConformance`: what every ordering must do. No model, no torch, milliseconds a test.

    class TestMine(OrderingConformance):
        ordering = "mine"                   # the name it is installed under; or the class itself
        options = {"bucket": 64}            # as in the configuration

Keys are checked on random requests; then the ordering serves in a whole engine, alone and behind others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from interlace.interfaces.ordering import Ordering
from interlace.interfaces.scheduler import Scheduler
from interlace.messages import EngineRequest, SamplingParams
from interlace.request import RequestState
from interlace.testing.conformance import Conformance, find_provider
from interlace.testing.guard import CheckedPolicy, PolicyFault, ReadOnlyRequest
from interlace.testing.histories import run_history

NUM_REQUESTS = 200
"""Random requests whose keys are compared."""
LOWEST_PRIORITY = -8
"""The most urgent priority number the random requests have; a claim of fairness has to hold for bounded ones only."""


class Inverse(Ordering):
    """What stands in front in the tests of combinations: three classes, last priority first."""

    def key(self, request: Any) -> int:
        return -(int(request.priority) % 3)


class OrderingConformance(Conformance):
    """Subclass it and name the ordering; see the module."""

    kind = "orderings"
    selector = "ordering"
    ordering: ClassVar[str | type[Ordering]]
    patience_s: ClassVar[float] = 1e6
    """Seconds after a request arrived from which on every later one has to come behind it, where `starvation_free` is
    declared. An ordering that lets other things outweigh more waiting than that needs a larger bound."""

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        return {"seed": cls.seeds, "replayed": list(cls.seeds)[::4], "place": ["alone", "first", "second"]}

    @classmethod
    def make_ordering(cls) -> Ordering:
        """A fresh ordering with the options of the suite."""
        made: Ordering = cls.target(cls.target_options)
        return made

    def test_options(self) -> None:
        """Unknown options are refused, defaults are valid."""
        model = self.target.Options
        assert issubclass(model, BaseModel), f"Options is {model!r}, not a pydantic model"
        accepted = True
        try:
            model(**self.options, no_such_option=1)
        except ValidationError:
            accepted = False
        assert not accepted, 'options: an unknown option is accepted; state `model_config = ConfigDict(extra="forbid")`'
        assert self.make_ordering().options == self.target_options, (
            "self.options is not what the ordering was given: call super().__init__(options)"
        )

    def test_keys_are_in_one_order(self, seed: int) -> None:
        """Any two keys compare, to the same end from both sides, and a key equals itself (NaN does not)."""
        ordering, rng = self.make_ordering(), random.Random(seed)
        keys = [_key(ordering, request) for request in random_requests(rng, NUM_REQUESTS)]
        for key in keys:
            assert key == key, f"order: the key {key!r} is not equal to itself"
        for one, other in zip(keys, rng.sample(keys, len(keys)), strict=True):
            try:
                outcomes = (one < other) + (other < one) + (one == other)
            except TypeError as error:
                raise AssertionError(f"order: the keys {one!r} and {other!r} do not compare: {error}") from error
            assert outcomes == 1, f"order: {one!r} and {other!r} should be in one order, or equal"

    def test_equal_requests_have_equal_keys(self, seed: int) -> None:
        """Nothing but the request decides: no randomness, no real time. It holds for two fresh orderings."""
        requests = random_requests(random.Random(seed), NUM_REQUESTS)
        again = random_requests(random.Random(seed), NUM_REQUESTS)
        one, other = self.make_ordering(), self.make_ordering()
        for request, same in zip(requests, again, strict=True):
            keys = _key(one, request), _key(other, same)
            assert keys[0] == keys[1], f"determinism: {keys[0]!r} and {keys[1]!r} for equal requests"

    def test_claim_of_fairness(self, seed: int) -> None:
        """Where `starvation_free` is declared: whoever comes late enough comes behind, equal keys excluded."""
        ordering, rng = self.make_ordering(), random.Random(seed)
        assert isinstance(ordering.starvation_free, bool), f"starvation_free is {ordering.starvation_free!r}, no bool"
        if not ordering.starvation_free:
            return
        for early in random_requests(rng, 20):
            key = ordering.key(early)
            for late in random_requests(rng, 20, after=early.arrival_time + self.patience_s):
                assert key < ordering.key(late), (
                    f"fairness: {late!r} (priority {late.priority}) comes {self.patience_s:g} s after {early!r} "
                    f"(priority {early.priority}) and is not behind it: its key is {ordering.key(late)!r}, not above "
                    f"{key!r}. Do not declare starvation_free, or set patience_s"
                )

    def test_in_an_engine(self, replayed: int, place: str) -> None:
        """A random history in which the scheduler `ordered` sorts by this ordering, alone or with another one."""
        mine, other = self.make_ordering(), Inverse(Inverse.Options())
        order = {"alone": [mine], "first": [mine, other], "second": [other, mine]}[place]
        try:
            run_history(replayed, lambda rng: CheckedPolicy(_combine(order)), 30)
        except PolicyFault as fault:
            raise AssertionError(f"{fault} (history {replayed}, {place} in the order)") from fault


def _key(ordering: Ordering, request: RequestState) -> Any:
    """What the ordering says of a request of which it can read what `RequestView` states, and write nothing."""
    try:
        return ordering.key(ReadOnlyRequest(request))
    except PolicyFault as fault:
        raise AssertionError(str(fault)) from fault
    except Exception as error:
        raise AssertionError(f"raises nothing: key raised {type(error).__name__}: {error}, for {request!r}") from error


def _combine(orderings: Sequence[Ordering]) -> Scheduler:
    target = find_provider("schedulers", "ordered")
    made: Scheduler = target(target.Options(order=[type(one).__name__ for one in orderings]), order=orderings)
    return made


def random_requests(rng: random.Random, count: int, after: float = 0.0) -> list[RequestState]:
    """Requests of every kind that arrive at any time from `after` on, not sorted."""
    return [_random_request(rng, f"r{number}", after) for number in range(count)]


def _random_request(rng: random.Random, name: str, after: float) -> RequestState:
    tenant: Mapping[str, str] = rng.choice(({}, {"tenant": "a"}, {"tenant": "b", "class": "gold"}))
    request = EngineRequest(
        id=name,
        prompt_token_ids=[1] * rng.choice((1, 7, rng.randrange(1, 2000))),
        params=SamplingParams(max_tokens=rng.choice((None, 1, rng.randrange(1, 500)))),
        arrival_time=after + rng.choice((0.0, rng.random(), rng.random() * 1e5)),
        seed=0,
        priority=rng.choice((0, 0, rng.randrange(LOWEST_PRIORITY, 9))),
        labels=dict(tenant),
    )
    return RequestState(request, max_model_len=4096, num_groups=1)
