"""What a region costs beyond running it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RegionStats:
    """What one region has cost so far.

    ``seconds`` is wall time of the calls that compiled, and ``peak_growth`` how many bytes those calls raised the peak
    memory of the device (on a CPU, of this process). ``breaks`` and ``recompiles`` are the reasons for graph breaks
    and for all graphs after the first, in plain words. ``loaded`` graphs were compiled by an earlier process, and
    ``cache`` says what came of looking for them.
    """

    graphs: int = 0
    seconds: float = 0.0
    loaded: int = 0
    load_seconds: float = 0.0
    cache: str = "off"
    peak_growth: int = 0
    limit_reached: bool = False
    breaks: list[str] = field(default_factory=list)
    recompiles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """What one call of a region took beyond running it: seconds of compiling and of loading, and why it was compiled
    again."""

    seconds: float = 0.0
    load_seconds: float = 0.0
    recompiles: tuple[str, ...] = ()


NO_COST = Cost()
