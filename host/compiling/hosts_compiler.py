"""ComfyUI's own compiler, which from 0.34 on plans the memory of some models and records their blocks as CUDA graphs.

It expects a step to take memory as the one before did, and ends the prompt where code that compiles or records itself
does otherwise. The host looks at its switch when it enters a model, within ``apply_model``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from comfy.cli_args import args

_SWITCH = "disable_comfy_compiler"
_lock = threading.Lock()
_calls = 0


@contextmanager
def hosts_compiler_off() -> Iterator[None]:
    """A scope in which the host enters no model with its own compiler; scopes of several threads may overlap."""
    global _calls
    if not hasattr(args, _SWITCH):
        yield
        return
    with _lock:
        # A user's own choice is not to be taken back, nor is another pack's while it lasts.
        ours = _calls > 0 or not getattr(args, _SWITCH)
        if ours:
            _calls += 1
            setattr(args, _SWITCH, True)
    try:
        yield
    finally:
        if ours:
            with _lock:
                _calls -= 1
                if not _calls:
                    setattr(args, _SWITCH, False)
