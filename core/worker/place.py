"""`Place`: which rank of an executor a worker is, and what of the machine it may use. Plain data, no torch.

    rank = stage * tensor_size + tensor_rank, world = num_stages * tensor_size

Tensor ranks of a stage hold parts of the same layers, stages hold different layers. One rank samples: the first tensor
rank of the last stage, because logits come together there.
"""

from __future__ import annotations

import msgspec


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One rank. The defaults are the only rank there is."""

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    num_stages: int = 1
    stage_layers: tuple[int, ...] = ()
    """Layers of each stage; empty: as even as they can be. See `interlace.worker.stages`."""
    device: str = ""
    """Empty: `spec.device`."""
    sharers: int = 1
    """Ranks that take their memory from where this one does, itself included: those of the same machine on CPU, or of
    the same GPU. Each takes an equal part of what is free."""
    threads: int = 0
    """Threads to compute with; 0: as `plan_threads` finds for the spec and `cores`."""
    cores: tuple[int, ...] = ()
    """Processors the worker's process is bound to; empty: not bound."""

    @classmethod
    def of(cls, rank: int, tensor_size: int, num_stages: int) -> Place:
        """The place of global rank `rank`, with nothing said of the machine."""
        stage, tensor_rank = divmod(rank, tensor_size)
        return cls(tensor_rank=tensor_rank, tensor_size=tensor_size, stage=stage, num_stages=num_stages)

    @property
    def rank(self) -> int:
        """Number among all ranks."""
        return self.stage * self.tensor_size + self.tensor_rank

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.num_stages * self.tensor_size

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def samples(self) -> bool:
        """Whether this rank's results are the step's."""
        return self.is_last_stage and self.tensor_rank == 0
