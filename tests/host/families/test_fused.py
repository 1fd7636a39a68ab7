"""Blocks in fewer passes over memory: the same two graphs, and what eager gives."""

import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.families import flux, flux_fused
from sampling import assert_parity, assert_two_graphs, compiled, compiled_blocks, load


@pytest.fixture
def as_on_hopper(monkeypatch):
    """Traced as on the cards that this was measured on; on a CPU the kernel's operators are plain formulas."""
    monkeypatch.setattr(flux, "bind_traced", flux.bind_fused)
    with flux_fused.twins(flux.KINDS):
        yield


@pytest.mark.parametrize("make", [checkpoints.flux1, checkpoints.flux2])
def test_two_graphs_and_what_eager_gives(as_on_hopper, make):
    assert_two_graphs(load(make(1, 1)))


@pytest.mark.sweep
def test_chroma_with_its_mask_and_a_batch(as_on_hopper):
    model = load(checkpoints.chroma(1, 1))
    fast = compiled(model, backend="eager")
    assert_parity(model, fast, batch=2, steps=1)
    assert compiled_blocks(fast).eager == {}


def same():
    with torch.inference_mode():
        return flux_fused.same_as_the_host(flux.bind_cudnn, flux.bind_fused)


def test_the_blocks_of_this_comfyui_are_known_to_be_the_same():
    assert same()


FAULTS = {
    "streams joined in the other order": ("norm_rotate_joint", lambda run: lambda q, *rest: run(q[::-1], *rest)),
    "queries changed on their way": ("norm_rotate", lambda run: lambda q, *rest: run(q + 1, *rest)),
    "a product of another half": ("linear", lambda run: lambda x, weight, *bias: run(x, weight.flip(-1), *bias)),
    "another activation": ("gelu_of_linear", lambda run: torch.nn.functional.linear),
    "a block that is made in another way": ("layer_states", lambda run: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_block_that_is_another_runs_as_it_is_written(monkeypatch, fault):
    name, change = FAULTS[fault]
    monkeypatch.setattr(flux_fused, name, change(getattr(flux_fused, name)))
    assert not same()


@pytest.mark.parametrize("kind", [DoubleStreamBlock, SingleStreamBlock])
def test_each_block_has_a_twin_that_without_its_option_is_the_host_block(kind):
    assert issubclass(flux_fused.TWINS[kind], kind)
    assert {known.twin for known in flux.KINDS} == {None}
    with flux_fused.twins(flux.KINDS):
        assert flux_fused.TWINS[kind] in {known.twin for known in flux.KINDS}
