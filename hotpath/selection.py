"""Which blocks of a list the user asked for."""

from __future__ import annotations

import re

_RANGE = re.compile(r"([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?")
# As much of a text that can't be read as an error repeats.
_QUOTED = 40


def check_selection(name: str, text: str) -> None:
    """Raise ValueError when ``text`` is not ``all``, ``none`` or ranges such as ``0-9,12``."""
    _ranges(name, text)


def select_blocks(name: str, text: str, count: int) -> frozenset[int]:
    """Indices named by ``text`` in a list of ``count`` blocks.

    Args:
        name: the input's name, for the error text, such as ``double_blocks``.
        text: ``all``, ``none``, or comma-separated indices and inclusive ranges: ``0-9,12``.
        count: how many blocks the model has.

    Raises:
        ValueError: the text is malformed, a range runs backwards, or an index is outside the model.
    """
    ranges = _ranges(name, text)
    if ranges is None:
        return frozenset(range(count))
    selected = {index for first, last in ranges for index in range(first, min(last, count) + 1)}
    outside = [last for _, last in ranges if last >= count]
    if outside:
        has = f"{count} (0-{count - 1})" if count else "none"
        raise ValueError(f"{name}: block {outside[0]} is outside this model, which has {has}.")
    return frozenset(selected)


def _ranges(name: str, text: str) -> list[tuple[int, int]] | None:
    """Inclusive ranges of ``text``; None stands for all blocks."""
    words = text.strip().lower()
    if words == "all":
        return None
    if words == "none":
        return []
    ranges = []
    for part in words.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"{name}: cannot read {part.strip()[:_QUOTED]!r}. Use 'all', 'none' or ranges such as '0-9,12'."
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise ValueError(f"{name}: the range {part.strip()!r} runs backwards. Write '{last}-{first}'.")
        ranges.append((first, last))
    return ranges
