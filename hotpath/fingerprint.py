"""What compiled code depends on, in words that mean the same in another process.

Code is compared as it is in memory, not as its file is now: a file may change while ComfyUI runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from .stretch import stretch
from .template import codes_of, functions_of, own_bases, own_state
from .values import varying_dims

# The package that the pack was loaded as, which is its folder in a host.
PACK = __name__.rpartition(".")[0].rpartition(".")[0]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device)

_GONE = (AttributeError, LookupError, TypeError)
_CONTAINERS = (dict, list, set)

_NOTHING = object()


class NotPortable(Exception):
    """Something can't be told from one process to another; the message says what."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def portable_name(module: str) -> str:
    """A module's name that does not depend on the folder that the pack was installed in."""
    return "~" + module.removeprefix(PACK) if module.startswith(f"{PACK}.") else module


def module_named(portable: str) -> ModuleType:
    """The module of a ``portable_name``, which must have been imported, unless it is one of Python or PyTorch that code
    imports where it is used. Raises NotPortable."""
    name = PACK + portable[1:] if portable.startswith("~") else portable
    try:
        return sys.modules[name] if not ships_with_python_or_torch(name) else importlib.import_module(name)
    except (KeyError, ImportError):
        raise NotPortable(f"the module {portable} is not loaded") from None


def code_text(code: CodeType) -> str:
    """Everything about ``code`` that its result depends on, and neither file nor line."""
    parts = [code.co_code.hex(), repr((code.co_flags, code.co_names, code.co_varnames))]
    parts.append(repr((code.co_freevars, code.co_cellvars)))
    for value in code.co_consts:
        if isinstance(value, CodeType):
            parts.append(code_text(value))
        elif isinstance(value, frozenset):
            parts.append(repr(sorted(map(repr, value))))
        else:
            parts.append(repr(value))
    return "\n".join(parts)


def describe(value: Any) -> str:
    """A value that a trace read, so that what would be traced otherwise is described otherwise.

    Of an object of any other kind only the class is told: what a trace reads from it is an attribute of its own.
    """
    if isinstance(value, FunctionType):
        defaults = [describe(default) for default in (value.__defaults__, value.__kwdefaults__)]
        code = digest(code_text(value.__code__))
        return f"function {portable_name(value.__module__ or '')}.{value.__qualname__} {code} {defaults}"
    if isinstance(value, BuiltinFunctionType):
        return f"builtin {value.__module__}.{value.__qualname__}"
    if isinstance(value, type):
        # PyTorch changes some of its own while it is used.
        return f"class {_class_name(value)}" if ships_with_python_or_torch(value.__module__) else _class_text(value)
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"{_class_name(type(value))} {[describe(item) for item in value]}"
    if isinstance(value, (set, frozenset)):
        return f"{_class_name(type(value))} {sorted(map(describe, value))}"
    if isinstance(value, Mapping):
        return f"{_class_name(type(value))} { {describe(key): describe(item) for key, item in value.items()} }"
    return _class_name(type(value))


def text_of(value: Any) -> str:
    """A nest of tuples, classes and plain values, as it is written in a key.

    Raises:
        NotPortable: there is something else in it.
    """
    if isinstance(value, type):
        return _class_name(value)
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(text_of, value))})"
    raise NotPortable(f"a {_class_name(type(value))} has no fixed text")


def structure_text(template: nn.Module) -> str:
    """A template: its modules, their plain state, their parameters and the code of their classes.

    Raises:
        NotPortable: a module holds state that has no fixed text.
    """
    lines, varying = [], varying_dims(template)
    for path, module in template.named_modules():
        state = tuple(sorted(own_state(module).items()))
        lines.append(f"{path} {[_class_text(kind) for kind in own_bases(type(module))]} {text_of(state)}")
        for name, parameter in module._parameters.items():
            if parameter is None:
                lines.append(f"{path}.{name} None")
                continue
            # Otherwise code would be kept for each rank of a LoRA.
            dims = varying.get(f"{path}.{name}", ())
            shape = tuple(None if dim in dims else size for dim, size in enumerate(parameter.shape))
            lines.append(f"{path}.{name} {shape} {parameter.dtype}")
    return "\n".join(lines)


