"""What the command line tools share: arguments, a progress line, and errors as one sentence."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .checkpoints import FluxFile, NotFlux, describe
from .server import HostFailed, PromptFailed, PromptInterrupted


class Progress:
    """One line that changes on a terminal; elsewhere one line a stage."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._stage = ""

    def stage(self, name: str) -> None:
        self._stage = name
        self._write(f"\r\x1b[K{name} ..." if self._terminal else f"{name} ...\n")

    def detail(self, text: str) -> None:
        if self._terminal:
            self._write(f"\r\x1b[K{self._stage}: {text}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._write(f"{text}\n")

    def done(self) -> None:
        if self._terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def run_tool(main: Callable[[Sequence[str]], int]) -> None:
    """Exit with what ``main`` returns; 1 and a sentence for an expected failure, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
        print("\nInterrupted.", file=sys.stderr)
    except (HostFailed, PromptFailed, PromptInterrupted, NotFlux, TimeoutError, OSError) as error:
        status = 1
        print(f"\n{error}", file=sys.stderr)
    sys.exit(status)


def comfyui_folder() -> Path:
    """The host that dev.py chose."""
    return Path(os.environ["COMFYUI_PATH"])


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--steps``, ``--size`` and ``--json``."""
    parser.add_argument("--model", type=_flux, metavar="FILE", help="a Flux in safetensors; default: a tiny Flux.1")
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="sampling steps (default: 4)")
    parser.add_argument(
        "--size", type=_size, metavar="WxH", help="image size (default: 256x256, with --model 1024x1024)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")


def write_json(path: Path, numbers: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Rows of a name and a value, with the values aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _flux(text: str) -> tuple[Path, FluxFile]:
    path = Path(text)
    try:
        return path.resolve(), describe(path)
    except NotFlux as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't read {path}: {error.strerror}.") from None


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more.")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not width or not height or width % 16 or height % 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH in multiples of 16, such as 256x256.")
    return width, height
