"""`multiprocess`: one process per rank on this machine, with tensor and pipeline parallelism."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from interlace.clock import MonotonicClock
from interlace.errors import ConfigError
from interlace.plugins.executors.ranks.executor import RanksExecutor
from interlace.plugins.executors.ranks.options import RankOptions

if TYPE_CHECKING:
    from interlace.plugins.executors.processes.processes import RankProcesses
    from interlace.plugins.executors.ranks.executor import OnDeath, OnSaid
    from interlace.plugins.executors.ranks.ledger import StepLedger
    from interlace.spec import ResolvedSpec


class MultiprocessExecutor(RanksExecutor):
    """Hands plans to its ranks through shared memory."""

    class Options(RankOptions):
        """Options of the multiprocess executor."""

    _processes: RankProcesses | None = None

    def make_ranks(self, spec: ResolvedSpec, ledger: StepLedger, on_said: OnSaid, on_death: OnDeath) -> RankProcesses:
        if sys.platform != "linux":
            raise ConfigError("executor.use = 'multiprocess' needs Linux; 'uniprocess' runs everywhere")
        from interlace.plugins.executors.processes.processes import RankProcesses

        places = self.options.places(spec)
        share_memory = self.options.shares_memory(places)
        self._processes = RankProcesses(
            spec, places, ledger, on_said, on_death, MonotonicClock(), share_memory=share_memory
        )
        return self._processes

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of ranks, for supervision and tests."""
        return [] if self._processes is None else self._processes.pids
