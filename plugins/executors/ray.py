"""`ray`: one actor per rank on a Ray cluster: tensor and pipeline parallelism over several machines."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from interlace.clock import MonotonicClock
from interlace.errors import ConfigError
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.ranks.executor import RanksExecutor

if TYPE_CHECKING:
    from interlace.plugins.executors.cluster.ranks import ClusterRanks
    from interlace.plugins.executors.ranks.executor import OnDeath, OnSaid
    from interlace.plugins.executors.ranks.ledger import StepLedger
    from interlace.spec import ResolvedSpec


class RayExecutor(RanksExecutor):
    """Lets Ray place the ranks and start and end their processes, and speaks to each over a connection of its own.

    A lost node takes its ranks with it, and with them all others; a supervised engine is then started again on what is
    left of the cluster."""

    class Options(RayOptions):
        """Options of the ray executor."""

    _cluster: ClusterRanks | None = None

    def make_ranks(self, spec: ResolvedSpec, ledger: StepLedger, on_said: OnSaid, on_death: OnDeath) -> ClusterRanks:
        if find_spec("ray") is None:
            raise ConfigError("executor.use is 'ray', but Ray is not installed: pip install 'interlace[ray]'")
        from interlace.plugins.executors.cluster.ranks import ClusterRanks

        self.options.check(spec)
        self._cluster = ClusterRanks(spec, self.options, ledger, on_said, on_death, MonotonicClock())
        return self._cluster

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of ranks, each on its own node; for supervision and tests."""
        return [] if self._cluster is None else [seat.pid for seat in self._cluster.seats]

    @property
    def launcher_pid(self) -> int:
        """Process id of the child that speaks to Ray; 0 before the start. For supervision and tests."""
        return 0 if self._cluster is None else self._cluster.launcher_pid
