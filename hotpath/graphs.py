"""A region's graph compiled ahead of time: code and guards as bytes, which another process runs without Dynamo.

The bytes hold what ``torch.compile(...).aot_compile`` makes: Dynamo's guards on weights, inputs and the switches of the
process, Inductor's code with its Triton kernels, and, which PyTorch leaves out, the machine code of its C++ kernels.
Reading them runs code: see ``artifacts.py`` for which are read.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.abc
import importlib.util
import io
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
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
from .limits import compiling
from .values import tensors_in

# The oldest whose ahead-of-time functions hold what is needed here.
OLDEST_TORCH = (2, 11)
_MAKES_KERNELS = "async_compile = AsyncCompile()"
_GIVES_KERNELS = "async_compile = hotpath_kernels"
_IMPORTS_EXTERN = "from torch._inductor.select_algorithm import extern_kernels"
_IMPORTS_ALIGN = "from torch._inductor.codegen.memory_planning import _align as align"


class NotAhead(Exception):
    """A graph can't be compiled ahead of time, or not be read here; the message says why."""


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
        self._guards = self._function._artifacts.guard_manager
        self._run = self._function.fn

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
            return _dump(self._function, self._dependencies, self._closure, self.sizes)
        except NotAhead:
            raise
        except Exception as error:
            # PyTorch's own code for this is young and raises what it likes.
            raise NotAhead(_first_line(error)) from error


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
        # What it would record are two more calls at each run.
        with compiling(), torch._dynamo.config.patch(enable_aot_compile=True, record_runtime_overhead=False):
            compiled: Any = torch.compile(
                function, fullgraph=True, dynamic=dynamic, options={**options, "guard_filter_fn": portable}
            )
            made = compiled.aot_compile(((weights, inputs), {}))
        aliases, module = made._artifacts.runtime_env.import_sources, function.__module__
        dependencies = [global_dependency(name, aliases, module) for name in dict.fromkeys(names)]
        _refuse_unseen(made, [function, *closure.values(), *(dependency.value() for dependency in dependencies)])
    except PackageError as error:
        raise NotAhead(_first_line(error)) from error
    except TorchDynamoException:
        raise
    except Exception as error:
        # PyTorch's own code for this is young and raises what it likes.
        raise NotAhead(_first_line(error)) from error
    return Graph(sizes, made, Dependencies(dependencies), closure)


def load_graph(data: bytes, function: FunctionType, closure: Mapping[str, Any], scratch: Path) -> Graph:
    """The graph of ``data``, which must come from ``Graph.to_bytes`` and be trusted: reading it runs code from it.

    Args:
        function, closure: as when it was compiled.
        scratch: a folder of this user alone, where machine code lies while it is loaded.

    Raises:
        NotAhead: it can't be read, or what it depends on is not as it was.
    """
    from torch._dynamo.aot_compile import AOTCompiledFunction, AOTCompileUnpickler, CompileArtifacts
    from torch._dynamo.package import SerializedCode, load_guard_manager, load_guards_state
    from torch._dynamo.source import get_local_source_name

    try:
        held = AOTCompileUnpickler(dict(closure), io.BytesIO(data)).load()
        dependencies = Dependencies(Dependency(*told) for told in held["dependencies"])
        broken = dependencies.broken()
        if broken is not None:
            raise NotAhead(f"{broken} is not what it was")
        state, env = held["artifacts"], held["artifacts"]["runtime_env"]
        state["runtime_env"] = dataclasses.replace(env, bytecode=SerializedCode.to_code_object(env.bytecode))
        state["original_code"] = SerializedCode.to_code_object(state["original_code"])
        state["compiled_fn"] = _runnable(state["compiled_fn"], _load_kernels(held["kernels"], scratch))
        guards = load_guards_state(state["guards_state"])
        # The order of keys in what the closure holds, whose guards were left out.
        order = [
            source for source in guards.output_graph.guard_on_key_order if get_local_source_name(source) not in closure
        ]
        guards.output_graph.guard_on_key_order = type(guards.output_graph.guard_on_key_order)(order)
        # Newer PyTorch takes a tensor with a dimension marked for one of another kind, unless it was when it compiled,
        # which is not kept. A mark changes nothing of what a graph that is there computes.
        for tensor in tensors_in(guards.output_graph.local_scope):
            torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))
        state["guard_manager"] = load_guard_manager(guards, state["original_code"], function.__globals__)
        made = AOTCompiledFunction(CompileArtifacts(**state), _extra_globals=function.__globals__)
    except NotAhead:
        raise
    except Exception as error:
        raise NotAhead(f"{type(error).__name__}: {_first_line(error)}") from error
    return Graph(held["sizes"], made, dependencies, closure)


