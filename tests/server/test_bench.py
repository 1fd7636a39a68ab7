"""The counts of ``dev.py bench``: ours beside every other way to compile, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.sweep
def test_ours_makes_two_graphs_where_the_others_make_more(tmp_path):
    written = tmp_path / "counts.json"
    command = [sys.executable, str(ROOT / "dev.py"), "bench", "--blocks", "4+6", "--quick", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert table[0] == "| | eager | whole model | per block | diffusers | ours |"
    assert not [line for line in table if " s)" in line], "no time is given where no code was generated"
    sides = json.loads(written.read_text())["sides"]
    first = {name: side["graphs"] for name, side in sides.items()}
    assert first == {"eager": 0, "whole model": 1, "per block": 2, "diffusers": 3, "ours": 2}
    later = {name: {event: done["graphs"] for event, done in side["events"].items()} for name, side in sides.items()}
    batch = later["ours"].pop("batch of 2")
    assert set(later["ours"].values()) == {2} and batch == 4
    assert all(later[name]["192x192"] > first[name] for name in ("whole model", "per block", "diffusers"))
    assert all(later[name]["70 % offloaded"] > later[name]["LoRA off"] for name in ("whole model", "per block"))
    assert "70 % offloaded" not in later["diffusers"]
    assert all(side["largest_difference"] <= 1e-4 for side in sides.values())
