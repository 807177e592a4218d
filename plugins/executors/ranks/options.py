"""How many ranks there are, where they are, and what of the machine each may use."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from interlace.errors import ConfigError
from interlace.plugins.executors.ranks.cores import deal_cores, parse_cores

if TYPE_CHECKING:
    from interlace.spec import ResolvedSpec
    from interlace.worker.place import Place


logger = logging.getLogger("interlace.executors")


class RankOptions(BaseModel):
    """Options of an executor of several ranks."""

    model_config = ConfigDict(extra="forbid")

    tensor_parallel: int = Field(
        default=1, ge=1, description="Ranks that share each layer: every rank holds a part of all its weights."
    )
    pipeline_parallel: int = Field(
        default=1, ge=1, description="Stages the layers are dealt to; as many steps are under way."
    )
    pipeline_layers: list[int] = Field(
        default=[],
        description="Layers of each stage, such as `[19, 11]`. Empty: dealt so that all stages take about as long to "
        "decode a token, the head on the last one included.",
    )
    devices: list[str] = Field(
        default=[],
        description="Device of each rank, in order of ranks (stage by stage). Empty: the CPU for all, or `cuda:0`, "
        "`cuda:1`, … where `device` is a GPU.",
    )
    threads_per_rank: int = Field(
        default=0, ge=0, description="CPU threads of each rank; 0: an equal share of what `threads` stands for."
    )
    cores: list[str] = Field(
        default=[],
        description="Processors each rank is bound to, one entry per rank (with `engine.replicas`: first those of "
        "replica 0, then of 1, …), such as `0-3`; or `auto` alone: an equal share each. Empty: not bound.",
    )
    all_reduce: Literal["auto", "gloo", "shared_memory"] = Field(
        default="auto",
        description="How tensor ranks sum and gather on CPU. `auto`: in shared memory where that is faster, else by "
        "gloo.",
    )
    start_timeout_s: float = Field(
        default=600.0, gt=0, description="A start that takes longer, loading included, is given up."
    )

    @field_validator("cores", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.tensor_parallel * self.pipeline_parallel

    def places(self, spec: ResolvedSpec) -> list[Place]:
        """The ranks of one machine, in order. Raises `ConfigError` naming the option that does not fit."""
        from interlace.worker.place import Place
        from interlace.worker.threads import plan_threads

        devices = self._devices(spec.device)
        cores = self._cores(spec)
        stage_layers = self.stage_layers(spec)
        threads = plan_threads(spec.threads).count
        if threads < self.world and spec.device == "cpu":
            logger.warning("%d ranks share %d threads: each waits for the others' turns", self.world, threads)
        share = max(1, threads // self.world)
        return [
            Place(
                tensor_rank=rank % self.tensor_parallel,
                tensor_size=self.tensor_parallel,
                stage=rank // self.tensor_parallel,
                num_stages=self.pipeline_parallel,
                stage_layers=stage_layers,
                device=devices[rank],
                sharers=devices.count(devices[rank]),
                threads=self.threads_per_rank or threads_of(spec, share, cores[rank]),
                cores=cores[rank],
            )
            for rank in range(self.world)
        ]

    def stage_layers(self, spec: ResolvedSpec) -> tuple[int, ...]:
        """`Place.stage_layers` of all ranks. Raises `ConfigError` if `pipeline_layers` does not fit the model."""
        from interlace.worker.stages import check_layers, deal_layers

        config, stages = spec.model_config, self.pipeline_parallel
        if self.pipeline_layers:
            return check_layers(self.pipeline_layers, config, stages)
        return deal_layers(config, stages) if stages > 1 else ()

    def shares_memory(self, places: list[Place]) -> bool:
        """Whether tensor ranks of these places, all on one machine, exchange tensors through shared memory: it is
        faster than gloo at every size (docs/scaling.md). Raises `ConfigError` where it was asked for and cannot be."""
        on_cpu = all(place.device == "cpu" for place in places)
        if self.all_reduce == "shared_memory" and not on_cpu:
            raise ConfigError("executor option all_reduce = 'shared_memory' is for ranks on the CPU; use 'auto'")
        return on_cpu and self.all_reduce != "gloo"

    def _devices(self, device: str) -> list[str]:
        if self.devices:
            self._check_length("devices", len(self.devices))
            return self.devices
        if device.startswith("cuda"):
            first = int(device.partition(":")[2] or 0)
            return [f"cuda:{first + rank}" for rank in range(self.world)]
        return [device] * self.world

    def _cores(self, spec: ResolvedSpec) -> list[tuple[int, ...]]:
        """Of all engines on this machine, those of this one."""
        if not self.cores:
            return [()] * self.world
        parts = spec.num_parts
        if self.cores == ["auto"]:
            cores = deal_cores(parts * self.world, num_replicas=parts)
        else:
            self._check_length("cores", len(self.cores), parts)
            cores = [parse_cores(text) for text in self.cores]
        return cores[spec.part * self.world :][: self.world]

    def _check_length(self, option: str, length: int, num_replicas: int = 1) -> None:
        if length != self.world * num_replicas:
            replicas = f" x engine.replicas = {num_replicas}" if num_replicas > 1 else ""
            raise ConfigError(
                f"executor option {option} has {length} entries for {self.world * num_replicas} ranks (tensor_parallel "
                f"= {self.tensor_parallel} x pipeline_parallel = {self.pipeline_parallel}{replicas}); give one per "
                "rank, or none"
            )


def threads_of(spec: ResolvedSpec, share: int, cores: tuple[int, ...]) -> int:
    """`Place.threads` of a rank that gets `share` of the threads: no more of them than it has `cores`, if it is bound;
    0, as many as these are, where no number is set."""
    from interlace.worker.threads import default_threads

    if not cores:
        return share
    return min(share, default_threads(set(cores), None).count) if spec.threads else 0
