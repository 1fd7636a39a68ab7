"""Code and guards compiled ahead of time, Inductor's code as text, and launchers of Triton kernels.

Where a newer PyTorch differs, regions are compiled as ever and not kept: what fails while one is made, written or read
is ``NotAhead`` to its user.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.abc
import importlib.util
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from ..fingerprint import PACK
from ..values import tensors_in
from .memory import any_code, note_code

_MAKES_KERNELS = "async_compile = AsyncCompile()"
_GIVES_KERNELS = "async_compile = hotpath_kernels"
_IMPORTS_EXTERN = "from torch._inductor.select_algorithm import extern_kernels"
_IMPORTS_ALIGN = "from torch._inductor.codegen.memory_planning import _align as align"


class NotAhead(Exception):
    """A graph can't be compiled ahead of time, or not be read here; the message says why."""


def compile_ahead(function: FunctionType, arguments: tuple[Any, ...], dynamic: bool | None, options: Any) -> Any:
    """What ``torch.compile`` makes ahead of time of ``function(*arguments)``, to ask and to call by the next four."""
    # What it would record are two more calls at each run.
    with torch._dynamo.config.patch(enable_aot_compile=True, record_runtime_overhead=False):
        compiled: Any = torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)
        made = compiled.aot_compile((arguments, {}))
    from torch._inductor.codecache import PyCodeCache

    for module in PyCodeCache.modules:
        note_code(module)
    if not any_code():
        raise NotAhead("Inductor's code is loaded in a way that is not known here")
    return made


def guards_and_code(made: Any) -> tuple[Any, Callable[..., Any]]:
    """Dynamo's guards, with ``check`` and ``check_verbose`` of arguments by name, and the code without them.

    Raises:
        NotAhead: PyTorch has them in another way.
    """
    guards = getattr(getattr(made, "_artifacts", None), "guard_manager", None)
    if not (hasattr(guards, "check") and hasattr(guards, "check_verbose") and callable(getattr(made, "fn", None))):
        raise NotAhead("PyTorch keeps guards in a way that is not known here")
    return guards, made.fn


def import_sources(made: Any) -> Mapping[str, str]:
    """The modules that its code imports, by the names that it has for them."""
    sources: Mapping[str, str] = made._artifacts.runtime_env.import_sources
    return sources


def traced_lines(made: Any) -> Iterator[tuple[str, int]]:
    """The module and first line of each function that it was traced through."""
    for source in made._artifacts.source_info.inlined_sources:
        yield source.module, source.firstlineno


def write_held(made: Any, held: Mapping[str, Any], closure: Mapping[str, Any]) -> bytes:
    """``made`` by ``compile_ahead`` and ``held``, plain values, as bytes that ``read_held`` reads.

    Raises:
        NotAhead: it can't be kept for another process. What else is raised means the same.
    """
    from torch._dynamo.aot_compile import AOTCompilePickler
    from torch._dynamo.package import SerializedCode, SourceInfo
    from torch._inductor.codecache import PyCodeCache

    artifacts = made._artifacts
    if f"{PACK}.".encode() in artifacts.guards_state:
        raise NotAhead("its guards hold a module of this pack, which has another name in another folder")
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
        _name_by_text(graph._triton_bundle, graph.source_code)
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
    buffer = io.BytesIO()
    pickler = AOTCompilePickler(dict(closure), buffer)
    # Nothing of this pack's own classes, whose module's name is the folder that the pack lies in.
    pickler.dump({**held, "artifacts": state, "kernels": kernels})
    if pickler.errors:
        raise NotAhead("it holds a module of its own")
    return buffer.getvalue()


def read_held(data: bytes, closure: Mapping[str, Any]) -> dict[str, Any]:
    """What ``write_held`` wrote; reading it runs code from it."""
    from torch._dynamo.aot_compile import AOTCompileUnpickler

    held: dict[str, Any] = AOTCompileUnpickler(dict(closure), io.BytesIO(data)).load()
    return held


def revive(held: Mapping[str, Any], function: FunctionType, closure: Mapping[str, Any], scratch: Path) -> Any:
    """As ``compile_ahead`` made it, of what ``read_held`` gave; machine code lies in ``scratch`` while it is loaded."""
    from torch._dynamo.aot_compile import AOTCompiledFunction, CompileArtifacts
    from torch._dynamo.package import SerializedCode, load_guard_manager, load_guards_state
    from torch._dynamo.source import get_local_source_name

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
    return AOTCompiledFunction(CompileArtifacts(**state), _extra_globals=function.__globals__)


