"""dev.py bench --offload: predictions beside what was measured, and what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_what_streaming_costs(tmp_path):
    numbers, plot = tmp_path / "offload.json", tmp_path / "offload.svg"
    command = [sys.executable, "-m", "benchmarks.bench", "--offload", "--json", numbers, "--plot", plot]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compared = re.findall(r"^budget .* +([\d.]+) +([\d.]+) ms +([\d.]+) ms$", done.stdout, re.MULTILINE)
    assert len(compared) == 6, done.stdout
    for _, predicted, measured in compared:
        assert abs(float(predicted) / float(measured) - 1) < 0.05, "the model of the bus holds"
    rows = json.loads(numbers.read_text(encoding="utf-8"))
    assert {row["blocks"] for row in rows} == {57, 56} and len(rows) == 20
    kept = json.loads((ROOT / "benchmarks" / "results" / "offload_predicted.json").read_text(encoding="utf-8"))
    for row, known in zip(rows, kept, strict=True):
        assert row["step_ms"] == pytest.approx(known["step_ms"]) and row["resident"] == known["resident"]
    by_name = {(row["model"], row["gib"]): row for row in rows}
    assert by_name["Flux.1 bf16", 24]["resident"] == 57, "all of it fits with modulation made ahead"
    for row in rows:
        steps = list(row["step_ms"].values())
        assert steps == sorted(steps, reverse=True) and all(step >= 0.999 * row["compute_ms"] for step in steps)
    assert not by_name["Flux.2 bf16", 8]["step_ms"], "not even the slots fit"
    assert plot.read_text(encoding="utf-8") == (ROOT / "docs" / "offload.svg").read_text(encoding="utf-8")
