"""The only place that knows ComfyUI: where blocks, weights, options and progress live."""

from __future__ import annotations

import re

import torch
from comfyui_version import __version__

# The oldest and the newest that the tests pass with.
OLDEST_HOST = "0.24.0"
NEWEST_HOST = "0.30.0"
OLDEST_TORCH = "2.7.1"


def check_version(name: str, version: str, oldest: str) -> None:
    """Raise ImportError, which the host shows in its log, for a version older than what the pack was tested with."""
    if _numbers(version) < _numbers(oldest):
        raise ImportError(f"HotPath needs {name} {oldest} or newer and this is {version}. Update {name}.")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


check_version("ComfyUI", __version__, OLDEST_HOST)
check_version("PyTorch", torch.__version__, OLDEST_TORCH)
