"""Modules that the host's blocks may gain: taken by what they are, refused by name where a copy would not do."""

import sys

import pytest
import torch
from changes import with_activation
from hotpath_pack.host.residency.weights import layer_states, plain_layers
from hotpath_pack.hotpath.template import NotHoistable, plan_block
from sampling import TOLERANCE, assert_parity, compiled, compiled_blocks, sample

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
