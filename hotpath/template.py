"""A template: the structure of a block on the meta device, without its weights.

One template stands for all blocks of the same structure. It is run with the weights of whichever block is
executing by ``placing.call_placed``, so the compiled code never sees where those weights live.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from .placing import places_in

# What every nn.Module carries; anything else on a module is structure that the forward may read.
_MODULE_STATE = frozenset(nn.Module().__dict__)
# Structures are long to compare and hash; each gets a number.
_structures: dict[Hashable, int] = {}
# The state, in a plan, of a module that is no layer and has parameters of its own.
OWNED = "owned"
_PLAIN_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device)


class NotHoistable(Exception):
    """A block can't run from a template; the message says which module of it and why."""


PlainLayer = Callable[[nn.Module], "nn.Module | None"]
"""Maps a module to its plain equivalent on the meta device, or to None for a container that holds only other
modules and is copied as it is. Raises NotHoistable for a module whose maths it does not know."""

LayerState = Callable[[nn.Module], Hashable]
"""What may change about how a module computes while it stays the same; a plan holds as long as it is equal."""

LayerStates = Callable[[type], "LayerState | None"]
"""The ``LayerState`` of a class of modules; None for one whose modules always compute alike."""


class Addition(NamedTuple):
    """What a ``forward`` that was put on a layer computes around the layer's own.

    ``structure`` is equal for those that compute alike, and ``around(layer)`` is the plain layer with it, whose
    ``dynamic_dims`` may name dimensions of its parameters that vary.
    """

    structure: Hashable
    around: Callable[[nn.Module], nn.Module]


Additions = Callable[[nn.Module], "Addition | None"]
"""Understands the ``forward`` that was put on a layer; None for one that a template would ignore."""


class Given:
    """A module's ``forward`` that hands out a result made elsewhere: a template takes that result as an input.

    In the template ``forward(inputs)`` of such a module is ``inputs[path]``.
    """

    def __init__(self, module: nn.Module, give: Callable[[Any], Any]) -> None:
        self._module = weakref.ref(module)
        self._give = give

    def stands_for(self, module: nn.Module) -> bool:
        return self._module() is module

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            module: Any = self._module()
            return type(module).forward(module, *args)
        return self._give(*args)


class Around:
    """A block's ``forward`` that does something before and after it, such as having its weights arrive.

    A region runs ``inside`` of it. While it runs, the block looks untouched.
    """

    def __init__(self, block: nn.Module, scope: Callable[[], AbstractContextManager[None]]) -> None:
        self.inside: Callable[..., Any] | None = None
        self._block = weakref.ref(block)
        self._scope = scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block: Any = self._block()
        del block.forward
        try:
            with self._scope():
                return (self.inside or block.forward)(*args, **kwargs)
        finally:
            block.forward = self


