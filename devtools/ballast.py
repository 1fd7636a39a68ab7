"""Makes a large CUDA card a small one: another process holds all of its memory but what the small one has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GIB = 2**30
# What the host's dynamic VRAM leaves free of a card by itself.
_HEADROOM = 2**28
# Ends with this process, however it ends, as the pipe is closed then.
_HOLD = """
import sys, torch
torch.zeros(1, device="cuda")
free = torch.cuda.mem_get_info()[0]
held = torch.empty(max(0, free - int(float(sys.argv[1]))), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def small_card(gib: float, told: bool = False) -> Iterator[float]:
    """Leave ``gib`` GiB of the current CUDA card free within the scope; gives what is free then, in GiB.

    This process should hold nothing else on the card. ``told``: the host's dynamic VRAM, where it runs, counts with a
    card of this size; else it finds the memory gone as when another program took it.
    """
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    command = [sys.executable, "-c", _HOLD, str(gib * GIB)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.strip():
                raise RuntimeError("no process could hold the rest of the card's memory")
            free = int(line)
            if told:
                _set_headroom(torch.cuda.mem_get_info()[1] - free + _HEADROOM)
            yield free / GIB
        finally:
            if told:
                _set_headroom(_HEADROOM)
            process.stdin.close()
            process.wait()


def _set_headroom(size: int) -> None:
    import comfy_aimdo.control as aimdo

    if aimdo.lib is not None:
        aimdo.lib.set_simple_vram_headroom(size)