def _kernels(source: str, module: Any) -> dict[str, bytes]:
    """The machine code of each C++ kernel of ``source``, which ``module`` was loaded from, by the hash of its own."""
    if source.count(_MAKES_KERNELS) != 1:
        raise NotAhead("Inductor generates another kind of code")
    kernels = {}
    for kind, node, call in _kernel_calls(source):
        if kind == "cpp_pybinding" and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = ast.literal_eval(call.args[1])
            library = Path(getattr(module, node.targets[0].id).__self__.__file__)
            kernels[_hash(text)] = library.read_bytes()
        elif kind not in ("triton", "wait"):
            raise NotAhead(f"a kernel of kind {kind} can't be kept")
    return kernels


def _kernel_calls(source: str) -> Iterator[tuple[str, ast.stmt, ast.Call]]:
    """Where ``source`` has a kernel made: of which kind, in which statement, by which call."""
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, (ast.Assign, ast.Expr)) else None
        if isinstance(call, ast.Call) and (called := ast.unparse(call.func)).startswith("async_compile."):
            yield called.removeprefix("async_compile."), node, call


def _name_by_text(bundle: Any, source: str) -> None:
    """Have the Triton kernels of ``bundle`` found by their text in ``source``, where PyTorch would read all of its own
    files first."""
    from torch._inductor.async_compile import CompiledTritonKernels

    texts = [ast.literal_eval(call.args[1]) for kind, _, call in _kernel_calls(source) if kind == "triton"]
    names = {CompiledTritonKernels.key(text): _hash(text) for text in texts}
    bundle.static_autotuners[:] = [
        dataclasses.replace(told, cache_key=names.get(told.cache_key, told.cache_key))
        for told in bundle.static_autotuners
    ]


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
            module = Bindings._load_library_inner(str(path), f"hotpath.{sha256(library).hexdigest()}")
            loaded[name] = getattr(module, Bindings.entry_function)
    return loaded


def _kernels_by_text(loaded: Mapping[str, Callable[..., Any]]) -> Any:
    """What stands for Inductor's ``async_compile``: C++ kernels are those ``loaded``, Triton ones those of the bundle
    that was read before, and what is missing is compiled."""
    from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels, _load_triton_kernel_from_source

    class Kernels(AsyncCompile):
        def cpp_pybinding(self, argtypes: Any, source_code: str) -> Any:
            return loaded[_hash(source_code)]

        def triton(self, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
            future: Any = CompiledTritonKernels._cache.pop(_hash(source_code), None)
            if future is None:
                return super().triton(kernel_name, source_code, device_str)
            future.reload_kernel_from_src = partial(_load_triton_kernel_from_source, kernel_name, source_code)
            return future.result()

    return Kernels()


def _runnable(entry: Any, kernels: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What ``entry`` was made from, with Inductor's code loaded from its own text rather than from a cache folder."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.output_code import CompiledFxGraph, CompiledFxGraphConstants
    from torch._inductor.triton_bundler import TritonBundler
    from torch._inductor.utils import BoxedBool
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # A graph that is as if just compiled: PyTorch would look for the code of its own class elsewhere.
    own = {name: value for name, value in vars(CompiledFxGraph).items() if name not in ("__dict__", "__weakref__")}
    # What its own does beside it is for what was compiled here, and imports most of Inductor.
    own["__call__"] = lambda self, inputs: self.current_callable(inputs)
    loaded = type("LoadedGraph", CompiledFxGraph.__bases__, own)

    graph = entry.compiled_fw.result
    if graph._triton_bundle:
        TritonBundler.read_and_emit(graph._triton_bundle)
    spec = importlib.util.spec_from_loader(f"hotpath_stored_{graph.cache_key}", _Text(graph.source_code))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    module.hotpath_kernels = _kernels_by_text(kernels)
    # Its Triton kernels are here, and no pool of processes is needed to compile them.
    with config.patch(compile_threads=1):
        spec.loader.exec_module(module)
    note_code(module)
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


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
