"""Finding room for the ranks in a cluster. Imports Ray; only the launcher imports this."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from interlace.errors import CapacityError

if TYPE_CHECKING:
    from interlace.plugins.executors.cluster.options import RayOptions

MEANING = {
    "pack": "on as few nodes as possible",
    "spread": "on as many nodes as possible",
    "strict_pack": "all on one node",
    "strict_spread": "each on a node of its own",
}


class Room:
    """A placement group with a bundle for each of some actors."""

    def __init__(self, whom: str, each: str, count: int, bundle: dict[str, float], options: RayOptions) -> None:
        """Reserve `count` bundles, for `whom`, who consists of that many of `each`. Raises `CapacityError` saying what
        was asked for and what there is."""
        self.group = placement_group([bundle] * count, strategy=options.placement.upper())
        try:
            if not self.group.wait(options.placement_timeout_s):
                raise CapacityError(_no_room(whom, each, bundle, options))
            self.bundles = self._order()
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Give it back, which ends the actors in it."""
        remove_placement_group(self.group)

    def _order(self) -> list[int]:
        """Bundle of each rank: ranks that follow each other share a node where they can, because tensor ranks of a
        stage say the most to each other; this machine comes first."""
        nodes: dict[int, str] = placement_group_table(self.group)["bundles_to_node_id"]
        here = ray.get_runtime_context().get_node_id()
        return sorted(nodes, key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))


def deal_seats(node_ids: list[str]) -> list[tuple[int, int]]:
    """For each rank: which of the ranks on its node it is, and how many there are."""
    totals = Counter(node_ids)
    seen: Counter[str] = Counter()
    dealt = []
    for node_id in node_ids:
        dealt.append((seen[node_id], totals[node_id]))
        seen[node_id] += 1
    return dealt


def count_nodes(bundle: dict[str, float]) -> int:
    """On how many nodes there is as much as `bundle`, whoever has it now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes)


def _no_room(whom: str, each: str, bundle: dict[str, float], options: RayOptions) -> str:
    asked = " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    asked += f" per {each}, {MEANING[options.placement]} (placement = '{options.placement}')" if each == "rank" else ""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = "; ".join(f"{node['NodeManagerAddress']}: {_amounts(node['Resources'], bundle)}" for node in nodes)
    free = _amounts(ray.available_resources(), bundle)
    where = "" if each == "rank" else " on one node"
    return (
        f"the Ray cluster has no room for {whom}: asked for {asked}{where}, not given within placement_timeout_s = "
        f"{options.placement_timeout_s:g} s. Nodes: {there or 'none'}; free in all: {free}. Add nodes, end what uses "
        f"them, or ask for {'fewer ranks' if each == 'rank' else 'less'}"
    )


def _amounts(resources: dict[str, Any], bundle: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in bundle)
