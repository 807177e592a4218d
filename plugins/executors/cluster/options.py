"""Options of `ray`: those of every executor of several ranks, and where the cluster is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from interlace.errors import ConfigError
from interlace.plugins.executors.ranks.options import RankOptions, threads_of

if TYPE_CHECKING:
    from interlace.spec import Component, ResolvedSpec
    from interlace.worker.place import Place

logger = logging.getLogger("interlace.executors")


class RayOptions(RankOptions):
    """Those of `multiprocess`, with `devices`, `cores` and `threads_per_rank` settled on each node, and more."""

    address: str = Field(
        default="",
        description="`host:port` of a Ray cluster that this machine is a node of, or `auto` for the one that runs "
        "here. Empty: a cluster of this machine alone, started and stopped with the engine.",
    )
    engine_core: Literal["front", "cluster"] = Field(
        default="front",
        description="`front`: the engine core runs beside its front, and its ranks in the cluster. `cluster`: whole "
        "engines run in the cluster, each with all its ranks on one node.",
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
        if self.engine_core == "cluster":
            self._check_whole_engine()
        elif self.all_reduce == "shared_memory":
            raise ConfigError(
                "executor option all_reduce = 'shared_memory' is for ranks on one machine, as 'multiprocess' and "
                "engine_core = 'cluster' have; those of 'ray' sum by gloo or NCCL: use 'auto'"
            )
        self.stage_layers(spec)
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

    def _check_whole_engine(self) -> None:
        if not self.address:
            raise ConfigError(
                "executor option engine_core = 'cluster' needs the address of a cluster: HOST:PORT as ray start --head "
                "printed it, or 'auto' for the one that runs here"
            )
        if self.world > 1 and self.placement in ("spread", "strict_spread"):
            raise ConfigError(
                f"executor option placement = '{self.placement}' spreads the ranks of an engine, which are processes "
                "of one node with engine_core = 'cluster': leave placement out, or use engine_core = 'front'"
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

    def engine_resources(self, spec: ResolvedSpec) -> dict[str, float]:
        """What Ray is asked for per engine, which has all its ranks with it."""
        return {name: amount * self.world for name, amount in self.resources(spec).items()}

    def settle(self, spec: ResolvedSpec, sharers: int) -> ResolvedSpec:
        """What an engine on this node runs: its ranks are processes of the node, or, if there is one, the engine
        itself. `threads` and, on a CPU, `cache.memory` are the node's; `sharers` engines divide them."""
        import msgspec

        from interlace.worker.threads import plan_threads

        if self.cores and sharers > 1:
            logger.warning("executor option cores: all engines of a node bind themselves to the same processors")
        device = self.device(spec)
        parts = 1 if device.startswith("cuda") else sharers
        memory = spec.cache.memory_bytes
        cache = msgspec.structs.replace(
            spec.cache,
            memory_bytes=None if memory is None else memory // parts,
            memory_share=spec.cache.memory_share / parts,
        )
        threads = self.threads_per_rank * self.world or max(1, plan_threads(spec.threads).count // sharers)
        executor = self._on_one_node(spec.executor)
        return msgspec.structs.replace(spec, executor=executor, device=device, threads=threads, cache=cache)

    def _on_one_node(self, executor: Component) -> Component:
        """The executor of an engine that is on a node with all its ranks."""
        import msgspec

        name, target, options = "uniprocess", "interlace.plugins.executors.uniprocess:UniprocessExecutor", {}
        if self.world > 1 or self.cores:
            name, target = "multiprocess", "interlace.plugins.executors.multiprocess:MultiprocessExecutor"
            options = {key: getattr(self, key) for key in RankOptions.model_fields if key != "devices"}
        return msgspec.structs.replace(executor, name=name, target=target, options=options, host=None)

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
            stage_layers=self.stage_layers(spec),
            **details,
        )
