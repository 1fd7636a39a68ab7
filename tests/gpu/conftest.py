"""The host's model code on a CUDA device. Run this folder alone: the host's tests put the host on the CPU."""

import os
import sys

import pytest
import torch

if torch.cuda.is_available() and os.environ.get("COMFYUI_PATH"):
    from hotpath_pack.devtools import gpu_host

    if "comfy" not in sys.modules:
        gpu_host.start()


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.nodeid or item.nodeid.startswith("gpu/"):
            item.add_marker(pytest.mark.gpu)
            if "comfy.cli_args" in sys.modules and sys.modules["comfy.cli_args"].args.cpu:
                item.add_marker(pytest.mark.skip(reason="the host is on the CPU; run tests/gpu alone"))
