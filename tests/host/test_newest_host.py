"""ComfyUI's newest structure of Flux blocks, in a copy of this one, until a release that has it can be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hotpath_pack.devtools.newest_host import is_newest, make_newest

HERE = Path(__file__).parent
# What guards a kind of thing each, of tests that every host runs.
CHOSEN = "structure or (model and every_model) or (patches and combine)"


def test_blocks_of_the_newest_structure(tmp_path):
    host = Path(os.environ["COMFYUI_PATH"])
    if is_newest(host):
        pytest.skip("this ComfyUI has it, so that its tests run in it")
    env = {**os.environ, "COMFYUI_PATH": str(make_newest(host, tmp_path / "ComfyUI"))}
    files = [HERE / name for name in ("test_newest_structure.py", "test_patches.py")]
    line = [sys.executable, "-m", "pytest", "-c", HERE.parent / "pytest.ini", *files, "-k", CHOSEN, "-n", "0", "-q"]
    done = subprocess.run(line, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
