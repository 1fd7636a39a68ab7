"""What PyTorch keeps to itself, and this pack asks, of its own state: what Dynamo counts, which options Inductor has.

Where a newer PyTorch differs, what isn't counted is not told, and what Inductor has no option for is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any


def counted() -> tuple[int, Sequence[Any], Mapping[CodeType, Sequence[str]]]:
    """Graphs that Dynamo made in this process, why graphs broke, and which guards of a code object failed."""
    from torch._dynamo import utils

    made = getattr(utils, "counters", {}).get("stats", {}).get("unique_graphs", 0)
    return made, getattr(utils, "graph_break_reasons", ()), getattr(utils, "guard_failures", {})


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that Inductor has, which compiles with no other: for those that images don't depend on."""
    from torch._inductor import config

    return {name: value for name, value in options.items() if hasattr(config, name)}