def _dump(made: Any, dependencies: Dependencies, closure: Mapping[str, Any], sizes: Any) -> bytes:
    from torch._dynamo.aot_compile import AOTCompilePickler
    from torch._dynamo.package import SerializedCode, SourceInfo
    from torch._inductor.codecache import PyCodeCache

    artifacts = made._artifacts
    env = artifacts.runtime_env
    used = {alias: name for alias, name in env.import_sources.items() if alias in env.external_refs}
    # It comes with the graph in the one form that does not look for Inductor's cache folder.
    with torch._functorch.config.patch(bundled_autograd_cache=True):
        entry = artifacts.compiled_fn.compiled_fn.serialize()
    graph = entry.compiled_fw.result
    module = next((known for known in reversed(PyCodeCache.modules) if _key(known) == graph.cache_key), None)
    kernels = _kernels(graph.source_code, module)
    if graph._triton_bundle:
        _leave_quickest(graph._triton_bundle, module)
    graph.source_code = _lighter(graph.source_code).replace(_MAKES_KERNELS, _GIVES_KERNELS)
    state = {
        **vars(artifacts),
        "guard_manager": None,
        "source_info": SourceInfo(set()),
        "runtime_env": dataclasses.replace(
            env, bytecode=SerializedCode.from_code_object(env.bytecode), import_sources=used
        ),
        "original_code": SerializedCode.from_code_object(artifacts.original_code),
        "compiled_fn": entry,
    }
    # Nothing of this pack's own classes, whose module's name is the folder that the pack lies in.
    held = {"artifacts": state, "dependencies": dependencies.told(), "sizes": sizes, "kernels": kernels}
    buffer = io.BytesIO()
    pickler = AOTCompilePickler(dict(closure), buffer)
    pickler.dump(held)
    if pickler.errors:
        raise NotAhead("it holds a module of its own")
    return buffer.getvalue()


def _refuse_unseen(made: Any, roots: list[Any]) -> None:
    """Raise NotAhead when code was traced that no dependency, nor the region's key, would see change."""
    places = traced_places(roots)
    for source in made._artifacts.source_info.inlined_sources:
        if (source.module, source.firstlineno) not in places and not ships_with_python_or_torch(source.module):
            raise NotAhead(f"it was traced through {source.module} line {source.firstlineno}")


def _kernels(source: str, module: Any) -> dict[str, bytes]:
    """The machine code of each C++ kernel of ``source``, which ``module`` was loaded from, by the hash of its own."""
    if source.count(_MAKES_KERNELS) != 1:
        raise NotAhead("Inductor generates another kind of code")
    kernels = {}
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, (ast.Assign, ast.Expr)) else None
        if not isinstance(call, ast.Call) or not ast.unparse(call.func).startswith("async_compile."):
            continue
        kind = ast.unparse(call.func).removeprefix("async_compile.")
        if kind == "cpp_pybinding" and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = ast.literal_eval(call.args[1])
            library = Path(getattr(module, node.targets[0].id).__self__.__file__)
            kernels[_hash(text.encode())] = library.read_bytes()
        elif kind not in ("triton", "wait"):
            raise NotAhead(f"a kernel of kind {kind} can't be kept")
    return kernels


