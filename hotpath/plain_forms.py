"""Operators that stand for a few elementwise ones, in a form that Inductor makes one kernel of with those around them.

Each is a kernel of its own in eager mode and opaque in a graph, where it would keep the addition before a norm and the
quantization after it apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer


def _adaln(x: Any, scale: Any, shift: Any, eps: float) -> Any:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _rms_adaln(x: Any, scale: Any, shift: Any, eps: float) -> Any:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


# As the operators of comfy-kitchen are defined, whose kernels compute in float32 as Inductor's do.
_FORMS: dict[str, Callable[..., Any]] = {
    "comfy_kitchen::adaln": _adaln,
    "comfy_kitchen::rms_adaln": _rms_adaln,
}


def plain_forms(graph: Graph) -> None:
    """Replace each such operator in a graph as Dynamo traced it."""
    for node in list(graph.nodes):
        form = _FORMS.get(_operator(node))
        if form is not None:
            with graph.inserting_before(node):
                tracer = GraphAppendingTracer(graph)
                taken = [Proxy(value, tracer) if isinstance(value, Node) else value for value in node.args]
                node.replace_all_uses_with(form(*taken, **node.kwargs).node)
            graph.erase_node(node)


def _operator(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else ""
