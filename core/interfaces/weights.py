"""`BlockWeight`: a weight still in the blocks of the quantised file it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch

_MOST_VALUES = 1 << 15
"""Values that are in float32 at a time while a weight is decoded: they stay in the processor's cache, and are too few
for torch to share the work among threads that would wait for each other more than they work."""


class BlockWeight(msgspec.Struct, frozen=True):
    """A weight [out, in] whose rows are runs of blocks: some values each, with a common scale.

    It stands where a tensor would: `shape`, `detach` and indexing by rows are what loading needs of one.
    """

    format: str
    """GGUF's name of the block format, such as `Q4_1`."""
    shape: tuple[int, int]
    data: Any
    """torch.Tensor [out, bytes of a row] uint8, perhaps a view of a mapped file: never written to."""
    decode: Callable[[Any], Any]
    """data of some rows -> their values [rows, in] in float32, exactly."""
    block_values: int = 0
    """Values of a block; 0: not told, so that columns cannot be cut."""

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return int(self.data.numel())

    def __getitem__(self, where: Any) -> Any:
        """Rows, by a slice or a list of numbers, and perhaps a run of the columns: a `BlockWeight`, or, where the
        columns are not whole blocks, their values as a tensor."""
        rows, *columns = where if isinstance(where, tuple) else (where,)
        part = self._with(self.data[rows], self.shape[1])
        if not columns:
            return part
        first, end, step = columns[0].indices(self.shape[1])
        if (first, end, step) == (0, self.shape[1], 1):
            return part
        if step != 1 or not self.block_values or first % self.block_values or end % self.block_values:
            return part.dequantize()[:, columns[0]]
        block_bytes = self.data.shape[1] // (self.shape[1] // self.block_values)
        cut = slice(first // self.block_values * block_bytes, end // self.block_values * block_bytes)
        return self._with(part.data[:, cut], end - first)

    def detach(self) -> BlockWeight:
        return self

    def to(self, device: Any) -> BlockWeight:
        """The same with `data` on a torch device."""
        return self._with(self.data.to(device), self.shape[1])

    def pad(self, rows: int) -> BlockWeight:
        """With rows of zeros at the end, `rows` in all: every format decodes zero bytes to zeros."""
        if rows == self.shape[0]:
            return self
        padded = self.data.new_zeros(rows, self.data.shape[1])
        padded[: self.shape[0]] = self.data
        return self._with(padded, self.shape[1])

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[out, in] in `dtype` (None: float32)."""
        import torch

        return self.dequantize_into(torch.empty(self.shape, dtype=dtype or torch.float32, device=self.data.device))

    def dequantize_into(self, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` [out, in] of any floating type, piece by piece, and return it."""
        step = max(1, _MOST_VALUES // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            out[first : first + step].copy_(self.decode(self.data[first : first + step]))
        return out

    def _with(self, data: Any, columns: int) -> BlockWeight:
        return BlockWeight(self.format, (data.shape[0], columns), data, self.decode, self.block_values)


def join_rows(parts: Sequence[torch.Tensor | BlockWeight], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """The parts' rows one after the other in `dtype` on `device`, in memory of their own; blocks are decoded without
    a float32 copy of the whole."""
    import torch

    rows = sum(part.shape[0] for part in parts)
    joined = torch.empty(rows, *parts[0].shape[1:], dtype=dtype, device=device)
    first = 0
    for part in parts:
        place = joined[first : first + part.shape[0]]
        if isinstance(part, BlockWeight):
            part.to(device).dequantize_into(place)
        else:
            place.copy_(part)
        first += part.shape[0]
    return joined


def decode_all(
    weights: Iterable[tuple[str, torch.Tensor | BlockWeight]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a checkpoint for a model that takes tensors only."""
    for name, weight in weights:
        yield name, weight.dequantize() if isinstance(weight, BlockWeight) else weight
