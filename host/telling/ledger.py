"""What a node that compiles has to tell: what became of its blocks, what compiling cost, how fast a step is."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Hashable

from comfy.model_base import BaseModel

from ...hotpath.artifacts import FIRST_TIME
from ...hotpath.compiled import Region
from ...hotpath.reasons import how_to_avoid
from ...hotpath.settings import CompileSettings
from ...hotpath.stats import Cost
from ..compiling.replay import Replays
from ..measuring.eager_steps import eager_seconds, note_quickest
from ..structure import unknown_structure
from .accounting import CallAccount, Reasons, which
from .progress import NodeText, StepClock

log = logging.getLogger(__name__)

# As many reasons are shown at once.
_FEW = 3
_COPIED = "weights of {} blocks are copied to the device at each step"
_COPIED_AHEAD = "put Offload Repeated Blocks before this node, which copies them while other blocks compute"


class Ledger:
    """The accounts of one node; ``account`` is that of the last call that ended. Several threads may write it."""

    def __init__(self, settings: CompileSettings, text: NodeText, replays: Replays) -> None:
        self.settings = settings
        self.text = text
        self.replays = replays
        self.account = CallAccount({})
        self.calls = self.calls_without = 0
        self.regions: dict[Region, None] = {}
        self.seconds = 0.0
        self.load_seconds = 0.0
        self.recompiles: list[str] = []
        self.clock = StepClock()
        self._lock = threading.Lock()
        self._shown_before = 0
        self._told: set[str] = set()
        self._quickest: dict[Hashable, float] = {}

    @property
    def compiled(self) -> Counter[str]:
        """How many blocks of each kind ran compiled in the last call."""
        return self.account.compiled

    @property
    def eager(self) -> Reasons:
        """The blocks that ran eager in the last call, by reason."""
        return self.account.eager

    @property
    def not_run(self) -> Reasons:
        """The blocks that did not run in the last call, by reason."""
        return self.account.not_run

    def start_run(self) -> None:
        """A sampling run begins: the node shows what is new in it."""
        self._shown_before = len(self.recompiles)
        self.calls = self.calls_without = 0

    def close(self, account: CallAccount) -> None:
        """A call has ended."""
        with self._lock:
            self.account = account
            self.calls += 1
            self.calls_without += not account.entered

    def summary(self) -> str:
        """One line for the node: what is compiled, what it took, what runs eager or did not run, and why."""
        account, parts = self.account, []
        if account.compiled:
            blocks = " and ".join(f"{count} {name}" for name, count in account.compiled.items())
            took = [f"compiled in {self.seconds:.1f} s"] if self.seconds else []
            took += [f"loaded in {self.load_seconds:.2f} s"] if self.load_seconds else []
            parts.append(f"{blocks} blocks run as {len(self.regions)} regions, {', '.join(took) or 'compiled earlier'}")
            # That nothing was stored yet goes without saying.
            states = {region.stats.cache.removeprefix(FIRST_TIME).removeprefix("; ") for region in self.regions}
            parts += [f"cache {state}" for state in sorted(states) if state.startswith(("miss", "not stored"))]
        if account.eager or account.not_run:
            parts.append(account.line())
        if self.calls_without:
            parts.append(f"{self.calls_without} of {self.calls} steps ran none of them")
        if self.recompiles:
            parts.append(f"compiled again: {', '.join(self.recompiles[-_FEW:])}{self._advice()}")
        parts += [f"eager: {reason} ({which(names)})" for reason, names in account.eager.items()]
        parts += [f"did not run: {reason} ({which(names)})" for reason, names in account.not_run.items()]
        if account.eager and unknown_structure():
            parts.append(unknown_structure())
        if account.copied:
            parts.append(f"{_COPIED.format(account.copied)}: {_COPIED_AHEAD}")
        if self.replays.summary():
            parts.append(self.replays.summary())
        return "; ".join(parts)

    def note_cost(self, region: Region, cost: Cost) -> None:
        """A call of ``region`` has ended, and took this beyond running it."""
        with self._lock:
            again = region not in self.regions and any(known.name == region.name for known in self.regions)
            if again and cost.seconds and self.settings.dynamic == "never":
                self._note_recompile("another size")
            for reason in cost.recompiles:
                self._note_recompile(reason)
            self.regions.setdefault(region)
            self.seconds += cost.seconds
            self.load_seconds += cost.load_seconds

    def _note_recompile(self, reason: str) -> None:
        if reason not in self.recompiles:
            self.recompiles.append(reason)
            log.warning("compiled again: %s%s", reason, self._advice())

    def _advice(self) -> str:
        """The settings that would have kept the model from compiling again, in brackets."""
        advice = {how_to_avoid(reason, self.settings.dynamic) for reason in self.recompiles} - {""}
        return f" ({'; '.join(sorted(advice))})" if advice else ""

    def tell(self, reason: str, what: str) -> None:
        """Log why ``what`` runs eager, once for each reason."""
        if reason not in self._told:
            self._told.add(reason)
            log.warning("%s runs without HotPath: %s", what, reason)

    def show(self, model: BaseModel, account: CallAccount, kind: Hashable) -> None:
        """Tell the node what a step was, and its gain where an eager one of this ``kind`` was measured."""
        facts: dict[str, str | float] = {"ran": account.line()}
        if account.compiled:
            facts["blocks"] = ", ".join(f"{count} {name}" for name, count in account.compiled.items())
            facts["graphs"] = sum(region.stats.graphs + region.stats.loaded for region in self.regions)
        if self.seconds:
            facts["compile_seconds"] = self.seconds
        if self.load_seconds:
            facts["load_seconds"] = self.load_seconds
        last = self.clock.last()
        # On a GPU that of a step before, which is known to have ended.
        if last is not None and last[1][0] == kind and account.whole:
            seconds, (_, timed) = last
            facts["step_seconds"] = seconds
            eager = eager_seconds(model, kind)
            if not timed.eager:
                quickest = note_quickest(self._quickest, seconds, kind)
                if eager is not None and not account.eager:
                    facts["eager_step_seconds"] = eager
                    facts["gain"] = eager / quickest
        reasons = [
            (f"compiled again: {reason}", how_to_avoid(reason, self.settings.dynamic))
            for reason in self.recompiles[self._shown_before :][-_FEW:]
        ]
        state = "recompiled" if reasons else "compiled"
        if account.eager:
            state = "eager"
        elif not account.compiled:
            state = "skipped"
        reasons += [(f"{which(names)} eager: {reason}", "") for reason, names in account.eager.items()]
        if account.eager and unknown_structure():
            reasons.append((unknown_structure(), ""))
        reasons += [(f"{which(names)} did not run: {reason}", "") for reason, names in account.not_run.items()]
        if account.copied:
            reasons.append((_COPIED.format(account.copied), _COPIED_AHEAD))
        self.text.show(self.summary(), state, reasons, **facts)
