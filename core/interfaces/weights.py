"""`BlockWeight`: a weight still in the blocks of the quantised file it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch


class BlockWeight(msgspec.Struct, frozen=True):
    """A weight [out, in] whose rows are runs of blocks: some values each, with a common scale.

    It stands where a tensor would: `shape`, `detach` and indexing by rows are what loading needs of one.
    """

    format: str
    """GGUF's name of the block format, such as `Q4_1`."""
    shape: tuple[int, int]
    data: Any
    """torch.Tensor [out, bytes of a row] uint8, perhaps a view of a mapped file."""
    decode: Callable[[Any], Any]
    """data of some rows -> their values [rows, in] in float32, exactly."""

    def __getitem__(self, where: Any) -> Any:
        """Rows, by a slice or a list of numbers: a `BlockWeight`. With a part of the columns, too: their values, as a
        tensor, since blocks cannot be cut."""
        rows, *columns = where if isinstance(where, tuple) else (where,)
        data = self.data[rows]
        part = BlockWeight(self.format, (data.shape[0], self.shape[1]), data, self.decode)
        if not columns or columns[0] == slice(None):
            return part
        return part.dequantize()[:, columns[0]]

    def detach(self) -> BlockWeight:
        return self

    def dequantize(self) -> torch.Tensor:
        """[out, in] float32."""
        values: torch.Tensor = self.decode(self.data)
        return values