def _leave_quickest(bundle: Any, module: Any) -> None:
    """Leave of each Triton kernel in ``bundle`` the variant that ``module`` chose, so that none is timed again."""
    from torch._inductor.runtime.triton_heuristics import triton_config_to_hashable as name

    for told in bundle.static_autotuners:
        launchers, variants = getattr(module, told.kernel_name).launchers, told.kernel.compile_results
        chosen = {name(launcher.config) for launcher in launchers}
        told.kernel.compile_results = [known for known in variants if name(known.config) in chosen] or variants


def _lighter(source: str) -> str:
    """Inductor's code without what it imports and does not need, which takes longer to import than all else to load."""
    from torch._inductor.select_algorithm import extern_kernels

    external = set(re.findall(r"\bextern_kernels\.(\w+)", source))
    if all(getattr(extern_kernels, name) is getattr(torch, name, None) for name in external):
        source = source.replace(_IMPORTS_EXTERN, "extern_kernels = torch")
    return source if "align(" in source else source.replace(_IMPORTS_ALIGN, "")


def _load_kernels(kernels: Mapping[str, bytes], scratch: Path) -> dict[str, Callable[..., Any]]:
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    loaded = {}
    # Windows keeps a library that is in use.
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".k", ignore_cleanup_errors=True) as folder:
        for name, library in kernels.items():
            path = Path(folder) / f"{name}.so"
            path.write_bytes(library)
            module = Bindings._load_library_inner(str(path), f"hotpath.{_hash(library)}")
            loaded[name] = getattr(module, Bindings.entry_function)
    return loaded


def _runnable(entry: Any, kernels: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What ``entry`` was made from, with Inductor's code loaded from its own text rather than from a cache folder."""
    import torch._inductor.debug
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.output_code import CompiledFxGraph, CompiledFxGraphConstants
    from torch._inductor.triton_bundler import TritonBundler
    from torch._inductor.utils import BoxedBool
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Kernels(AsyncCompile):
        def cpp_pybinding(self, argtypes: Any, source_code: str) -> Any:
            return kernels[_hash(source_code.encode())]

    # A graph that is as if just compiled: PyTorch would look for the code of its own class elsewhere.
    own = {name: value for name, value in vars(CompiledFxGraph).items() if name not in ("__dict__", "__weakref__")}
    loaded = type("LoadedGraph", CompiledFxGraph.__bases__, own)

    graph = entry.compiled_fw.result
    if graph._triton_bundle:
        TritonBundler.read_and_emit(graph._triton_bundle)
    spec = importlib.util.spec_from_loader(f"hotpath_stored_{graph.cache_key}", _Text(graph.source_code))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    module.hotpath_kernels = Kernels()
    # Its Triton kernels are here, and no pool of processes is needed to compile them.
    with config.patch(compile_threads=1):
        spec.loader.exec_module(module)
    for name, value in CompiledFxGraphConstants().unwrap(graph).items():
        setattr(module, name, value)
    graph.current_callable = module.call
    graph.recursively_apply_fns = getattr(module, "recursively_apply_fns", None)
    graph.compiled_fn_runner = getattr(module, "runner", None)
    graph.__class__ = loaded
    # Dynamo's guards stand for it.
    entry.guards_expr = None
    boxed = {"cudagraphs": BoxedBool(config.triton.cudagraphs), "boxed_forward_device_index": BoxedDeviceIndex(None)}
    with (
        torch._guards.tracing(torch._guards.TracingContext(FakeTensorMode(shape_env=ShapeEnv()))),
        functorch_config.patch(bundled_autograd_cache=True),
    ):
        run = entry.wrap_post_compile([], entry.sanitized_aot_config, boxed)
    return lambda *arguments: run(list(arguments))


class _Text(importlib.abc.InspectLoader):
    """Imports a module from its text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text


def _key(module: ModuleType) -> str | None:
    return getattr(module, "key", None)


def _hash(data: bytes) -> str:
    return sha256(data).hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
