"""Options of `ray`: those of every executor of several ranks, and where the cluster is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from interlace.errors import ConfigError
from interlace.plugins.executors.ranks.options import RankOptions, threads_of

if TYPE_CHECKING:
    from interlace.spec import ResolvedSpec
    from interlace.worker.place import Place


class RayOptions(RankOptions):
    """Those of `multiprocess`, with `devices`, `cores` and `threads_per_rank` settled on each node, and more."""

    address: str = Field(
        default="",
        description="`host:port` of a Ray cluster that this machine is a node of, or `auto` for the one that runs "
        "here. Empty: a cluster of this machine alone, started and stopped with the engine.",
    )
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        default="pack",
        description="`pack`: as few nodes as possible, `spread`: as many; `strict_pack` insists on one node, "
        "`strict_spread` on one node per rank.",
    )
    placement_timeout_s: float = Field(
        default=30.0, gt=0, description="How long to wait for the cluster to answer, and for room in it."
    )

    def check(self, spec: ResolvedSpec) -> None:
        """Raise `ConfigError` naming the option that cannot be."""
        if self.address.startswith("ray://"):
            raise ConfigError(
                f"executor option address = '{self.address}': a Ray Client address does not do, because ranks connect "
                "to the engine's machine directly. Run the engine on a node of the cluster (ray start "
                "--address=HOST:PORT) and use that HOST:PORT, or 'auto'"
            )
        if self.all_reduce == "shared_memory":
            raise ConfigError(
                "executor option all_reduce = 'shared_memory' is for the ranks of one machine that 'multiprocess' has; "
                "those of 'ray' sum by gloo or NCCL: use 'auto'"
            )
        if self.devices:
            self._check_length("devices", len(self.devices))
        if self.cores and self.cores != ["auto"]:
            self._check_length("cores", len(self.cores))
        if self.cores and spec.num_replicas > 1:
            raise ConfigError(
                f"executor option cores with engine.replicas = {spec.num_replicas}: ranks of several replicas may be "
                "on one node, where none knows of the others'. Leave cores empty"
            )
        kinds = sorted({device.partition(":")[0] for device in self.devices})
        if len(kinds) > 1:
            raise ConfigError(
                f"executor option devices names {' and '.join(kinds)}: all ranks of 'ray' compute on the same kind"
            )

    def device(self, spec: ResolvedSpec) -> str:
        """What each rank computes on. Ray gives every rank a GPU of its own and hides the others, so that it is number
        0 there, whatever number `devices` says."""
        kind = (self.devices[0] if self.devices else spec.device).partition(":")[0]
        return "cuda:0" if kind == "cuda" else kind

    def resources(self, spec: ResolvedSpec) -> dict[str, float]:
        """What Ray is asked for per rank: a CPU for each of its threads, where their number is given, and its GPU."""
        asked = {"CPU": float(self.threads_per_rank or 1)}
        if self.device(spec).startswith("cuda"):
            asked["GPU"] = 1.0
        return asked

    def place(self, spec: ResolvedSpec, rank: int, index: int, count: int) -> Place:
        """The place of a rank that is number `index` of the `count` ranks on this node; to be called there."""
        from interlace.plugins.executors.ranks.cores import deal_cores, parse_cores
        from interlace.worker.place import Place
        from interlace.worker.threads import plan_threads

        cores: tuple[int, ...] = ()
        if self.cores == ["auto"]:
            cores = deal_cores(count)[index]
        elif self.cores:
            cores = parse_cores(self.cores[rank])
        device = self.device(spec)
        share = threads_of(spec, max(1, plan_threads(spec.threads).count // count), cores)
        details: dict[str, Any] = {
            "device": device,
            "sharers": 1 if device.startswith("cuda") else count,
            "threads": self.threads_per_rank or share,
            "cores": cores,
        }
        stage, tensor_rank = divmod(rank, self.tensor_parallel)
        return Place(
            tensor_rank=tensor_rank,
            tensor_size=self.tensor_parallel,
            stage=stage,
            num_stages=self.pipeline_parallel,
            **details,
        )
