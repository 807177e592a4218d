"""`interlace config plan`: what a start would choose and take, found out without loading a weight."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from interlace.cli.tables import print_table
from interlace.config import LoadedSettings
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from interlace.spec import ResolvedSpec
    from interlace.worker.sizing import MemoryPlan, RankPlan


def print_plan(loaded: LoadedSettings, as_json: bool) -> int:
    """Resolve, size, and print components with their reasons, KV groups and blocks, and memory."""
    spec = resolve(loaded, PluginManager(loaded.settings))
    from interlace.worker.sizing import plan_memory  # imports torch

    memory = plan_memory(spec)
    plan = _plan(spec, memory)
    if as_json:
        json.dump(plan, sys.stdout, indent=2)
        print()
        return 0
    print(f"model {spec.model} ({spec.model_path})")
    print(f"device {spec.device}, compute {spec.dtype}, weights {spec.weights}, max_model_len {spec.max_model_len}\n")
    columns = ("kind", "name", "package", "version", "reason")
    print_table(columns, ([part[column] for column in columns] for part in plan["components"]))
    if plan["selections"]:
        print()
        print_table(("kind", "name", "reason"), ([made.kind, made.name, made.reason] for made in memory.selections))
    print()
    print_table(
        ("kv group", "window", "layers"),
        ([group["kind"], str(group["window"] or "-"), str(group["layers"])] for group in plan["kv"]["groups"]),
    )
    if len(memory.ranks) > 1:
        print()
        print_table(("rank", "stage", "device", "layers", "heads", "kv heads", "weights", "kv cache"), _rank_rows(plan))
    kv = plan["kv"]
    print(
        f"\nKV cache: {kv['num_blocks']} blocks of {kv['block_size']} tokens, {kv['max_tokens']} tokens in all\n"
        f"memory:   weights {_size(memory.weights_bytes)}, KV cache {_size(memory.kv_bytes)}, "
        f"of {_size(memory.free_bytes)} free"
    )
    return 0


def _plan(spec: ResolvedSpec, memory: MemoryPlan) -> dict[str, Any]:
    return {
        "model": spec.model,
        "model_path": spec.model_path,
        "device": spec.device,
        "dtype": spec.dtype,
        "weights": spec.weights,
        "max_model_len": spec.max_model_len,
        "components": [
            {
                "kind": part.kind,
                "name": part.name,
                "package": part.package,
                "version": part.version,
                "reason": part.reason,
                "target": part.target,
            }
            for part in spec.components
        ],
        "selections": [{"kind": made.kind, "name": made.name, "reason": made.reason} for made in memory.selections],
        "kv": {
            "groups": [
                {"kind": group.kind, "window": group.window, "layers": len(group.layers)} for group in memory.kv.groups
            ],
            "block_size": memory.kv.block_size,
            "num_blocks": memory.num_blocks,
            "max_tokens": memory.max_tokens,
        },
        "ranks": [_rank(spec, rank) for rank in memory.ranks],
        "memory": {
            "weights_bytes": memory.weights_bytes,
            "kv_bytes": memory.kv_bytes,
            "free_bytes": memory.free_bytes,
        },
    }


def _rank(spec: ResolvedSpec, rank: RankPlan) -> dict[str, Any]:
    place = rank.place
    return {
        "rank": place.rank,
        "stage": place.stage,
        "device": place.device or spec.device,
        "layers": [rank.layers.start, rank.layers.stop],
        "heads": rank.num_heads,
        "kv_heads": rank.num_kv_heads,
        "weights_bytes": rank.weights_bytes,
        "kv_bytes": rank.kv_bytes,
    }


def _rank_rows(plan: dict[str, Any]) -> Iterator[list[str]]:
    for rank in plan["ranks"]:
        first, end = rank["layers"]
        numbers = (rank["device"], f"{first}-{end - 1}", rank["heads"], rank["kv_heads"])
        sizes = (_size(rank["weights_bytes"]), _size(rank["kv_bytes"]))
        yield [str(value) for value in (rank["rank"], rank["stage"], *numbers, *sizes)]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
