"""A timed all-reduce: first among the ranks of each machine, then among all ranks.

The bus bandwidth of n ranks is 2(n-1)/n · bytes / seconds: the speed of the slowest link, which does not depend on n.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from prefopt_dist.preflight.rendezvous import connect

BYTES = {"nccl": 256 * 2**20, "gloo": 8 * 2**20}
ROUNDS = 5
SECONDS = 20.0
"""Timeout of a collective, since a broken link never answers."""


def bandwidth(group: dist.ProcessGroup | None, device: torch.device, size: int) -> float | None:
    """Measure the bus bandwidth of an all-reduce (all ranks of the group call it).

    Args:
        group: the process group; None for all ranks.
        device: this rank's device.
        size: bytes that are reduced, as float32.

    Returns:
        GB/s of the best round; None for a group of one rank.

    Raises:
        ValueError: the sum is wrong.
    """
    n = dist.get_world_size(group)
    if n == 1:
        return None
    best = float("inf")
    for _ in range(ROUNDS + 1):
        x = torch.full((size // 4,), float(dist.get_rank(group) + 1), device=device)
        _synchronise(device)
        start = time.perf_counter()
        dist.all_reduce(x, group=group)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
        if not bool((x == n * (n + 1) / 2).all()):
            raise ValueError("the all-reduce returned a wrong sum")
    return 2 * (n - 1) / n * size / best / 1e9


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str]) -> int:
    """Run one rank and print its figures as JSON; `arguments` are HOST PORT NODES RANKS NODE LOCAL_RANK."""
    host, (port, nodes, ranks, node, local) = arguments[0], map(int, arguments[1:])
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    backend = "nccl" if on_gpu else "gloo"
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=SECONDS)
    store = connect(host, port, seconds=SECONDS, is_head=False)
    dist.init_process_group(backend, store=store, rank=node * ranks + local, world_size=nodes * ranks, timeout=limit)
    own = None
    for other in range(nodes):  # all ranks must create every group
        group = dist.new_group(list(range(other * ranks, (other + 1) * ranks)), timeout=limit)
        own = group if other == node else own
    figures = {"inside": bandwidth(own, device, BYTES[backend]), "all": bandwidth(None, device, BYTES[backend])}
    print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # as in ranks.exit_now
