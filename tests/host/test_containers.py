"""Modules that the host's blocks may gain: taken by what they are, refused by name where a copy would not do."""

import sys
import textwrap

import pytest
import torch
from hotpath_pack.host.residency.weights import layer_states, plain_layers
from hotpath_pack.hotpath.template import NotHoistable, plan_block
from sampling import TOLERANCE, assert_parity, compiled, compiled_blocks, sample

# Activations of a file of the host, each in its block's MLP: what it is made with, and its forward.
SOURCE = """
import torch
from torch import nn

LIMITS = (0.5, 2.0)
MEMORY = {}


class Nothing(nn.Module):
    pass


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor, self.extent = 1.5, (1, "tanh")

    def forward(self, x):
        return self.inner(x).clamp(-LIMITS[1], LIMITS[1])

    def inner(self, x):
        return torch.tanh(x) * self.factor


class Folded(nn.Sequential):
    def __init__(self):
        super().__init__(Scaled(), nn.Tanh())

    def forward(self, x):
        return self[1](self[0](x)) * 2


class FoldedThatCounts(Folded):
    def forward(self, x):
        self.calls = len(self)
        return super().forward(x)


class Counts(Scaled):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(x) * self.calls


class CountsInside(Scaled):
    def inner(self, x):
        def count():
            self.factor = self.factor + 1
            return self.factor

        return torch.tanh(x) * count()


class LooksItselfUp(Scaled):
    def forward(self, x):
        return torch.tanh(x) * MEMORY.get(id(self), 1.0)


class LooksItselfUpInItsClass(Scaled):
    SEEN = {}

    def forward(self, x):
        return torch.tanh(x) * len(self.SEEN)


class Lists(Scaled):
    def __init__(self):
        super().__init__()
        self.steps = [1.0, 2.0]

    def forward(self, x):
        return torch.tanh(x) * self.steps[0]


class HoldsATensor(Scaled):
    def __init__(self):
        super().__init__()
        self.held = torch.ones(3)


class Buffered(Scaled):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(3))


class Weighted(Scaled):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)


class Hooked(Scaled):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, args, out: out * 2)
"""

REFUSED = {
    "FoldedThatCounts": "comfy.ldm.newer.FoldedThatCounts changes calls in its forward, which a template can't copy",
    "Counts": "comfy.ldm.newer.Counts changes calls in its forward, which a template can't copy",
    "CountsInside": "comfy.ldm.newer.CountsInside changes factor in its inner, which a template can't copy",
    "LooksItselfUp": "comfy.ldm.newer.LooksItselfUp reads MEMORY of its file in its forward",
    "LooksItselfUpInItsClass": "comfy.ldm.newer.LooksItselfUpInItsClass reads SEEN of its class in its forward",
    "Lists": "img_mlp.1.steps is a list, which can't be copied",
    "HoldsATensor": "img_mlp.1.held is a Tensor, which can't be copied",
    "Buffered": "img_mlp.1 (Buffered) holds weights outside a known layer",
    "Weighted": "img_mlp.1 (Weighted) holds weights outside a known layer",
    "Hooked": "img_mlp.1 (Hooked) has a forward hook",
}


@pytest.fixture
def newer(host_module):
    """A file of the host that this pack has never seen."""
    return host_module("comfy.ldm.newer", textwrap.dedent(SOURCE))


def with_activation(model, kind):
    """Puts a module of ``kind`` into the MLP of each double block."""
    for block in model.model.diffusion_model.double_blocks:
        block.img_mlp[1] = kind()
    return model


def refused(model, kind):
    """Why a block with such a module can't run from a template."""
    block = with_activation(model, kind).model.diffusion_model.double_blocks[1]
    with pytest.raises(NotHoistable) as reason:
        plan_block(block, plain_layers(block, fuses=False), layer_states)
    return str(reason.value)


@pytest.mark.parametrize("kind", ["Scaled", "Folded"])
def test_modules_of_the_host_with_plain_state_are_taken_whatever_they_are_called(flux, newer, kind):
    for block in [*flux.model.diffusion_model.double_blocks, *flux.model.diffusion_model.single_blocks]:
        block.nothing = newer.Nothing()
    plain = sample(flux)
    with_activation(flux, getattr(newer, kind))
    assert (sample(flux) - plain).abs().max() > 1e-3, "the module does nothing"
    fast = compiled(flux)
    assert_parity(flux, fast)
    assert compiled_blocks(fast).eager == {} and len(compiled_blocks(fast).regions) == 2


def test_what_they_hold_may_change(flux, newer):
    fast = compiled(with_activation(flux, newer.Scaled))
    assert_parity(flux, fast)
    before = sample(fast)
    for block in flux.model.diffusion_model.double_blocks:
        block.img_mlp[1].factor = 3.0
    assert_parity(flux, fast)
    assert (sample(fast) - before).abs().max() > 1e-3
    assert dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 3}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_copy_would_not_do_for_is_refused_by_name(flux, newer, kind):
    assert REFUSED[kind] in refused(flux, getattr(newer, kind))


def test_its_block_runs_eager(flux, newer):
    want = sample(with_activation(flux, newer.Counts))
    fast = compiled(with_activation(flux, newer.Counts), single="none")
    assert (sample(fast) - want).abs().max() <= TOLERANCE
    assert REFUSED["Counts"] in "".join(compiled_blocks(fast).eager)


def test_one_of_another_pack_is_not_taken(flux, newer, monkeypatch):
    monkeypatch.setattr(newer.Scaled, "__module__", "some_pack.nodes")
    monkeypatch.setitem(sys.modules, "some_pack.nodes", newer)
    assert refused(flux, newer.Scaled) == "some_pack.nodes.Scaled is not a layer that HotPath knows"


def test_a_forward_that_was_replaced_is_not_taken(flux, newer, monkeypatch):
    monkeypatch.setattr(newer.Scaled, "forward", lambda self, x: torch.relu(x))
    assert refused(flux, newer.Scaled) == "the forward of comfy.ldm.newer.Scaled was replaced"