class _GivenLayer(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        return inputs[self.path]


class _Settled(NamedTuple):
    """Values of a module that its forward reads, and what gets them from its attributes."""

    get: Callable[[dict[str, Any]], Any]
    values: Any

    @staticmethod
    def of(module: nn.Module, names: Collection[str]) -> _Settled | None:
        held = [name for name in names if name in module.__dict__]
        if not held:
            return None
        get = itemgetter(*held)
        return _Settled(get, get({**module.__dict__, "_parameters": dict(module._parameters)}))

    def hold(self, module: nn.Module) -> bool:
        try:
            return bool(self.get(module.__dict__) == self.values)
        except KeyError:
            return False


class _Place(NamedTuple):
    """A module of the block: where it hung when the template was made."""

    path: str
    parent: int
    name: str
    module: weakref.ref[nn.Module]
    kind: type
    children: int
    given: bool
    read_state: LayerState | None
    state: Hashable
    added: Hashable
    settled: _Settled | None


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """How one block maps onto its template.

    ``key`` is equal for blocks of the same structure, within this process. ``given`` are the modules whose results are
    inputs, ``weights`` how many the template has. Modules of the block are held weakly, so that a plan kept anywhere
    never keeps a model's weights alive.
    """

    template: nn.Module
    key: int
    given: tuple[str, ...]
    weights: int
    _layers: tuple[tuple[str, int, Hashable], ...] = field(repr=False)
    _places: tuple[_Place, ...] = field(repr=False)
    _additions: Additions = field(repr=False)
    _methods: tuple[tuple[Mapping[str, Any], str, Any], ...] = field(repr=False)
    _classes: tuple[tuple[Mapping[str, Any], int], ...] = field(repr=False)
    # How many attributes each module had when they were last looked at.
    _sizes: list[int] = field(repr=False)

    def look_again(self) -> None:
        """Have attributes looked at in the next call of ``layers``, also where there are as many as before."""
        self._sizes[:] = [-1] * len(self._sizes)

    def layers(self, block: nn.Module) -> list[tuple[str, nn.Module, Hashable]]:
        """The layers of ``block`` that hold weights: path, layer, and its state as planned.

        Raises:
            NotHoistable: something was bolted onto the block, or swapped or changed in it, since it was planned.
        """
        for members, name, member in self._methods:
            if members.get(name) is not member:
                raise NotHoistable(f"{name} of a class was replaced")
        for members, count in self._classes:
            if len(members) != count:
                raise NotHoistable("a class has other members")
        modules: list[nn.Module] = []
        for size, place in zip(self._sizes, self._places, strict=True):
            path, parent, name, known, kind, children, given, read_state, state, added, settled = place
            module = modules[parent]._modules.get(name) if modules else block
            if module is None or module is not known() or type(module) is not kind:
                raise NotHoistable(f"{path or 'the block'} was replaced")
            # Asked before each call of a block, so that what is as ever takes no call.
            attributes = module.__dict__
            if len(attributes) != size:
                refuse_hidden(path, module)
                self._sizes[len(modules)] = len(attributes)
            overridden = "forward" in attributes
            if overridden or module._forward_hooks or module._forward_pre_hooks:
                addition = _addition(path, module, self._additions)
                if (addition and addition.structure) != added:
                    raise NotHoistable(f"{path or 'the block'} computes in another way now")
            elif added is not None:
                raise NotHoistable(f"{path or 'the block'} computes in another way now")
            if len(module._modules) != children:
                raise NotHoistable(f"{path or 'the block'} has other submodules")
            if settled is not None and not settled.hold(module):
                raise NotHoistable(f"what {path or 'the block'} computes by was changed")
            if (overridden and _is_given(module)) != given or (read_state is not None and read_state(module) != state):
                raise NotHoistable(f"{path or 'the block'} computes in another way now")
            modules.append(module)
        return [(path, modules[index], state) for path, index, state in self._layers]


def own_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of ``module`` that not every module has, by name."""
    return {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}


def refuse_bolted_on(path: str, module: nn.Module) -> None:
    """Raise NotHoistable for a forward hook or an overridden ``forward``: a template would ignore either."""
    _addition(path, module, lambda module: None)


def hidden_by(module: nn.Module, ignored: Collection[str] = ()) -> str:
    """An attribute of ``module`` itself, other than those ``ignored``, that comes before a function of its class, or
    before a weight or module that it holds; empty without any."""
    for name in module.__dict__.keys() - _MODULE_STATE - {"forward", *ignored}:
        function = getattr(type(module), name, None)
        # What puts another there and takes it back leaves the class's.
        own = getattr(module.__dict__[name], "__func__", None) is function
        held = any(name in each for each in (module._modules, module._parameters, module._buffers))
        if held or (isinstance(function, FunctionType) and not own):
            return name
    return ""


def refuse_hidden(path: str, module: nn.Module, ignored: Collection[str] = ()) -> None:
    """Raise NotHoistable where something of ``module`` is ``hidden_by`` an attribute."""
    if name := hidden_by(module, ignored):
        raise NotHoistable(f"{path or 'the block'} ({type(module).__name__}) has a {name} of another node")


def is_class_forward(module: nn.Module, forward: Any) -> bool:
    """Whether ``forward`` is the one that the class of ``module`` has; what puts another there and takes it back leaves
    the class's as an attribute."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def _addition(path: str, module: nn.Module, additions: Additions) -> Addition | None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotHoistable(f"{path or 'the block'} ({type(module).__name__}) has a forward hook")
    forward = module.__dict__.get("forward")
    if forward is None or isinstance(forward, (Given, Around)) or is_class_forward(module, forward):
        return None
    addition = additions(module)
    if addition is None:
        raise NotHoistable(f"{path or 'the block'} ({type(module).__name__}) has an overridden forward")
    return addition


def plan_block(
    block: nn.Module,
    plain_layer: PlainLayer,
    layer_states: LayerStates = lambda kind: None,
    additions: Additions = lambda module: None,
    ignored: Collection[str] = (),
    owned: Collection[str] = (),
    bookkeeping: Collection[str] = (),
) -> BlockPlan:
    """Build the template of ``block`` from its structure, without reading or copying a weight.

    ``ignored`` are attributes of the block that no forward reads, such as its number, ``bookkeeping`` those that what
    moves weights leaves on any module, and ``owned`` parameters that its modules may have outside of known layers.

    Raises:
        NotHoistable: some module of the block has hooks, an overridden forward, other parameters or buffers outside
            a known layer, state that a template can't copy, or is of a class that ``plain_layer`` refuses.
    """
    places: list[_Place] = []
    layers: list[tuple[str, int, Hashable]] = []
    key: list[Hashable] = []
    methods: dict[type, tuple[tuple[str, FunctionType], ...]] = {}

    def copy(path: str, parent: int, module: nn.Module) -> nn.Module:
        addition = _addition(path, module, additions)
        added = addition and addition.structure
        here = len(places)
        name = path.rpartition(".")[2]
        children = len(module._modules)
        refuse_hidden(path, module)
        if type(module).__call__ is not nn.Module.__call__:
            raise NotHoistable(f"{path or 'the block'} ({type(module).__name__}) is called in a way of its own")
        given = _is_given(module)
        read_state = layer_states(type(module))
        state = None if read_state is None else read_state(module)
        plain = None if given else plain_layer(module)
        kind: type = type(module)
        methods.update((base, tuple(functions_of(base))) for base in own_bases(kind) if base not in methods)
        unread = (*bookkeeping, *(() if path else ignored))
        is_layer = given or plain is not None
        values = {} if is_layer else {name: value for name, value in own_state(module).items() if name not in unread}
        read = constants(kind) if is_layer else _read_by(kind).intersection(values)
        if plain is not None and module._parameters and not any(True for _ in plain.parameters()):
            # It has none of the weights that it may have.
            read = {*read, "_parameters"}
        known, settled = weakref.ref(module), _Settled.of(module, read)
        places.append(_Place(path, parent, name, known, kind, children, given, read_state, state, added, settled))
        if given:
            key.append((path, Given))
            return _GivenLayer(path)
        if plain is not None:
            if addition is not None:
                plain = addition.around(plain)
            if any(True for _ in plain.parameters()):
                layers.append((path, here, state))
            elif any(value is not None for value in module._parameters.values()):
                raise NotHoistable(f"{path} ({type(module).__name__}) has weights that it was made without")
            key.append((path, type(plain), plain.extra_repr()))
            return plain
        own = {name: None if value is None else tuple(value.shape) for name, value in module._parameters.items()}
        if addition is not None or module._buffers or not own.keys() <= set(owned):
            raise NotHoistable(f"{path or 'the block'} ({type(module).__name__}) holds weights outside a known layer")
        for name, value in values.items():
            if not is_plain(value):
                raise NotHoistable(f"{path or 'the block'}.{name} is a {type(value).__name__}, which can't be copied")
        code = tuple(weakref.ref(function) for base in own_bases(kind) for _, function in methods[base])
        key.append((path, kind, code, tuple(sorted(values.items(), key=lambda item: item[0])), tuple(own.items())))
        twin = type(module).__new__(type(module))
        nn.Module.__init__(twin)
        twin.__dict__.update(values)
        if any(shape is not None for shape in own.values()):
            layers.append((path, here, OWNED))
        for name, shape in own.items():
            twin._parameters[name] = None if shape is None else nn.Parameter(torch.empty(shape, device="meta"))
        for name, child in module._modules.items():
            inner = f"{path}.{name}" if path else name
            twin._modules[name] = None if child is None else copy(inner, here, child)
        return twin

    template = copy("", 0, block).eval().requires_grad_(False)
    number = _structures.setdefault(tuple(key), len(_structures))
    given = tuple(place.path for place in places if place.given)
    known_methods = tuple((vars(base), name, vars(base)[name]) for base, each in methods.items() for name, _ in each)
    classes = tuple((vars(base), len(vars(base))) for base in methods)
    hold = tuple(layers), tuple(places), additions, known_methods, classes, [-1] * len(places)
    return BlockPlan(template, number, given, len(places_in(template)), *hold)


def constants(kind: type) -> Collection[str]:
    """Attributes of layers of a class that what PyTorch or the host computes with them depends on."""
    return {"eps", *getattr(kind, "__constants__", ())}


@lru_cache(maxsize=256)
def _read_by(kind: type) -> frozenset[str]:
    """The names that functions of a class mention; others may leave what they like on its modules."""
    functions = [function for base in own_bases(kind) for _, function in functions_of(base)]
    return frozenset(name for each in functions for code in codes_of(each.__code__) for name in code.co_names)


def own_bases(kind: type) -> tuple[type, ...]:
    """A class of modules and those that it inherits from, without what every module has."""
    return kind.__mro__[: kind.__mro__.index(nn.Module)]


def functions_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions that a class itself defines, by name: its methods and what gives its properties."""
    for name, member in vars(kind).items():
        function = getattr(member, "fget", getattr(member, "__func__", member))
        if isinstance(function, FunctionType):
            yield name, function


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """``code``, and that of functions which it makes."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from codes_of(value)


def _is_given(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Given)


def is_plain(value: object) -> bool:
    """Whether a template can copy ``value``: a number, text, dtype or device, None, or a tuple of such."""
    if isinstance(value, tuple):
        return all(is_plain(item) for item in value)
    return isinstance(value, _PLAIN_VALUES)
