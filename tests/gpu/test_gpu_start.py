"""On a CUDA device: what one process compiles, the next loads, with its Triton kernels and without a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hotpath_pack.hotpath import graphs

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
]

PROCESS = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
pack = types.ModuleType("hotpath_pack")
pack.__path__ = [sys.argv[1]]
sys.modules["hotpath_pack"] = pack
from hotpath_pack.devtools import gpu_host
gpu_host.start()
import folder_paths, torch
folder_paths.set_user_directory(sys.argv[2])
from hotpath_pack.host.compile import REGIONS, compile_repeated_blocks
from hotpath_pack.host.progress import NodeText
from hotpath_pack.hotpath.compiled import CompileSettings
from hotpath_pack.hotpath.counters import graphs_so_far

dtype, shape = (torch.bfloat16, dict(hidden=3072)) if sys.argv[3] == "large" else (torch.float32, {})
model = gpu_host.load(2, 3, dtype, sys.argv[3] if sys.argv[3].startswith("int8") else None, **shape)
eager = {run: gpu_host.sample(model, **dict(run)) for run in ((), (("tokens", 77),), (("size", (320, 320)),))}
started = []
sys.addaudithook(lambda event, given: started.append(str(given[0])) if event == "subprocess.Popen" else None)
fast = compile_repeated_blocks(model, CompileSettings(), "all", "all", "error", NodeText(None), "auto")
differences = [
    ((gpu_host.sample(fast, **dict(run)) - want).norm() / want.norm()).item() for run, want in eager.items()
]
print(json.dumps({
    "differences": differences,
    "graphs": graphs_so_far(),
    "frames": sum(torch._dynamo.utils.counters["frames"].values()),
    "started": started,
    "states": sorted({region.stats.cache for region in REGIONS}),
    "loading": sum(region.stats.load_seconds for region in REGIONS),
    "tuned": "CachingAutotuner.benchmark_all_configs" in torch._dynamo.utils.compilation_time_metrics,
}))
"""


def start(tmp_path, name, kind, **env):
    """A process with compiler caches of its own."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "TRITON_CACHE_DIR": str(tmp_path / f"{name}-triton")}
    command = [sys.executable, "-c", PROCESS, str(ROOT), str(tmp_path / "user"), kind]
    done = subprocess.run(command, env={**os.environ, **caches, **env}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-5), ("int8_tensorwise", 0.05), ("large", 0.02)])
def test_the_second_start_compiles_nothing_and_starts_no_process(tmp_path, kind, tolerance):
    """Triton builds a module of its own for the driver with the C compiler when its cache is empty."""
    first = start(tmp_path, "first", kind)
    assert first["tuned"] and (first["graphs"], first["states"]) == (2, ["miss: nothing was stored yet"])
    second = start(tmp_path, "second", kind)
    assert (second["graphs"], second["frames"], second["states"]) == (0, 0, ["hit"])
    assert max(first["differences"] + second["differences"]) < tolerance
    assert not [path for path in (tmp_path / "second").rglob("*.py")], "Inductor generated code"
    assert second["loading"] < 1
    assert second["started"] == [] and not second["tuned"]
