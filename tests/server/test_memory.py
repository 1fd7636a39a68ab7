"""Compiling takes memory for the compiler and one block, not for the model."""

import sys
from pathlib import Path

import pytest
from live import serve

HIDDEN = 512
# Weights of a double block (36 squares of the hidden size), which is the larger kind, and as much for what it computes.
BLOCK = 2 * 36 * HIDDEN**2 * 4


def peak(live, **options):
    """The most memory that the server held during a prompt, in bytes; writing 5 makes Linux measure anew."""
    process = Path("/proc") / str(live.server.pid)
    (process / "clear_refs").write_text("5")
    live.sample(steps=1, **options)
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def growth(folder, double, single):
    """By how much the first compiled step's peak is above an eager step's."""
    with serve(folder, double, single, hidden=HIDDEN) as live:
        live.sample(steps=1)
        eager, compiled = peak(live, seed=1), peak(live, seed=2, compiled={})
        regions = live.server.report()["regions"]
        assert len(regions) == 2 and all(region["peak_growth"] >= 0 for region in regions)
    return compiled - eager


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.sweep
def test_the_step_that_compiles_takes_a_block_more_than_an_eager_step(tmp_path):
    """And the compiler itself, which is the same for any model and is seen in the small one."""
    assert growth(tmp_path / "large", 9, 17) <= growth(tmp_path / "small", 1, 1) + BLOCK
