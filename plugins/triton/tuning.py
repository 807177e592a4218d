"""Which figures the attention kernels run with: those measured on this GPU before, else the defaults.

What was measured is kept in one JSON file per GPU model and Triton release. Nothing is measured unless asked for, so a
first start costs no more than compiling two kernels.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from interlace.plugins.triton import runtime
from interlace.plugins.triton.attention_config import (
    KernelConfig,
    LayerShape,
    default_decode,
    default_prefill,
    fitted,
    power_of_two,
)

logger = logging.getLogger("interlace.attention.triton")

_INTERPRETED = (KernelConfig(16, 64, 4, 1), KernelConfig(64, 128, 4, 1))
"""(decode, prefill): the interpreter pays per step of a program, not per value."""


def choose_configs(
    shape: LayerShape, dtype: str, device: str, folder: str, tune: bool
) -> tuple[KernelConfig, KernelConfig]:
    """(decode, prefill) figures for such layers on `device`. With `tune`, what is not known is measured, and kept in
    `folder`; a folder that cannot be read or written is a warning, never an error."""
    if torch.device(device).type == "cpu":
        decode, prefill = _INTERPRETED
        return decode, prefill._replace(rows=max(prefill.rows, power_of_two(shape.group)))
    store = TuningStore(Path(folder).expanduser(), _device_name(device))
    chosen = []
    room = runtime.shared_memory(device)
    for kind, default, candidates in (
        ("decode", fitted(default_decode(shape), shape, room), decode_candidates(shape)),
        ("prefill", fitted(default_prefill(shape), shape, room), prefill_candidates(shape)),
    ):
        key = _key(kind, shape, dtype)
        known = store.get(key)
        if known is None and tune:
            from interlace.plugins.triton.tuning_cases import find_best

            known = find_best(kind, shape, dtype, device, [default, *candidates])
            store.put(key, known)
            logger.info("tuned %s attention: %s (%s)", kind, known, key)
        chosen.append(known or default)
    return chosen[0], chosen[1]


class TuningStore:
    """Figures by key, for one kind of device, in a file. Written by replacing it, so two engines may share it."""

    def __init__(self, folder: Path, device_name: str) -> None:
        self._path = folder / f"attention-{device_name}.json"

    def get(self, key: str) -> KernelConfig | None:
        """What is known for `key`; None where there is nothing, or nothing of use."""
        found = self._read().get(key)
        return KernelConfig(**found) if isinstance(found, dict) and _is_sound(found) else None

    def put(self, key: str, config: KernelConfig) -> None:
        """Keep `config`, and what others wrote meanwhile."""
        entries = {**self._read(), key: config._asdict()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1, sort_keys=True)
            Path(name).replace(self._path)
        except OSError as error:
            logger.warning("what was tuned cannot be kept: %s. Set tuning_dir to a folder that can be written.", error)

    def _read(self) -> Mapping[str, Any]:
        try:
            entries = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("tuned figures are ignored: %s: %s", self._path, error)
            return {}
        return entries if isinstance(entries, dict) else {}


def decode_candidates(shape: LayerShape) -> list[KernelConfig]:
    """What is tried for the decode kernel."""
    return [
        KernelConfig(16, tile, warps, stages)
        for tile in (32, 64, 128)
        for warps in (1, 2, 4)
        for stages in (2, 3, 4, 6)
        if tile * shape.block_d * (1 if shape.is_fp8 else shape.itemsize) * 2 * stages <= 224 << 10
        and not (warps == 1 and tile * shape.block_d > 64 * 128)
    ]


def prefill_candidates(shape: LayerShape) -> list[KernelConfig]:
    """What is tried for the prefill kernel."""
    least = power_of_two(shape.group)
    return [
        KernelConfig(rows, tile, warps, stages)
        for rows, warps in ((64, 4), (128, 4), (128, 8))
        for tile in (32, 64, 128)
        for stages in (2, 3, 4)
        if rows >= least and tile * shape.block_d * shape.itemsize * 2 * stages <= 224 << 10
    ]


def _is_sound(found: dict[str, Any]) -> bool:
    """Powers of two within what the kernels are written for: a file may have been edited."""
    limits = {"rows": (16, 256), "tile": (16, 128), "warps": (1, 16), "stages": (1, 16)}
    return found.keys() == limits.keys() and all(
        isinstance(found[name], int)
        and least <= found[name] <= most
        and (name == "stages" or found[name] & (found[name] - 1) == 0)
        for name, (least, most) in limits.items()
    )


def _key(kind: str, shape: LayerShape, dtype: str) -> str:
    cached = "fp8" if shape.is_fp8 else dtype
    parts = (kind, dtype, f"cache-{cached}", f"head-{shape.head_size}", f"group-{shape.group}")
    extras = (["window"] if shape.window else []) + (["softcap"] if shape.softcap else [])
    return " ".join([*parts, f"kv-heads-{shape.num_kv_heads}", f"block-{shape.block_size}", *extras])


def _device_name(device: str) -> str:
    import triton

    name = torch.cuda.get_device_name(torch.device(device))
    return "".join(c if c.isalnum() else "-" for c in f"{name}-triton-{triton.__version__}")
