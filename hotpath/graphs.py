"""A region's graph compiled ahead of time: code and guards as bytes, which another process runs without Dynamo.

The bytes hold what ``torch.compile(...).aot_compile`` makes: Dynamo's guards on weights, inputs and the switches of the
process, Inductor's code with its Triton kernels, and, which PyTorch leaves out, the machine code of its C++ kernels.
Reading them runs code: see ``artifacts.py`` for which are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from .fingerprint import (
    Dependencies,
    Dependency,
    global_dependency,
    ships_with_python_or_torch,
    traced_places,
)
from .internals.kept import (
    NotAhead,
    compile_ahead,
    guards_and_code,
    import_sources,
    read_held,
    revive,
    traced_lines,
    write_held,
)
from .limits import compiling
from .reasons import first_line

# The oldest whose ahead-of-time functions hold what is needed here.
OLDEST_TORCH = (2, 11)


def supported() -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) >= OLDEST_TORCH


@dataclass
class Graph:
    """One graph of a region.

    ``sizes`` are those of the tensors that it was compiled for, in the order of ``tensors_in``. ``has_run`` once it has
    run to its end.
    """

    sizes: tuple[tuple[int, ...], ...]
    _function: Any
    _dependencies: Dependencies
    _closure: Mapping[str, Any]
    has_run: bool = False

    def __post_init__(self) -> None:
        self._guards, self._run = guards_and_code(self._function)

    def accepts(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> bool:
        """Whether all that the graph was traced with is so in this call."""
        arguments = {**self._closure, "weights": weights, "inputs": inputs}
        return self._dependencies.hold() and self._guards.check(arguments)

    def why_not(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> str:
        """Dynamo's words for what differs, for a call that the graph does not accept."""
        broken = self._dependencies.broken()
        if broken is not None:
            return f"{broken} was replaced"
        found = self._guards.check_verbose({**self._closure, "weights": weights, "inputs": inputs})
        return next(iter(found.verbose_code_parts), "")

    def __call__(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        return self._run(weights, inputs)

    def to_bytes(self) -> bytes:
        """What ``load_graph`` reads. Of a compiled graph that has run, it holds those variants of its Triton kernels
        that were the quickest.

        Raises:
            NotAhead: it can't be kept for another process.
        """
        try:
            held = {"dependencies": self._dependencies.told(), "sizes": self.sizes}
            return write_held(self._function, held, self._closure)
        except NotAhead:
            raise
        except Exception as error:
            # PyTorch's own code for this is young and raises what it likes.
            raise NotAhead(first_line(error)) from error


def compile_graph(
    function: FunctionType,
    closure: Mapping[str, Any],
    weights: dict[str, Tensor],
    inputs: dict[str, Any],
    sizes: tuple[tuple[int, ...], ...],
    options: Mapping[str, Any],
    dynamic: bool | None,
) -> Graph:
    """Compile ``function(weights, inputs)`` with Inductor for these arguments and what its guards let vary.

    Args:
        closure: the free variables of ``function`` by name. Nothing may change about them.
        options: Inductor's.

    Raises:
        NotAhead: it can't be kept for another process, or PyTorch's ahead-of-time compiler failed otherwise.
        TorchDynamoException: it can't be traced as one graph.
    """
    from torch._dynamo.exc import PackageError

    names: list[str] = []

    def portable(entries: Any) -> list[bool]:
        """Which guards to keep as they are; those on globals become dependencies."""
        keep = []
        for entry in entries:
            if entry.is_global and not isinstance(entry.value, ModuleType):
                names.append(entry.name)
            # ``dict(type(template.layer).__dict__)`` is of the closure too.
            root = re.match(r"(?:\w+\()*(\w*)", entry.name)
            keep.append(not entry.is_global and not (root and root[1] in closure))
        return keep

    try:
        with compiling():
            made = compile_ahead(function, (weights, inputs), dynamic, {**options, "guard_filter_fn": portable})
        aliases, module = import_sources(made), function.__module__
        dependencies = [global_dependency(name, aliases, module) for name in dict.fromkeys(names)]
        _refuse_unseen(made, [function, *closure.values(), *(dependency.value() for dependency in dependencies)])
    except PackageError as error:
        raise NotAhead(first_line(error)) from error
    except TorchDynamoException:
        raise
    except Exception as error:
        # PyTorch's own code for this is young and raises what it likes.
        raise NotAhead(first_line(error)) from error
    return Graph(sizes, made, Dependencies(dependencies), closure)


def load_graph(data: bytes, function: FunctionType, closure: Mapping[str, Any], scratch: Path) -> Graph:
    """The graph of ``data``, which must come from ``Graph.to_bytes`` and be trusted: reading it runs code from it.

    Args:
        function, closure: as when it was compiled.
        scratch: a folder of this user alone, where machine code lies while it is loaded.

    Raises:
        NotAhead: it can't be read, or what it depends on is not as it was.
    """
    try:
        held = read_held(data, closure)
        dependencies = Dependencies(Dependency(*told) for told in held["dependencies"])
        broken = dependencies.broken()
        if broken is not None:
            raise NotAhead(f"{broken} is not what it was")
        made = revive(held, function, closure, scratch)
    except NotAhead:
        raise
    except Exception as error:
        raise NotAhead(f"{type(error).__name__}: {first_line(error)}") from error
    return Graph(held["sizes"], made, dependencies, closure)


def _refuse_unseen(made: Any, roots: list[Any]) -> None:
    """Raise NotAhead when code was traced that no dependency, nor the region's key, would see change."""
    places = traced_places(roots)
    for module, line in traced_lines(made):
        if (module, line) not in places and not ships_with_python_or_torch(module):
            raise NotAhead(f"it was traced through {module} line {line}")
