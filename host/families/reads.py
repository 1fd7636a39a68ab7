"""Which of the host's options the code of a block reads, found in that code: a region gives its block those alone that
its family knows of, so that a newer block would miss the others without a word."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from ...hotpath.template import functions_of

# Of a key that is no constant, and of code that can't be looked at.
ANY = "?"
_MODELS = "comfy.ldm."


def options_read(block: type[nn.Module]) -> frozenset[str]:
    """The keys of ``transformer_options`` that the host's class ``block``, and what it uses of the host's models, reads
    by this name; ``ANY`` where that can't be told."""
    seen: set[FunctionType] = set()
    for kind in block.__mro__:
        if kind.__module__.startswith(_MODELS):
            _reach_class(kind, seen)
    return frozenset(key for function in seen for key in _keys(function))


def _reach_class(kind: type, seen: set[FunctionType]) -> None:
    for _, function in functions_of(kind):
        _reach(function, seen)


def _reach(function: FunctionType, seen: set[FunctionType]) -> None:
    """Add ``function`` and what it names among the globals of the host's models."""
    function = inspect.unwrap(function)
    if function in seen or not (function.__module__ or "").startswith(_MODELS):
        return
    seen.add(function)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType):
            _reach(value, seen)
        elif isinstance(value, type) and issubclass(value, nn.Module):
            _reach_class(value, seen)


def _keys(function: FunctionType) -> Iterator[str]:
    if "transformer_options" not in function.__code__.co_varnames:
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        yield ANY
        return
    for node in ast.walk(tree):
        key: ast.expr | None = None
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="transformer_options"), attr=attr), args=args):
                if attr in ("copy", "update", "setdefault"):
                    continue
                key = args[0] if attr in ("get", "pop") and args else ast.Name(attr)
            case ast.Subscript(value=ast.Name(id="transformer_options"), slice=key, ctx=ast.Load()):
                pass
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[ast.Name(id="transformer_options")]):
                pass
            case _:
                continue
        yield key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ANY
