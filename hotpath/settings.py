"""How regions are compiled, as a user sets it."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = ("auto", "always", "never")
CUDA_GRAPH_MODES = frozenset({"reduce-overhead", "max-autotune"})


class CompileSettingsError(ValueError):
    """A combination of settings that can't work; the message says what to choose."""


@dataclass(frozen=True)
class CompileSettings:
    """Arguments of ``torch.compile``, plus how dimensions become dynamic.

    ``dynamic``: ``auto`` makes the token dimensions dynamic from the first graph on and lets Dynamo widen the
    batch when it changes; ``always`` makes the batch dynamic from the start too; ``never`` compiles one graph
    for each shape.

    Raises:
        CompileSettingsError: an unknown mode or ``dynamic``, or a mode given to a backend without modes.
    """

    mode: str = "default"
    backend: str = "inductor"
    fullgraph: bool = True
    dynamic: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CompileSettingsError(f"mode: {self.mode!r} is unknown. Choose one of {', '.join(MODES)}.")
        if self.dynamic not in DYNAMIC:
            raise CompileSettingsError(f"dynamic: {self.dynamic!r} is unknown. Choose one of {', '.join(DYNAMIC)}.")
        if self.mode != "default" and self.backend != "inductor":
            raise CompileSettingsError(
                f"mode: {self.mode!r} is a setting of the inductor backend. With {self.backend!r} choose 'default'."
            )

    def graph_limit(self, streams: int) -> int:
        """How many graphs a region may have before something must be wrong.

        Expected are one for the first batch size (``auto``), one for any, and as Dynamo gives a dimension of size 1 a
        graph of its own, one for each dynamic dimension that may be 1. Twice that, since graphs depend on switches
        of the process too, such as TF32, which a node may turn.

        Args:
            streams: how many inputs have a token count of their own.
        """
        if self.dynamic == "never":
            return 2
        batches = 3 if self.dynamic == "auto" else 2
        return 2 * batches * 2**streams
