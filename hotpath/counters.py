"""What Dynamo did, read from its own counters."""

from __future__ import annotations

from dataclasses import dataclass
from types import CodeType

from torch._dynamo import utils


@dataclass(frozen=True)
class Counts:
    """Process-wide totals at one moment."""

    graphs: int
    breaks: int

    @classmethod
    def now(cls) -> Counts:
        return cls(utils.counters["stats"]["unique_graphs"], sum(utils.counters["graph_break"].values()))


def graphs_so_far() -> int:
    """Graphs compiled in this process: cheap enough to read around every call of a block."""
    return utils.counters["stats"]["unique_graphs"]


def last_guard_failure(code: CodeType) -> str:
    """Why Dynamo last compiled ``code`` again, in its own words."""
    reasons = utils.guard_failures.get(code)
    return reasons[-1].partition(": ")[2] if reasons else "unknown"
