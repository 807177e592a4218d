"""What every scheduler must do. The package has to be installed: the suite finds `predictive` as an engine does."""

from __future__ import annotations

from interlace.testing import SchedulerConformance


class TestPredictive(SchedulerConformance):
    scheduler = "predictive"
