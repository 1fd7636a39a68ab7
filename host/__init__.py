"""The only place that knows ComfyUI: where blocks, weights, options and progress live."""

from __future__ import annotations

import re

from comfyui_version import __version__

OLDEST_HOST = "0.24.0"


def check_host(version: str) -> None:
    """Raise ImportError, which the host shows in its log, for a ComfyUI older than what the pack was tested with."""
    if _numbers(version) < _numbers(OLDEST_HOST):
        raise ImportError(f"HotPath needs ComfyUI {OLDEST_HOST} or newer and this is {version}. Update ComfyUI.")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


check_host(__version__)
