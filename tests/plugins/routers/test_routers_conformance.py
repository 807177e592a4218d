"""The built-in routers keep the contract of routers, with their defaults and at the ends of their options."""

from interlace.testing import RouterConformance


class TestRoundRobin(RouterConformance):
    router = "round_robin"


class TestLeastLoaded(RouterConformance):
    router = "least_loaded"


class TestLeastLoadedByCountAlone(RouterConformance):
    router = "least_loaded"
    options = {"waiting_weight": 0}  # noqa: RUF012
    seeds = range(5)


class TestPrefixAffinity(RouterConformance):
    router = "prefix_affinity"


class TestPrefixAffinityAtAnyPrice(RouterConformance):
    router = "prefix_affinity"
    options = {"min_share": 0, "max_imbalance": 1e9}  # noqa: RUF012
    seeds = range(5)
    spreads = False


class TestPrefixAffinityWithAShortMemory(RouterConformance):
    router = "prefix_affinity"
    options = {"max_blocks": 3, "max_imbalance": 0, "max_ratio": 1}  # noqa: RUF012
    seeds = range(5)
