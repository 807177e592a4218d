"""Checkpoint `safetensors`: a Hugging Face style directory, or one `.safetensors` file inside such a directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.errors import CheckpointError
from interlace.interfaces.checkpoint import Checkpoint
from interlace.model_config import read_json
from interlace.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsCheckpoint(Checkpoint):
    """Weights of `model.safetensors`, or of the shards its index lists; memory-mapped, tensor by tensor.

    Beside them: config.json, tokenizer files, and generation_config.json, whose EOS tokens are preferred."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".safetensors"
        return any(path.glob("*.safetensors")) or (path / _INDEX).is_file()

    def raw_config(self) -> dict[str, Any]:
        return read_directory_config(self._directory)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self._directory)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, names in self._files().items():
            with _open(file) as tensors:
                stored = tensors.offset_keys()  # in file order
                missing = sorted(names - set(stored))
                if missing:
                    raise CheckpointError(
                        f"{file}: lacks {len(missing)} tensors that {_INDEX} places in it, first '{missing[0]}'; "
                        "the files do not belong together: fetch them again"
                    )
                for name in stored:
                    if not names or name in names:
                        yield name, tensors.get_tensor(name)

    def num_weights(self) -> int:
        count = 0
        for file, names in self._files().items():
            with _open(file, "numpy") as tensors:
                count += len(names) or len(tensors.keys())
        return count

    @property
    def _directory(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    def _files(self) -> dict[Path, set[str]]:
        """Each file with the names of its tensors that are wanted; none named: all."""
        if self.path.is_file():
            return {self.path: set()}
        if (self.path / _SINGLE).is_file():
            return {self.path / _SINGLE: set()}
        if (self.path / _INDEX).is_file():
            return _read_index(self.path)
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return {found[0]: set()}
        raise CheckpointError(
            f"{self.path}: holds {len(found)} .safetensors files but neither {_SINGLE} nor {_INDEX}; "
            "fetch the index, or name one file"
        )


def read_directory_config(directory: Path) -> dict[str, Any]:
    """config.json, with the EOS tokens of generation_config.json where it has some."""
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ids = eos if isinstance(eos, list) else [eos]
    if ids and all(isinstance(index, int) for index in ids):
        return {**raw, "eos_token_id": ids}
    return raw


def _read_index(directory: Path) -> dict[Path, set[str]]:
    index = directory / _INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: 'weight_map' is missing or empty; fetch the file again")
    files: dict[Path, set[str]] = {}
    for name, shard in placed.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor '{name}' is placed in {shard!r}, which is not a plain file name")
        files.setdefault(directory / shard, set()).add(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}")
    return files


@contextmanager
def _open(file: Path, framework: str = "pt") -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework=framework) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}); it is truncated or corrupt: fetch it again"
        ) from error
