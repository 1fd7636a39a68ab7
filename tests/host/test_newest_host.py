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


@pytest.mark.skipif(__version__ != NEWEST_HOST, reason="the copy is made from the newest ComfyUI that can be installed")
def test_blocks_of_the_newest_structure(tmp_path):
    host = Path(os.environ["COMFYUI_PATH"])
    env = {**os.environ, "COMFYUI_PATH": str(make_newest(host, tmp_path / "ComfyUI"))}
    tests = [HERE / "test_newest_structure.py", f"{HERE / 'test_patches.py'}::test_patches_combine"]
    line = [sys.executable, "-m", "pytest", "-c", HERE.parent / "pytest.ini", *tests, "-n", "0", "-q"]
    done = subprocess.run(line, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
