"""The built-in schedulers keep their contract."""

from interlace.testing import SchedulerConformance


class TestFcfs(SchedulerConformance):
    scheduler = "fcfs"


class TestPriority(SchedulerConformance):
    scheduler = "priority"


class TestPriorityWithAging(SchedulerConformance):
    scheduler = "priority"
    options = {"aging_s": 5.0}  # noqa: RUF012


class TestOrdered(SchedulerConformance):
    scheduler = "ordered"


class TestOrderedWithAging(SchedulerConformance):
    scheduler = "ordered"
    options = {"order": ["priority", "fewest-remaining", "fcfs"]}  # noqa: RUF012
    settings = {"orderings.options.priority.aging_s": 5.0}  # noqa: RUF012
