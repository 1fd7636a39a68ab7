"""Compiler backends that make sense for inference on this machine."""

from __future__ import annotations

import importlib.util

from torch._dynamo import list_backends

# cudagraphs copies inputs at each replay, and a region's weights are inputs.
_UNSUITABLE = frozenset({"cudagraphs"})
_NEEDS = {"tvm": "tvm", "openxla": "torch_xla", "onnxrt": "onnxruntime"}
_DIAGNOSTIC = ("aot_eager", "eager")


def available_backends() -> list[str]:
    """Backends of ``torch._dynamo.list_backends()`` whose package is installed, inductor first, then those that
    generate no code and serve to find out where a problem lies."""
    others = [
        name
        for name in list_backends()
        if name != "inductor"
        and name not in _UNSUITABLE
        and (name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]))
    ]
    return ["inductor", *others, *_DIAGNOSTIC]
