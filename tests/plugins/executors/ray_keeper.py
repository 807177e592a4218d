"""`python ray_keeper.py FOLDER CPUS`: a Ray cluster of simulated nodes on this machine, until stdin closes.

Each line `add` on stdin adds a node of CPUS processors; after each change a line of JSON says what there is. The
cluster is no descendant of whoever started it: its processes come and go, and are no leak of an executor under test.
"""

from __future__ import annotations

import json
import os
import sys


def keep(folder: str, cpus: int) -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "object_store_memory": 80 * 2**20}
    head = {**node, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.head_node]
    while True:
        raylets = [each.all_processes["raylet"][0].process.pid for each in nodes]
        print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
        if not sys.stdin.readline():
            break
        nodes.append(cluster.add_node(**node))
    cluster.shutdown()


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    os.setsid()
    keep(sys.argv[1], int(sys.argv[2]))
