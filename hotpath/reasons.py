"""Dynamo's reasons for compiling again, in words of the field's users."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\['([\w.]+)'\]+' size mismatch at index (\d+)\. expected (\d+), actual (\d+)")
_KIND = re.compile(r"\['([\w.]+)'\]+' (dtype|device|stride|rank|requires_grad) mismatch")


def plain_reason(reason: str) -> str:
    """``batch size changed from 1 to 2`` for what Dynamo says of a guard; its own words where there are no better."""
    if size := _SIZE.search(reason):
        name, dimension, before, after = size.groups()
        what = "batch size" if dimension == "0" else f"size {dimension} of {name}"
        return f"{what} changed from {before} to {after}"
    if kind := _KIND.search(reason):
        return f"{kind[2]} of {kind[1]} changed"
    return reason.strip() or "unknown"


def how_to_avoid(reason: str, dynamic: str) -> str:
    """The setting that keeps a plain ``reason`` from compiling again; empty when none does."""
    if dynamic == "auto" and reason.startswith("batch size changed"):
        return "dynamic: 'always' compiles for any batch size at once"
    if dynamic == "never":
        return "dynamic: 'auto' compiles once for all sizes"
    return ""
