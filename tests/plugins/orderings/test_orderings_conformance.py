"""The built-in orderings keep their contract; and the suite says what is wrong with those that do not."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import pytest

from interlace.interfaces.ordering import Ordering
from interlace.testing import OrderingConformance
from interlace.testing.conformance import failures


class TestFcfs(OrderingConformance):
    ordering = "fcfs"


class TestPriority(OrderingConformance):
    ordering = "priority"


class TestPriorityWithAging(OrderingConformance):
    ordering = "priority"
    options: ClassVar[dict[str, Any]] = {"aging_s": 30.0}


class TestShortestPrompt(OrderingConformance):
    ordering = "shortest-prompt"


class TestFewestRemaining(OrderingConformance):
    ordering = "fewest-remaining"
    options: ClassVar[dict[str, Any]] = {"bucket_tokens": 64}


class Partial(Ordering):
    """Says nothing about requests without a tenant."""

    def key(self, request):
        return request.labels.get("tenant")


class NotANumber(Ordering):
    def key(self, request):
        return math.nan if request.num_prompt_tokens > 1000 else 1.0


class Unsettled(Ordering):
    """Every call gives another key."""

    count = itertools.count()

    def key(self, request):
        return next(self.count)


class Presumptuous(Ordering):
    """By length, with a claim that no length can keep."""

    starvation_free = True

    def key(self, request):
        return request.num_prompt_tokens


class Curious(Ordering):
    """Reads what only the core should."""

    def key(self, request):
        return len(request.token_ids)


class Breaks(Ordering):
    def key(self, request):
        return 1 / (request.num_prompt_tokens - 7)


class Lenient(Ordering):
    class Options(Ordering.Options):
        model_config = {"extra": "allow"}  # noqa: RUF012

    def key(self, request):
        return 0


@pytest.mark.parametrize(
    ("ordering", "test", "expected"),
    [
        (Partial, "test_keys_are_in_one_order", "do not compare: '<' not supported between"),
        (NotANumber, "test_keys_are_in_one_order", "the key nan is not equal to itself"),
        (Unsettled, "test_equal_requests_have_equal_keys", "determinism: 0 and 1 for equal requests"),
        (Presumptuous, "test_claim_of_fairness", "comes 1e+06 s after <RequestState"),
        (Curious, "test_keys_are_in_one_order", "the policy reads request.token_ids, which RequestView does not have"),
        (Breaks, "test_keys_are_in_one_order", "raises nothing: key raised ZeroDivisionError"),
        (Lenient, "test_options", "an unknown option is accepted"),
    ],
)
def test_suite_names_the_fault(ordering, test, expected):
    suite = type("Suite", (OrderingConformance,), {"ordering": ordering, "seeds": range(3)})
    assert expected in failures(suite, only=test)[test]