def _methods(kind: type) -> list[FunctionType]:
    return [function for _, function in sorted(functions_of(kind), key=itemgetter(0))]


def _class_text(kind: type) -> str:
    told = [describe(method) for method in _methods(kind)]
    told += [f"{name}={vars(kind)[name]!r}" for name in sorted(vars(kind)) if _is_constant(name, vars(kind)[name])]
    return f"class {_class_name(kind)} {digest(repr(told))}"


def _is_constant(name: str, value: Any) -> bool:
    return not name.startswith("__") and isinstance(value, _PLAIN)


def _class_name(kind: type) -> str:
    return f"{portable_name(kind.__module__)}.{kind.__qualname__}"


@dataclass
class Dependency:
    """A global value that a trace read: the module to start from, the way from there, and what was found.

    Dynamo guards on such a value by its identity, which another process can't compare. Here it is compared by
    identity in the process, and by ``description`` where that fails or across processes.
    """

    module: str
    path: tuple[tuple[str, Any], ...]
    description: str = ""
    _seen: Any = field(default=_NOTHING, init=False, repr=False, compare=False)

    @cached_property
    def steps(self) -> tuple[Callable[[Any], Any], ...]:
        """The way as calls, with all attributes that follow each other in one."""
        steps: list[Callable[[Any], Any]] = []
        for kind, run in groupby(self.path, key=itemgetter(0)):
            names = [name for _, name in run]
            if kind == "attribute":
                steps.append(attrgetter(".".join(names)))
            else:
                steps += [itemgetter(name) if kind == "item" else type for name in names]
        return tuple(steps)

    def value(self) -> Any:
        """Raises NotPortable when there is nothing of the name."""
        module = module_named(self.module)
        try:
            return _walk(module, self.steps)
        except _GONE:
            raise NotPortable(f"{self} is gone") from None

    def holds(self) -> bool:
        """Whether the value is what it was when the region was traced."""
        try:
            value = self.value()
        except NotPortable:
            return False
        if value is self._seen and not (isinstance(value, _CONTAINERS) and value):
            return True
        if describe(value) != self.description:
            return False
        # What may change in place is described anew each time, unless it was empty and is.
        fixed = not isinstance(value, Sized) or isinstance(value, (str, bytes, tuple))
        self._seen = value if fixed or (isinstance(value, _CONTAINERS) and not value) else _NOTHING
        return True

    def __str__(self) -> str:
        text = self.module
        for step, name in self.path:
            text = f"type({text})" if step == "type" else f"{text}[{name!r}]" if step == "item" else f"{text}.{name}"
        return text


def _walk(found: Any, steps: Iterable[Callable[[Any], Any]]) -> Any:
    for step in steps:
        found = step(found)
    return found


class _Identities:
    """The very objects that dependencies were found to hold by, with what finds them again in as few calls as it takes:
    attributes of a module at once, and no items of a tuple, which are the same as long as it is."""

    def __init__(self, dependencies: Sequence[Dependency]) -> None:
        self._others = [each for each in dependencies if each._seen is _NOTHING]
        known = [each for each in dependencies if each._seen is not _NOTHING]
        self._empty = [each._seen for each in known if isinstance(each._seen, _CONTAINERS)]
        self._seen: list[Any] = []
        self._walks: list[Callable[[], Any]] = []
        self._getters: list[Callable[[], tuple[Any, ...]]] = []
        tuples = {(each.module, each.path) for each in known if type(each._seen) is tuple}
        attributes: dict[str, list[Dependency]] = {}
        for each in known:
            if all(step == "attribute" for step, _ in each.path):
                attributes.setdefault(each.module, []).append(each)
            elif each.path[-1][0] != "item" or (each.module, each.path[:-1]) not in tuples:
                self._walks.append(partial(_walk, module_named(each.module), each.steps))
                self._seen.append(each._seen)
        for module, group in attributes.items():
            # For a single name there would be no tuple.
            group.append(group[0])
            names = [".".join(name for _, name in each.path) for each in group]
            self._getters.append(partial(attrgetter(*names), module_named(module)))
            self._seen += [each._seen for each in group]

    def same(self) -> bool:
        """Whether all of them are still in their places, and what was empty is."""
        try:
            found = [walk() for walk in self._walks]
            for get in self._getters:
                found += get()
        except _GONE:
            return False
        return all(map(is_, found, self._seen)) and not any(self._empty) and all(map(Dependency.holds, self._others))


