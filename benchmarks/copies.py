"""Ways to give each of several GPUs the keys and values of the others, as Split Repeated Blocks does once a block.

    python -m benchmarks.copies [--devices N] [--tokens N ...] [--json FILE]

Of Flux.1-dev's width in bf16: 24 heads of 128, keys and values. Each way moves the same bytes into memory that is
there; microseconds are from the first launch on any device to the end on the last, medians of many in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from devtools import gpu_host
from devtools.cli import positive, print_table, run_tool, write_json

HEADS, DIM = 24, 128
# Of 1024x1024 and of 2048x2048, with 512 of text.
TOKENS = (4608, 16896)
ROUNDS = 200


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.copies", description=__doc__)
    parser.add_argument("--devices", type=positive, default=2, metavar="N")
    parser.add_argument("--tokens", type=positive, nargs="+", default=TOKENS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    devices = [torch.device("cuda", index) for index in range(given.devices)]
    rows = []
    for tokens in given.tokens:
        shares = [torch.randn(2, HEADS, tokens // len(devices), DIM, device=each).bfloat16() for each in devices]
        moved = shares[0].nbytes * (len(devices) - 1)
        for name, took in in_turns({"peer copies": peer_copies(shares), "NCCL": nccl(shares)}, devices).items():
            rows.append({"name": name, "tokens": tokens, "us": took, "GB/s": moved / took / 1e3})
    print_table([("", "  tokens        us    GB/s a device"), *map(_line, rows)])
    if given.json:
        write_json(given.json, {**gpu_host.about(), "devices": given.devices, "rows": rows})
    return 0


def peer_copies(shares: Sequence[Tensor]) -> Callable[[], None]:
    """Copies by the device that takes, each on a stream of its own."""
    wanted = [(mine, other) for mine in range(len(shares)) for other in range(len(shares)) if mine != other]
    room = {pair: torch.empty_like(shares[pair[1]], device=shares[pair[0]].device) for pair in wanted}
    streams = [torch.cuda.Stream(share.device) for share in shares]

    def work() -> None:
        for mine, other in wanted:
            with torch.cuda.stream(streams[mine]):
                room[mine, other].copy_(shares[other], non_blocking=True)

    return work


def nccl(shares: Sequence[Tensor]) -> Callable[[], None]:
    """NCCL's all-gather from one process, by PyTorch."""
    room = [torch.empty(len(shares), *share.shape, dtype=share.dtype, device=share.device) for share in shares]
    return lambda: torch.cuda.nccl.all_gather(shares, room)


def in_turns(ways: Mapping[str, Callable[[], None]], devices: Sequence[torch.device]) -> dict[str, float]:
    """Microseconds of each way; the first rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            wait(devices)
            started = time.perf_counter()
            work()
            wait(devices)
            times[name].append((time.perf_counter() - started) * 1e6)
    return {name: median(each[ROUNDS // 10 :]) for name, each in times.items()}


def wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _line(row: dict[str, float]) -> tuple[object, object]:
    return row["name"], f"{row['tokens']:8}{row['us']:10.1f}{row['GB/s']:17.0f}"


if __name__ == "__main__":
    run_tool(main)
