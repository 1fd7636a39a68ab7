"""The host's model code in this process on a CUDA device, set up as its main.py does, and the pack beside it."""

from __future__ import annotations

import logging
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(dynamic_vram: bool = True) -> None:
    """Make ``comfy`` and ``hotpath_pack`` importable; with ``dynamic_vram`` the host's default on NVIDIA cards.

    Raises:
        RuntimeError: dynamic VRAM can't be had.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if "hotpath_pack" not in sys.modules:
        pack = types.ModuleType("hotpath_pack")
        pack.__path__ = [str(ROOT)]
        sys.modules["hotpath_pack"] = pack
    # As main.py does: the host's nodes.py puts comfy/ first on the path, whose utils.py would shadow this package.
    import utils.extra_config  # noqa: F401

    if not dynamic_vram:
        return
    import comfy_aimdo.control as aimdo

    aimdo.init()
    aimdo.set_log_error()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = [(device.index, 0) for device in comfy.model_management.get_all_torch_devices()]
    if not aimdo.init_devices(devices):
        raise RuntimeError("dynamic VRAM did not start")
    aimdo.set_log_error()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    logging.getLogger().setLevel(logging.WARNING)