class Dependencies:
    """All that a graph depends on, asked before each call of a block: by identity once that has been enough."""

    def __init__(self, each: Iterable[Dependency]) -> None:
        self._each = tuple(each)
        self._identities: _Identities | None = None
        self._held_in: object = None

    def hold(self) -> bool:
        """Whether each of them does."""
        now = stretch()
        if now is not None and now is self._held_in:
            return True
        self._held_in = None
        if self._identities is None or not self._identities.same():
            if self.broken() is not None:
                return False
            self._identities = _Identities(self._each)
        self._held_in = now
        return True

    def told(self) -> list[tuple[str, tuple[tuple[str, Any], ...], str]]:
        """Module, path and description of each, which make it again in another process."""
        return [(dependency.module, dependency.path, dependency.description) for dependency in self._each]

    def broken(self) -> Dependency | None:
        """One that doesn't hold; None where all do."""
        return next((dependency for dependency in self._each if not dependency.holds()), None)


def global_dependency(guarded: str, aliases: Mapping[str, str], module: str) -> Dependency:
    """The value that Dynamo names ``guarded``, such as ``G['__import_torch'].nn.functional.linear``, as it is now.

    Args:
        aliases: Dynamo's own names of modules.
        module: name of the module whose globals ``G`` are.

    Raises:
        NotPortable: it is named in another way.
    """
    node = ast.parse(guarded, mode="eval").body
    path: list[tuple[str, Any]] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            path.insert(0, ("attribute", node.attr))
            node = node.value
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            path.insert(0, ("item", node.slice.value))
            node = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "type" and len(node.args) == 1:
            path.insert(0, ("type", None))
            node = node.args[0]
        else:
            raise NotPortable(f"it depends on {guarded}")
    if node.id != "G" or not path or path[0][0] != "item":
        raise NotPortable(f"it depends on {guarded}")
    start = path.pop(0)[1]
    if start in aliases:
        module = aliases[start]
    elif start.startswith("__builtins_dict__") and path:
        module, path[0] = "builtins", ("attribute", path[0][1])
    else:
        path.insert(0, ("attribute", start))
    dependency = Dependency(portable_name(module), tuple(path))
    dependency.description = describe(dependency.value())
    return dependency


def traced_places(roots: Iterable[Any]) -> set[tuple[str, int]]:
    """Module and first line of all functions among ``roots``, of their classes, and of what these define inside.

    Of what is defined inside also the first line of its source text, which Dynamo may report: a generator's is that of
    the function around it.
    """
    places = set()
    for function in _functions(roots):
        for code in codes_of(function.__code__):
            places.add((function.__module__, code.co_firstlineno))
            if code is not function.__code__:
                with suppress(OSError, SyntaxError):
                    places.add((function.__module__, inspect.getsourcelines(code)[1]))
    return places


def _functions(values: Iterable[Any]) -> Iterator[FunctionType]:
    for value in values:
        if isinstance(value, FunctionType):
            yield value
        elif isinstance(value, type):
            yield from _methods(value)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                yield from _functions(own_bases(type(module)))


def ships_with_python_or_torch(module: str) -> bool:
    """Whether the versions of Python and PyTorch say what is in ``module``."""
    root = module.partition(".")[0]
    return root in ("torch", "triton") or root in sys.stdlib_module_names


def function_text(function: Callable[..., Any]) -> str:
    """The code of ``function`` and where it is from. Raises NotPortable when it is no plain function."""
    if not isinstance(function, FunctionType) or inspect.getclosurevars(function).nonlocals:
        raise NotPortable(f"{function!r} is no plain function")
    return describe(function)
