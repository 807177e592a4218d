"""From checkpoint names to layers: which tensors a model needs, and which layer takes each one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from interlace.errors import CheckpointError
from interlace.interfaces.weights import BlockWeight


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    place: Callable[[Any], object]
    blocks: bool
    held: int


class WeightTable:
    """The tensors a model needs. Layers enter theirs while they are built; `load` hands each one out as it comes.

    A table is a view with a prefix: `weights.at("mlp").at("down_proj")` enters names below `mlp.down_proj.` of the
    same table. A fused layer enters the names of all its parts, so the fusion is stated where it is done.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._ignored: list[str] = []
        self._elsewhere: list[str] = []
        self._prefix = ""

    def at(self, name: str) -> WeightTable:
        """The same table, with names below `name`."""
        view = WeightTable()
        view._entries, view._ignored, view._elsewhere = self._entries, self._ignored, self._elsewhere
        view._prefix = f"{self._prefix}{name}."
        return view

    def expect(
        self,
        name: str,
        shape: tuple[int, ...],
        place: Callable[[Any], object],
        *,
        blocks: bool = False,
        held: int | None = None,
    ) -> None:
        """Need tensor `name` of this whole (unsharded) shape. `place` gets it once, in the type it was shipped in,
        perhaps as a view of a mapped file: it copies what it keeps. `held`: values that this rank keeps (default: all).

        A weight shipped in blocks is decoded to float32 first, unless `place` takes a `BlockWeight` too (`blocks`)."""
        full_name = self._prefix + name
        if full_name in self._entries:
            raise ValueError(f"two layers expect the checkpoint tensor '{full_name}'")
        self._entries[full_name] = _Entry(shape, place, blocks, math.prod(shape) if held is None else held)

    def ignore(self, suffix: str) -> None:
        """Pass over tensors whose name ends so; for values that some checkpoints carry and nobody needs."""
        self._ignored.append(suffix)

    def leave(self, name: str) -> None:
        """Pass over the tensors below `name`: another pipeline stage has them, and sees to it that they are right."""
        self._elsewhere.append(f"{self._prefix}{name}.")

    @property
    def num_parameters(self) -> int:
        """Values of the expected tensors that this rank holds."""
        return sum(entry.held for entry in self._entries.values())

    def load(self, weights: Iterable[tuple[str, torch.Tensor | BlockWeight]]) -> None:
        """Consume all (checkpoint name, weight) pairs.

        Raises `CheckpointError` naming every missing, unexpected, repeated or wrongly shaped tensor."""
        seen: set[str] = set()
        unexpected, repeated, misshapen = [], [], []
        for name, tensor in weights:
            entry = self._entries.get(name)
            if entry is None:
                if not (name.endswith(tuple(self._ignored)) or name.startswith(tuple(self._elsewhere))):
                    unexpected.append(name)
            elif name in seen:
                repeated.append(name)
            else:
                seen.add(name)
                if tuple(tensor.shape) == entry.shape:
                    entry.place(_given(tensor, entry))
                else:
                    misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(entry.shape)}")
        problems = {
            "missing": _fold([name for name in self._entries if name not in seen]),
            "unexpected": _fold(unexpected),
            "given twice": _fold(repeated),
            "of the wrong shape": misshapen,
        }
        found = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
        if found:
            raise CheckpointError(
                f"the checkpoint does not fit its own configuration; tensors {'; '.join(found)}. "
                "Check that config and weights belong together and that all files of the checkpoint are there."
            )


def _given(weight: torch.Tensor | BlockWeight, entry: _Entry) -> torch.Tensor | BlockWeight:
    if isinstance(weight, BlockWeight) and not entry.blocks:
        return weight.dequantize()
    return weight.detach()


def _fold(names: list[str]) -> list[str]:
    """Write names that differ in their layer number only as one: `layers.{0-3,7}.norm.weight`."""
    layers: dict[tuple[str, str], list[int]] = {}
    folded: list[str] = []
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if match is None:
            folded.append(name)
        else:
            layers.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (before, after), numbers in layers.items():
        folded.append(f"{before}{_ranges(sorted(numbers))}{after}")
    return folded


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 7] → `{0-2,7}`; [4] → `4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
