"""Flux blocks as ComfyUI builds them from 0.40 on; in an older one `test_newest_host.py` runs this on a copy of it."""

import os
from pathlib import Path

import comfy.ldm.modules.attention as host_attention
import comfy_kitchen
import folder_paths
import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.newest_host import is_newest
from hotpath_pack.host.compiling import regions as host_regions
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.host.quantizing.quantize import quantize_repeated_blocks
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.region_store import RegionStore
from hotpath_pack.hotpath.settings import CompileSettings
from sampling import (
    TOLERANCE,
    Counting,
    Texts,
    assert_parity,
    assert_two_graphs,
    compiled,
    compiled_blocks,
    load,
    sample,
)
from test_patches import attention_override, attn1_patch, patched

pytestmark = pytest.mark.skipif(not is_newest(Path(os.environ["COMFYUI_PATH"])), reason="an older ComfyUI's blocks")
SMALL = dict(width=32, height=32, tokens=4, steps=1)


def preferring(gain):
    """An attention function as the host registers them, of other results than its own."""

    @host_attention.wrap_attn
    def attention(q, k, v, heads, **kwargs):
        return host_attention.attention_pytorch(q * gain, k, v, heads, **kwargs)

    return attention


def prefer(model, function, blocks=("double_blocks", "single_blocks")):
    """As a checkpoint does that says which attention its blocks are to use."""
    for name in blocks:
        for block in getattr(model.model.diffusion_model, name):
            block.comfy_attention.config = {"attention": "made here"}
            block.comfy_attention.function = function
    return model


def test_nothing_runs_eager_and_two_graphs_serve_all(flux):
    assert_two_graphs(flux)


@pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")
def test_blocks_are_kept_with_their_norms_as_plain_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    model = load(checkpoints.flux1(1, 1))
    want = sample(model)
    calls = []
    find = comfy_kitchen.registry.get_implementation
    monkeypatch.setattr(
        comfy_kitchen.registry,
        "get_implementation",
        lambda name, **held: calls.append(name) or find(name, **held),
    )
    for cache in ("miss: nothing was stored yet", "hit"):
        monkeypatch.setattr(host_regions, "REGIONS", RegionStore(capacity=64))
        fast = compile_repeated_blocks(model, CompileSettings(), "all", "all", "error", Texts(), "auto")
        calls.clear()
        assert (sample(fast) - want).abs().max() <= TOLERANCE
        # Of the last layer, which is in no block.
        assert calls.count("adaln") == 2
        assert {region.stats.cache for region in compiled_blocks(fast).regions} == {cache}


def test_an_attention_that_blocks_prefer_is_honoured_and_costs_two_graphs(flux):
    plain = sample(flux, **SMALL)
    fast = compiled(flux)
    assert_parity(flux, fast, **SMALL)
    images = [plain]
    with Counting() as counting:
        for gain in (0.3, 2.0):
            prefer(flux, preferring(gain))
            assert_parity(flux, fast, **SMALL)
            images.append(sample(fast, **SMALL))
        prefer(flux, preferring(0.3), blocks=["single_blocks"])
        assert_parity(flux, fast, **SMALL)
        images.append(sample(fast, **SMALL))
        prefer(flux, None)
        assert_parity(flux, fast, **SMALL)
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert compiled_blocks(fast).eager == {} and dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 3}
    for index, image in enumerate(images):
        assert all((image - other).abs().max() > 1e-3 for other in images[index + 1 :]), "the preference does nothing"


@pytest.mark.parametrize("patch", [attn1_patch, attention_override])
def test_it_goes_with_patches_around_attention_as_in_the_host(flux, patch):
    model = patched(prefer(flux, preferring(0.3)), patch, 0.3)
    assert_parity(model, compiled(model, backend="eager"))
    unpreferred = sample(patched(prefer(flux, None), patch, 0.3))
    # An override is asked before a preference.
    differs = (sample(patched(prefer(flux, preferring(0.3)), patch, 0.3)) - unpreferred).abs().max() > 1e-3
    assert differs == (patch is not attention_override)


def test_a_lora_that_brings_one_can_be_quantized_and_a_checkpoints_own_is_kept(flux):
    prefer(flux, preferring(0.5), blocks=["single_blocks"])
    model = flux.clone()
    for index in range(2):
        brought = host_attention.ComfyAttention()
        brought.function = preferring(0.3)
        model.add_object_patch(f"diffusion_model.double_blocks.{index}.comfy_attention", brought)
    # Patched as it is loaded, so that what it was loaded with is in the backup alone.
    full = sample(model, **SMALL)
    with torch.inference_mode():
        quantized = quantize_repeated_blocks(model, "int8_weight_only", "", Texts())
        neither = quantize_repeated_blocks(flux, "int8_weight_only", "", Texts())
    eager = sample(quantized, **SMALL)
    assert (eager - full).norm() < 0.1 * (sample(neither, **SMALL) - full).norm() + 0.02 * full.norm()
    single = quantized.model.diffusion_model.single_blocks[0].comfy_attention
    assert single.function is flux.model.diffusion_model.single_blocks[0].comfy_attention.function
    fast = compiled(quantized, backend="eager")
    assert (sample(fast, **SMALL) - eager).abs().max() <= TOLERANCE
    assert compiled_blocks(fast).eager == {}
    assert (sample(neither, **SMALL) - eager).abs().max() > 1e-3
