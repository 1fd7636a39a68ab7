"""Layers of GGUF files in regions: the real pack's where ``HOTPATH_GGUF`` names its folder, a stand-in's where not."""

import re

import pytest
import torch
from changes import with_lora
from hotpath_pack.devtools import checkpoints, gguf_pack
from hotpath_pack.host.compiling.warm_up import warm_up
from hotpath_pack.host.residency.streaming import RESIDENCY
from hotpath_pack.host.residency.weights import plain_layer
from hotpath_pack.host.telling.report import describe
from hotpath_pack.hotpath.template import NotHoistable
from sampling import Counting, Texts, assert_streams, compiled, compiled_blocks, offloaded, quantized, sample

SMALL = dict(width=32, height=32, tokens=4, steps=1)
PACKS = {"stand-in": gguf_pack.stand_in, "ComfyUI-GGUF": gguf_pack.real_pack}


@pytest.fixture(params=PACKS)
def pack(request):
    found = PACKS[request.param]()
    if found is None:
        pytest.skip(f"{gguf_pack.FOLDER} does not name a folder that holds ComfyUI-GGUF")
    return found


MIXTURE = {"img_mlp": "Q5_K", "linear2": "Q6_K", "mod": "BF16", "txt_attn": "F16"}
KINDS = ("Q8_0", "Q4_K", "IQ4_XS")


def mixed(name):
    """As in files of Q4_K_M, where some layers are kept in more bits."""
    return next((kind for part, kind in MIXTURE.items() if part in name), "Q4_K")


def gguf(weights, pack, kind=mixed, **facts):
    return gguf_pack.load(dict(weights), kind if callable(kind) else lambda name: kind, pack, **facts)


def assert_same_bits(model, fast, **run):
    want = sample(model, **SMALL, **run)
    assert want.isfinite().all() and want.std() > 0.1
    assert sample(fast, **SMALL, **run).equal(want)
    assert compiled_blocks(fast).eager == {}


@pytest.mark.parametrize("kind", KINDS)
def test_two_graphs_and_what_eager_gives_to_the_bit(flux_weights, pack, kind):
    model = gguf(flux_weights, pack, kind)
    with Counting() as counting:
        assert_same_bits(model, compiled(model, backend="eager"))
    assert (counting.graphs, counting.breaks) == (2, 0)


@pytest.mark.parametrize("dequant", ["target", torch.bfloat16])
def test_the_dtype_of_the_arithmetic_is_that_of_the_loader(flux_weights, pack, dequant):
    model = gguf(flux_weights, pack, dequant_dtype=dequant)
    assert_same_bits(model, compiled(model, backend="eager"))


def test_blocks_of_mixtures_of_types(flux_weights, pack):
    model = gguf(flux_weights, pack, lambda name: "Q5_K" if "blocks.1.img_mlp" in name else mixed(name))
    fast = compiled(model, backend="eager")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_bits(model, fast)
        assert sample(fast, width=64, height=32, tokens=7, steps=1).isfinite().all()
    assert (counting.graphs, counting.breaks) == (2, 0)
    other = gguf(flux_weights, pack, lambda name: "Q8_0" if "double_blocks.1.img_mlp" in name else mixed(name))
    with Counting() as counting:
        assert_same_bits(other, compiled(other, backend="eager"))
    assert (counting.graphs, counting.breaks) == (1, 0), "one more for the block that is mixed otherwise"


def test_loras_at_any_strength_and_without(flux_weights, pack):
    base = gguf(flux_weights, pack)
    plain = sample(base, **SMALL)
    weights = checkpoints.lora(flux_weights)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.5, 1.0):
            model = with_lora(base, weights, strength)
            with Counting() as counting:
                assert_same_bits(model, compiled(model, backend="eager"))
            assert counting.graphs == (2 if strength == 0.5 else 0) and counting.breaks == 0
            assert not sample(model, **SMALL).equal(plain)
    assert sample(base, **SMALL).equal(plain), "the LoRA left nothing behind"


@pytest.mark.parametrize("lora", [False, True])
def test_streamed_as_packed_bytes(flux_weights, pack, lora):
    base = gguf(flux_weights, pack, "Q4_K")
    model = with_lora(base, checkpoints.lora(flux_weights), 0.7) if lora else base
    for modulation in ("ahead", "in place"):
        lean = offloaded(model, modulation, budget="0 %")
        assert_streams(model, lean, least=5, **SMALL)
        unpacked = sum(weight.nbytes for name, weight in flux_weights.items() if "_blocks." in name)
        assert RESIDENCY[lean.model].streamed_bytes < 0.2 * unpacked
        assert_same_bits(model, compiled(lean, backend="eager"))
    assert type(lean.clone()) is type(lean) and isinstance(lean, pack.patcher)
    assert type(offloaded(lean)) is type(lean), "a second Offload replaces the first"


def test_a_lora_that_comes_after_offload(flux_weights, pack):
    base = gguf(flux_weights, pack, "Q4_0")
    lean, weights = offloaded(base, budget="0 %"), checkpoints.lora(flux_weights)
    for strength in (0.5, 1.0):
        assert_streams(with_lora(base, weights, strength), with_lora(lean, weights, strength), least=5, **SMALL)
    assert_streams(base, lean, least=5, **SMALL)


def test_other_nodes(flux_weights, pack):
    model = gguf(flux_weights, pack)
    fast = compiled(model, backend="eager")
    assert warm_up(fast, "64x64", "1", 16, Texts()).startswith("64x64, batch 1, 16 text tokens: ")
    assert describe(fast).startswith("2 double and 3 single blocks run as 2 regions")
    with pytest.raises(ValueError, match=r"model: it is of a GGUF file \(double_blocks.0.img_mod.lin is BF16\)"):
        quantized(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(get_weight=None), "is a GGUF layer of another form than HotPath knows: it has no get_weight"),
        (
            dict(_dequantized=lambda self, kind, data, shape, dtype: torch.ones(tuple(shape), dtype=dtype)),
            "of another pack computes something else from a weight in Q8_0 than HotPath",
        ),
    ],
)
def test_a_pack_that_computes_otherwise_runs_eager(flux_weights, change, reason):
    model = gguf(flux_weights, gguf_pack.stand_in(), "Q8_0", **change)
    fast = compiled(model, backend="eager")
    if "get_weight" in change:
        # No layer of it runs at all.
        with pytest.raises(NotHoistable, match=reason):
            plain_layer(model.model.diffusion_model.double_blocks[0].img_attn.qkv)
        return
    want = sample(model, **SMALL)
    assert torch.equal(sample(fast, **SMALL), want)
    assert not compiled_blocks(fast).compiled
    assert re.search(reason, str(compiled_blocks(fast).eager))
