"""Checkpoint `gguf`: one file with configuration, tokenizer, chat template and (quantised) weights, or its shards."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.errors import CheckpointError
from interlace.interfaces.checkpoint import Checkpoint, Stored
from interlace.plugins.checkpoints.gguf_blocks import FORMATS, decode
from interlace.plugins.checkpoints.gguf_config import IGNORED_TENSORS, Family, family_of, hf_name, read_config
from interlace.plugins.checkpoints.gguf_reader import MAGIC, GgufFile, TensorInfo
from interlace.plugins.checkpoints.gguf_tokenizer import read_eos_token_ids, read_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from interlace.interfaces.weights import BlockWeight
    from interlace.tokenizer import Tokenizer

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_RESIDENT = 64 << 20
"""Bytes of a file that have been read and stay in memory, at most, while its tensors are loaded."""


class GgufCheckpoint(Checkpoint):
    """A `.gguf` file, or the first of a model's shards (`NAME-00001-of-00003.gguf`).

    Tensors arrive in the order of rows that Hugging Face has: quantised matrices in their blocks, as views of the
    mapped file, all others in the file's own type."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        if not path.is_file():
            return False
        if path.suffix == ".gguf":
            return True
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def raw_config(self) -> dict[str, Any]:
        tensors = {name: info for shard in self._shards for name, info in shard.tensors.items()}
        return read_config(self._first, tensors, read_eos_token_ids(self._first))

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._first)

    def weights(self) -> Iterator[tuple[str, torch.Tensor | BlockWeight]]:
        import torch

        config, family = self.config(), family_of(self._first)
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if family.permuted else {}
        for shard in self._shards:
            unforgotten = 0
            for name, info in shard.tensors.items():
                if name in IGNORED_TENSORS:
                    continue
                target = hf_name(family, name)
                if target is None:
                    raise CheckpointError(
                        f"{shard.path}: tensor '{name}' has no place in {family.architecture}; "
                        "the file is of a variant that is not supported"
                    )
                rows = shard.raw(info)  # [rows, bytes]
                if num_heads := heads.get(name.split(".")[-2]):
                    rows = _undo_permutation(rows, num_heads, f"{shard.path}: tensor '{name}'")
                yield target, _to_weight(torch.from_numpy(rows), info, family)
                unforgotten += info.nbytes
                if unforgotten > _MOST_RESIDENT:
                    shard.forget()
                    unforgotten = 0
            shard.forget()

    def stored(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for shard in self._shards:
            for name, info in shard.tensors.items():
                if name not in IGNORED_TENSORS:
                    kind = info.type_name
                    values, nbytes, *_ = found.get(kind, Stored(0, 0))
                    total = values + math.prod(info.shape), nbytes + info.nbytes
                    found[kind] = Stored(*total, True, FORMATS[kind][0]) if kind in FORMATS else Stored(*total)
        return found

    def num_weights(self) -> int:
        return sum(name not in IGNORED_TENSORS for shard in self._shards for name in shard.tensors)

    @property
    def _first(self) -> GgufFile:
        return self._shards[0]

    @cached_property
    def _shards(self) -> list[GgufFile]:
        match = _SHARD.fullmatch(self.path.name)
        first = GgufFile(self.path)
        if match is None or first.metadata.get("split.count", 1) == 1:
            return [first]
        paths = [
            self.path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
            for number in range(1, int(match["count"]) + 1)
        ]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(f"{self.path}: the model's other files are missing beside it: {', '.join(missing)}")
        return [first if path == self.path else GgufFile(path) for path in paths]


def _undo_permutation(rows: NDArray[np.uint8], num_heads: int, where: str) -> NDArray[np.uint8]:
    """Back to the order of halves: the converter interleaved the two halves of each head's rows (for a rope over
    neighbouring values). Rows stay whole, so this works on packed blocks."""
    if len(rows) == 1:  # a bias: one value per row of the projection
        raise CheckpointError(f"{where}: biases of permuted projections cannot be read; use the safetensors files")
    if len(rows) % (2 * num_heads):
        raise CheckpointError(f"{where}: {len(rows)} rows do not divide into {num_heads} heads")
    return rows.reshape(num_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _to_weight(rows: torch.Tensor, info: TensorInfo, family: Family) -> torch.Tensor | BlockWeight:
    """[rows, bytes] -> a weight of the tensor's shape."""
    import torch

    from interlace.interfaces.weights import BlockWeight

    if info.type_name in FORMATS:
        shape, decode_rows = (rows.shape[0], info.shape[-1]), functools.partial(decode, info.type_name)
        blocks = BlockWeight(info.type_name, shape, rows, decode_rows, FORMATS[info.type_name][0])
        if len(info.shape) == 2:
            return blocks
        tensor = blocks.dequantize().reshape(info.shape)
    else:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[info.type_name]
        aligned = rows if rows.data_ptr() % dtype.itemsize == 0 else rows.clone()
        tensor = aligned.view(dtype).reshape(info.shape)
    if family.norm_offset and info.name.endswith("norm.weight"):
        tensor = tensor - family.norm_offset
    return tensor
