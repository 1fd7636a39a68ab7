"""Two graphs, whatever happens around the compiled code, and what eager gives."""

import pytest
import torch
from changes import in_low_vram, with_lora
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.residency.weights import plain_layer
from hotpath_pack.hotpath.gelu import LogisticGelu
from hotpath_pack.hotpath.settings import MODES
from sampling import Counting, assert_parity, compiled, compiled_blocks, load, sample
from torch.nn import GELU

SIZES = [dict(width=96, height=64), dict(width=64, height=160), dict(width=128, height=128)]
TEXTS = [dict(tokens=7), dict(tokens=40)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_graphs_over_sizes_texts_and_loras(flux, flux_weights, backend):
    weights = checkpoints.lora(flux_weights)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(flux, compiled(flux, backend=backend), steps=4)
        for run in SIZES + TEXTS:
            assert_parity(flux, compiled(flux, backend=backend), **run)
        for strength in (0.5, 1.0):
            patched = with_lora(flux, weights, strength)
            assert_parity(patched, compiled(patched, backend=backend))
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_a_lora_does_change_the_image(flux, flux_weights):
    patched = with_lora(flux, checkpoints.lora(flux_weights), 1.0)
    assert (sample(patched) - sample(flux)).abs().max() > 0.01


def test_the_same_two_graphs_when_the_host_casts_weights_and_applies_the_lora_on_the_fly(flux, flux_weights):
    model = in_low_vram(with_lora(flux, checkpoints.lora(flux_weights), 1.0))
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        fast = compiled(model)
        assert_parity(model, fast)
        layer = flux.model.diffusion_model.single_blocks[0].linear1
        assert layer.weight_function and layer.comfy_cast_weights
        for run in SIZES + TEXTS:
            assert_parity(model, fast, **run)
        resident = with_lora(flux, checkpoints.lora(flux_weights), 1.0)
        assert_parity(resident, compiled(resident))
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_a_batch_costs_two_more_once_and_says_why(flux, caplog):
    fast = compiled(flux)
    for batch in (1, 2, 3, 4):
        assert_parity(flux, fast, batch=batch)
    for region in compiled_blocks(fast).regions:
        assert region.stats.graphs == 2
        assert region.stats.recompiles == ["batch size changed from 1 to 2"]
    said = "compiled again: batch size changed from 1 to 2 "
    said += "(dynamic: 'always' takes all batches of two and more at once)"
    assert compiled_blocks(fast).summary().endswith(said)
    assert caplog.messages.count(said) == 1, "the user is told once"


def test_never_dynamic_compiles_each_size_and_always_matches_eager(flux, regions):
    fast = compiled(flux, dynamic="never")
    assert_parity(flux, fast, **SIZES[0])
    assert "compiled again" not in compiled_blocks(fast).summary()
    for run in (SIZES[1], SIZES[0]):
        assert_parity(flux, fast, **run)
    assert [region.stats.graphs for region in regions] == [1, 1, 1, 1]
    said = "; compiled again: another size (dynamic: 'auto' compiles once for all sizes)"
    assert compiled_blocks(fast).summary().endswith(said)
    assert_parity(flux, compiled(flux, dynamic="always"), batch=2)


def test_always_is_two_graphs_for_all_batches_of_two_and_more_in_the_default_backend(flux, flux_weights):
    weights = checkpoints.lora(flux_weights)
    with Counting() as counting:
        for batch, run in ((2, SIZES[0]), (3, TEXTS[0])):
            for model in (flux, with_lora(flux, weights, 0.5)):
                assert_parity(model, compiled(model, dynamic="always", backend="inductor"), batch=batch, **run)
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_a_second_model_of_the_same_structure_compiles_nothing(flux, flux_weights):
    sample(compiled(flux))
    other = load({name: weight * 0.9 for name, weight in flux_weights.items()})
    with Counting() as counting:
        assert_parity(other, compiled(other))
    assert counting.graphs == 0
    assert (sample(other) - sample(flux)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_compute_what_eager_computes(flux_weights, dtype):
    """Half precision rounds at each step, so the bound is one in its own unit: a few of its last places."""
    model = load({name: weight.to(dtype) for name, weight in flux_weights.items()})
    model.set_model_compute_dtype(dtype)
    want, got = sample(model), sample(compiled(model, backend="inductor"))
    assert (want - got).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()


def test_fp8_storage_is_cast_as_the_host_casts_it(flux_weights):
    model = load(dict(flux_weights), dtype=torch.float8_e4m3fn)
    weight = model.model.diffusion_model.single_blocks[0].linear1.weight
    with Counting() as counting:
        assert_parity(model, compiled(model))
    assert weight.dtype == torch.float8_e4m3fn
    assert counting.graphs == 2


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "default"])
def test_every_mode_computes_what_eager_computes(flux, mode):
    with Counting() as counting:
        assert_parity(flux, compiled(flux, backend="inductor", mode=mode, double="0", single="0"))
        assert_parity(flux, compiled(flux, backend="inductor", mode=mode, double="0", single="0"), width=96)
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_gelu_is_written_in_parts_for_a_compiler_that_fuses_them_alone():
    tanh, exact = GELU(approximate="tanh"), GELU()
    assert isinstance(plain_layer(tanh, fuses=True), LogisticGelu)
    assert [plain_layer(tanh), plain_layer(exact), plain_layer(exact, fuses=True)] == [None] * 3


def test_only_the_selected_blocks_are_compiled(flux):
    fast = compiled(flux, double="none", single="0,2")
    assert_parity(flux, fast)
    assert dict(compiled_blocks(fast).compiled) == {"single": 2}
