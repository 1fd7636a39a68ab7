"""The host's model code on a CUDA device. Run this folder alone: the host's tests put the host on the CPU."""

import os
import sys

import pytest
import torch

if torch.cuda.is_available() and os.environ.get("COMFYUI_PATH"):
    from hotpath_pack.devtools import gpu_host

    if "comfy" not in sys.modules:
        gpu_host.start()


@pytest.fixture(autouse=True)
def host_on_the_gpu():
    if sys.modules["comfy.cli_args"].args.cpu:
        pytest.skip("the host is on the CPU; run tests/gpu alone")
