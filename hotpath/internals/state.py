"""What Dynamo counts, which options Inductor has, whether there are hooks into every module or modes around every
function, and a stand-in for a device that tracing puts into a table.

Where a newer PyTorch differs, what isn't counted is not told, what Inductor has no option for is not asked, there may
be hooks and modes, and nothing is put into that table.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch.utils._device import DeviceContext


def counted() -> tuple[int, Sequence[Any], Mapping[CodeType, Sequence[str]]]:
    """Graphs that Dynamo made in this process, why graphs broke, and which guards of a code object failed."""
    from torch._dynamo import utils

    made = getattr(utils, "counters", {}).get("stats", {}).get("unique_graphs", 0)
    return made, getattr(utils, "graph_break_reasons", ()), getattr(utils, "guard_failures", {})


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that Inductor has, which compiles with no other: for those that images don't depend on."""
    from torch._inductor import config

    return {name: value for name, value in options.items() if hasattr(config, name)}


def any_global_hook() -> bool:
    """Whether there may be a hook that is called around every module."""
    module = torch.nn.modules.module
    asked = getattr(module, "_has_any_global_hook", None)
    if asked is not None:
        return bool(asked())
    return any(getattr(module, name, True) for name in ("_global_forward_hooks", "_global_forward_pre_hooks"))


def any_mode() -> bool:
    """Whether there may be code of others around each function or operator of this thread, beside PyTorch's own for a
    default device."""
    functions = getattr(torch.overrides, "_get_current_function_mode_stack", None)
    operators = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode", None)
    if functions is None or operators is None:
        return True
    return operators() is not None or any(type(mode) is not DeviceContext for mode in functions())


def anything_around() -> bool:
    """Whether there may be code of others around every module, function or operator of this thread."""
    return any_global_hook() or any_mode()


@lru_cache
def keep_device_guard() -> None:
    """Let PyTorch trace in any thread.

    Built for CUDA and on a machine without such a device, it puts a stand-in for the device into a table of the process
    when it first traces, and the stand-in's memory is that of the thread: once that has ended the next trace crashes.
    So it is put there by a thread that does not end.
    """
    put = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    if put is None or torch.cuda.is_available():
        return
    done = threading.Event()

    def put_and_stay() -> None:
        put()
        done.set()
        threading.Event().wait()

    threading.Thread(target=put_and_stay, name="hotpath device guard", daemon=True).start()
    done.wait()
