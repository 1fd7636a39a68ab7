"""ComfyUI's newest structure of Flux blocks, in a copy of this one, until a release that has it can be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_version import __version__
from hotpath_pack.devtools.newest_host import make_newest
from hotpath_pack.host import NEWEST_HOST

HERE = Path(__file__).parent


pytestmark = pytest.mark.skipif(
    __version__ != NEWEST_HOST, reason="the copy is made from the newest ComfyUI that can be installed"
)


def run_in_copy(folder, selection, number):
    """Run as many tests of its structure as are selected."""
    env = {**os.environ, "COMFYUI_PATH": str(make_newest(Path(os.environ["COMFYUI_PATH"]), folder / "ComfyUI"))}
    line = [sys.executable, "-m", "pytest", "-c", HERE.parent / "pytest.ini", HERE / "test_newest_structure.py"]
    line += ["-k", selection, "-n", "0", "-q"]
    done = subprocess.run(line, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{number} passed" in done.stdout


def test_nothing_runs_eager_and_what_a_block_prefers_is_honoured(tmp_path):
    run_in_copy(tmp_path, "nothing_runs_eager or honoured or brings_one", 3)


@pytest.mark.sweep
def test_what_is_kept_and_patches_around_attention(tmp_path):
    run_in_copy(tmp_path, "are_kept or goes_with_patches", 3)
