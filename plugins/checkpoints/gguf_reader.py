"""A reader of GGUF files: metadata and tensor table over a memory map, every length checked before it is used.

Layout (GGUF specification, versions 2 and 3, little-endian): magic, version, tensor count, metadata count; the
metadata as key, type, value; the tensor table as name, dimensions (fastest first), type, offset; padding to
`general.alignment`; the data. Written for start-up time: the `gguf` library's own reader spends seconds on a large
vocabulary. Needs neither torch nor `gguf` until tensor data is read.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from interlace.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_U64 = struct.Struct("<Q")

BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Tensor types that can be read: type number to (name, values per block, bytes per block)."""


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    type_name: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class GgufFile:
    """An open file. `metadata` and `tensors` (in file order) are read at once, tensor data when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` naming file, place and cause."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._position = 0
        try:
            with path.open("rb") as file:
                # A private copy on write, as torch wants what it makes tensors of; nothing writes.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        self._parse()

    def raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The bytes of a tensor as [rows, bytes per row], still in the file: not to be written to."""
        import numpy as np

        rows = math.prod(info.shape[:-1])
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.offset).reshape(rows, -1)

    def forget(self) -> None:
        """Let go of the memory that holds what was read; what is read again comes from the file once more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _parse(self) -> None:
        if self._take(4) != MAGIC:
            raise self._error("does not begin with the magic 'GGUF'; it is another format, or corrupt")
        version = self._scalar("I")
        if version not in (2, 3):
            hint = "written for a big-endian machine" if version & 0xFFFF == 0 else "too old, too new or corrupt"
            raise self._error(f"has GGUF version {version}, which is {hint}; versions 2 and 3 can be read")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        self._check_count(num_keys, 13, "metadata keys")
        self._check_count(num_tensors, 32, "tensors")
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise self._error(f"has the metadata key {key!r} twice")
            self.metadata[key] = self._value(self._scalar("I"))
        table = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self._error(f"has general.alignment = {alignment!r}; a positive multiple of 8 is expected")
        start = -(-self._position // alignment) * alignment
        for name, shape, kind, offset in table:
            self._place(name, shape, kind, start + offset)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"gives tensor {name!r} {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> None:
        if name in self.tensors:
            raise self._error(f"has the tensor {name!r} twice")
        if kind not in BLOCKS:
            known = ", ".join(entry[0] for entry in BLOCKS.values())
            raise self._error(f"stores tensor {name!r} in type {kind}, which cannot be read; known types: {known}")
        type_name, block_values, block_bytes = BLOCKS[kind]
        if 0 in shape or shape[-1] % block_values:
            raise self._error(f"gives tensor {name!r} the shape {list(shape)}, impossible for type {type_name}")
        nbytes = math.prod(shape) // block_values * block_bytes
        if offset + nbytes > len(self._data):
            raise self._error(
                f"is truncated or corrupt: tensor {name!r} ends at byte {offset + nbytes}, "
                f"the file at {len(self._data)}; fetch it again"
            )
        self.tensors[name] = TensorInfo(name, shape, type_name, offset, nbytes)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 1:
            raise self._error(f"is corrupt: metadata type {kind} at byte {self._position}")
        element, count = self._scalar("I"), self._scalar("Q")
        if element in _SCALARS:
            layout = struct.Struct(
                f"<{self._check_count(count, struct.calcsize(_SCALARS[element]), 'values')}{_SCALARS[element]}"
            )
            return list(layout.unpack(self._take(layout.size)))
        self._check_count(count, 8 if element == _STRING else 12, "values")
        if element == _STRING:
            return self._strings(count)
        return [self._value(element, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """Like `_string` `count` times, without a call for each: a vocabulary has up to a quarter of a million."""
        data, position, end = self._data, self._position, len(self._data)
        read_length = _U64.unpack_from
        found = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(data, position)[0]
                if position > end:
                    raise self._error(f"is truncated or corrupt: a string at byte {start} runs past the end")
                found.append(data[start:position].decode())
        except struct.error as error:
            raise self._error(f"is truncated in a list of strings at byte {position}; fetch it again") from error
        except UnicodeDecodeError as error:
            raise self._error(f"is corrupt: the string at byte {start} is not UTF-8; fetch it again") from error
        self._position = position
        return found

    def _string(self) -> str:
        return self._strings(1)[0]

    def _scalar(self, layout: str) -> Any:
        packed = struct.Struct("<" + layout)
        return packed.unpack(self._take(packed.size))[0]

    def _take(self, size: int) -> bytes:
        start, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise self._error(
                f"is truncated: the header goes on past its end at byte {len(self._data)}; fetch it again"
            )
        return self._data[start : self._position]

    def _check_count(self, count: int, least_bytes: int, what: str) -> int:
        """Refuse, before anything is allocated, a count that the rest of the file cannot hold."""
        if count * least_bytes > len(self._data) - self._position:
            raise self._error(f"is truncated or corrupt: it announces {count} {what}; fetch it again")
        return count

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the GGUF file {problem}")
