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
    """A placement group with a bundle per rank."""

    def __init__(self, options: RayOptions, bundle: dict[str, float]) -> None:
        """Reserve it. Raises `CapacityError` saying what was asked for and what there is."""
        self.group = placement_group([bundle] * options.world, strategy=options.placement.upper())
        try:
            if not self.group.wait(options.placement_timeout_s):
                raise CapacityError(_no_room(options, bundle))
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


def _no_room(options: RayOptions, bundle: dict[str, float]) -> str:
    asked = " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = "; ".join(f"{node['NodeManagerAddress']}: {_amounts(node['Resources'], bundle)}" for node in nodes)
    free = _amounts(ray.available_resources(), bundle)
    ranks = f"{options.world} ranks" if options.world > 1 else "the rank"
    return (
        f"the Ray cluster has no room for {ranks} (tensor_parallel = {options.tensor_parallel} x pipeline_parallel = "
        f"{options.pipeline_parallel}): asked for {asked} per rank, {MEANING[options.placement]} (placement = "
        f"'{options.placement}'), not given within placement_timeout_s = {options.placement_timeout_s:g} s. Nodes: "
        f"{there or 'none'}; free in all: {free}. Add nodes, end what uses them, or ask for fewer ranks"
    )


def _amounts(resources: dict[str, Any], bundle: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in bundle)
