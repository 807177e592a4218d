"""What sums and gathers over tensor ranks cost: gloo over the loopback against shared memory, ranks as processes.

    python docs/benchmarks/collectives.py [--ranks 2] [--width 576] [--tokens 1 16 64 256 2048]

Each figure is the least of five runs, in microseconds per exchange of float32 activations: the sum of [tokens, width],
and the gather of equal parts of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from interlace.plugins.executors.ranks.meeting import BoardSeat, make_seats

RUNS = 5


def run_rank(args: argparse.Namespace, store: int, seat: BoardSeat) -> None:
    """One rank; the first one prints."""
    import torch
    from torch.distributed import FileStore, PrefixStore

    from interlace.plugins.executors.ranks.board import Board

    torch.set_num_threads(1)
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface="lo")]
    group = gloo(PrefixStore("sums", FileStore(f"/proc/self/fd/{store}", args.ranks)), seat.rank, args.ranks, options)
    board = Board(seat)
    with torch.inference_mode():
        for tokens in args.tokens:
            x = torch.zeros(tokens, args.width)
            widths = [args.width // args.ranks] * args.ranks
            part, parts = x[:, : widths[0]].contiguous(), [torch.zeros(tokens, width) for width in widths]
            acts: list[Callable[[], object]] = [
                lambda x=x: group.allreduce([x]).wait(),
                lambda x=x: board.all_reduce(x),
                lambda part=part, parts=parts: (group.allgather([parts], [part]).wait(), torch.cat(parts, dim=1)),
                lambda part=part, widths=widths: board.all_gather(part, widths),
            ]
            count = max(4, min(100, 20000 // (tokens + 100)))
            found = [measure(act, count) for act in acts]
            if seat.rank == 0:
                print(f"| {tokens} | {x.nbytes} | {' | '.join(f'{us:.0f}' for us in found)} |", flush=True)


def measure(act: Callable[[], object], count: int) -> float:
    """Microseconds of one call."""
    for _ in range(20):
        act()
    found = []
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(count):
            act()
        found.append((time.perf_counter() - began) / count * 1e6)
    return min(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--rank", nargs=2, metavar=("STORE", "SEAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        run_rank(args, int(args.rank[0]), msgspec.json.decode(args.rank[1], type=BoardSeat))
        return 0
    columns = ("tokens", "bytes", "sum: gloo, us", "shared memory", "gather: gloo", "shared memory")
    print(f"{args.ranks} ranks\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    store = os.memfd_create("store")
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--rank", str(store), msgspec.json.encode(seat).decode()],
            pass_fds=[store, *seat.descriptors],
        )
        for seat in make_seats(args.ranks)
    ]
    return max([abs(rank.wait()) for rank in ranks])


if __name__ == "__main__":
    sys.exit(main())
