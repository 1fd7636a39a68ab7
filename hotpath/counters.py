"""What Dynamo did, by what it counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary
from types import CodeType

from .internals.state import counted
from .reasons import THROWN_AWAY, plain_reason

log = logging.getLogger(__name__)


def graphs_so_far() -> int:
    """Graphs compiled in this process: cheap enough to read around every call of a block."""
    return counted()[0]


def breaks_so_far() -> int:
    """Graph breaks of this process."""
    return len(counted()[1])


def breaks_since(breaks: int) -> list[str]:
    """Where and why graphs broke after the first ``breaks`` of this process."""
    reasons = counted()[1][breaks:]
    return [f"{next(iter(reason.reason.splitlines()), '')}{source_line(reason.user_stack)}" for reason in reasons]


def source_line(stack: Sequence[FrameSummary]) -> str:
    """`` (layers.py:228)`` for the innermost frame of what was traced; empty when there is none."""
    return f" ({Path(stack[-1].filename).name}:{stack[-1].lineno})" if stack else ""


def guard_failures(code: CodeType) -> list[str]:
    """Why Dynamo compiled ``code`` again each time, in its own words."""
    return [told.partition(": ")[2] or told for told in counted()[2].get(code, ())]


def why_compiled_again(code: CodeType, older: int, ahead: str) -> str:
    """In plain words, why ``code`` was compiled again: by what a graph compiled ahead of time said, or by the guards
    that failed since there were ``older``."""
    told = [ahead] if ahead else guard_failures(code)[older:]
    log.debug("%s was compiled again: %s", code.co_name, told)
    return plain_reason(told[-1]) if told else THROWN_AWAY
