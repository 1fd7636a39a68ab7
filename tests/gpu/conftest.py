"""The host's model code on a CUDA device. Run this folder alone: the host's tests put the host on the CPU.

``HOTPATH_CARD=12`` runs it on a card of which 12 GiB are free; another process holds the rest.
"""

import os
import sys
from contextlib import nullcontext

import pytest
import torch
from hotpath_pack.devtools.ballast import small_card

CARD = os.environ.get("HOTPATH_CARD")

if torch.cuda.is_available() and os.environ.get("COMFYUI_PATH"):
    from hotpath_pack.devtools import gpu_host

    if "comfy" not in sys.modules:
        gpu_host.start()


@pytest.fixture(autouse=True, scope="session")
def card_of_any_size():
    with small_card(float(CARD)) if CARD and torch.cuda.is_available() else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def first_run_is_over(card_of_any_size):
    """A process's first run rounds otherwise than all that follow, by 4e-3 in bf16, of any model without a node of this
    pack; what is compared to the bit comes after it."""
    if torch.cuda.is_available() and not sys.modules["comfy.cli_args"].args.cpu:
        gpu_host.sample(gpu_host.load(1, 1, torch.bfloat16, hidden=2048), steps=1)


@pytest.fixture(autouse=True)
def host_on_the_gpu():
    if sys.modules["comfy.cli_args"].args.cpu:
        pytest.skip("the host is on the CPU; run tests/gpu alone")
