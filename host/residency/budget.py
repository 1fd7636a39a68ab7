"""How much of a MODEL may be on the device, as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
_BUDGET = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>gib|gb|g|%)?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """The bytes of a MODEL that may be on the device: all that are free, a number, or a share of the MODEL."""

    number: float | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``auto``, a number of GiB such as ``10`` or ``10 GiB``, or a share such as ``50 %``.

        Raises:
            ValueError: anything else.
        """
        given = text.strip() if isinstance(text, str) else ""
        found = _BUDGET.fullmatch(given)
        if given.lower() == "auto":
            return cls()
        if found is None or (found["unit"] == "%" and float(found["number"]) > 100):
            raise ValueError(
                f"budget: {text!r} is no budget. Write 'auto', a number of GiB such as '10' or '10 GiB', or a share of "
                "the model from '0 %' to '100 %'."
            )
        if found["unit"] == "%":
            return cls(share=float(found["number"]) / 100)
        return cls(number=float(found["number"]) * GIB)

    def bytes(self, whole: int) -> float:
        """The bytes of a MODEL of ``whole`` bytes that may be on the device."""
        if self.share is not None:
            return self.share * whole
        return float("inf") if self.number is None else self.number
