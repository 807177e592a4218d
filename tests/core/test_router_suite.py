"""The conformance suite of routers catches routers that do not keep the contract."""

from __future__ import annotations

import pytest

from interlace.interfaces.router import Router
from interlace.testing import RouterConformance
from interlace.testing.conformance import failures


class Good(Router):
    def route(self, request, replicas):
        return min(replicas, key=lambda replica: (replica.num_running, replica.last_sent)).index


class ByPlace(Good):
    """Takes the place in the list for the index."""

    def route(self, request, replicas):
        return [replica.last_sent for replica in replicas].index(min(replica.last_sent for replica in replicas))


class Hoarder(Good):
    """Remembers every request for ever."""

    def __init__(self, options):
        super().__init__(options)
        self.seen = {}

    def route(self, request, replicas):
        self.seen[request.id] = list(request.prompt_token_ids)
        return super().route(request, replicas)


class Stubborn(Good):
    def route(self, request, replicas):
        return replicas[0].index


class Curious(Good):
    """Reads what no contract states."""

    def route(self, request, replicas):
        return max(replicas, key=lambda replica: replica.client is not None).index


class Writer(Good):
    def route(self, request, replicas):
        replicas[0].num_waiting = 7
        return super().route(request, replicas)


class Touchy(Good):
    """Does not expect a replica to be lost."""

    def on_replica_lost(self, replica):
        raise KeyError(replica.index)


class Lenient(Good):
    class Options(Router.Options):
        model_config = {"extra": "allow"}  # noqa: RUF012


def failing(target) -> dict[str, str]:
    return failures(type("Suite", (RouterConformance,), {"router": target, "seeds": range(6)}))


def test_a_good_one_passes():
    assert failing(Good) == {}


@pytest.mark.parametrize(
    ("target", "test", "word"),
    [
        (ByPlace, "test_names_a_replica_it_was_offered", "offered: it returned"),
        (Hoarder, "test_memory_is_bounded", "memory:"),
        (Stubborn, "test_many_prompts_reach_every_replica", "spread:"),
        (Curious, "test_names_a_replica_it_was_offered", "contract:"),
        (Writer, "test_names_a_replica_it_was_offered", "contract:"),
        (Touchy, "test_in_a_fleet", "raises nothing: router 'tested' failed: on_replica_lost raised KeyError"),
        (Lenient, "test_options", "options:"),
    ],
)
def test_a_bad_one_fails(target, test, word):
    found = failing(target)
    assert word in found[test], found
