"""Runs a script as ``__main__`` and ends when standard input closes, so that it never outlives whoever started it."""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path


def _end_with_stdin() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    # Like the script's own start: its folder comes first, and this one is not there to shadow its modules.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(script.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    runpy.run_path(str(script), run_name="__main__")
