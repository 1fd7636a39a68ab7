"""Checkpoints that are quantized already: compiled as the host computes them, or eager with the reason.

Parity is on the backend that runs the same operations: with others, a difference in the last place can quantize to the
next step, which is a difference of that size from there on.
"""

import comfy.model_management
import comfy.quant_ops
import pytest
import torch
from changes import in_low_vram
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints
from sampling import Counting, Texts, assert_parity, assert_two_graphs, compiled, compiled_blocks, load, sample

# PyTorch's fp8 product on the CPU is a plain loop.
SMALL = dict(width=32, height=32, tokens=4, steps=1)


@pytest.fixture
def fp8(monkeypatch, fp8_product):
    """As on a card that multiplies in fp8."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)


@pytest.fixture(params=["float8_e4m3fn", "int8_tensorwise"])
def format(request, fp8):
    if request.param not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {request.param}")
    return request.param


def quantized(flux_weights, format, **conf):
    return load_as_nodes_do(checkpoints.quantized(flux_weights, format, **conf))


def load_as_nodes_do(weights):
    """In inference mode, without which the host can't move a quantized weight."""
    with torch.inference_mode():
        return load(dict(weights), dtype=torch.float32)


def layer_of(model):
    return model.model.diffusion_model.single_blocks[0].linear1


def test_two_graphs_as_for_any_other(flux, flux_weights, format):
    model = quantized(flux_weights, format)
    assert layer_of(model).quant_format == format and not layer_of(model)._full_precision_mm
    difference = (sample(model, **SMALL) - sample(flux, **SMALL)).abs().max()
    assert 1e-3 < difference < 3, "quantization changes the image, a little"
    assert_two_graphs(model, **SMALL)


def test_generated_code_is_nearer_to_eager_than_quantization_is_to_full_precision(flux, flux_weights, format):
    """Rounding of generated code differs in the last place, which now and then quantizes to the next step."""
    model = quantized(flux_weights, format)
    eager, fast = sample(model, **SMALL), sample(compiled(model, backend="inductor"), **SMALL)
    assert (fast - eager).norm() < 0.3 * (eager - sample(flux, **SMALL)).norm()


def test_a_calibrated_input_scale_is_used(flux_weights, fp8):
    weights = checkpoints.quantized(flux_weights, "float8_e4m3fn")
    name = "single_blocks.0.linear1.input_scale"
    model = load_as_nodes_do({**weights, name: torch.tensor(0.05)})
    assert (sample(model, **SMALL) - sample(load_as_nodes_do(weights), **SMALL)).abs().max() > 1e-4
    fast = compiled(model, backend="eager")
    with Counting() as counting:
        assert_parity(model, fast, **SMALL)
    assert (counting.graphs, compiled_blocks(fast).eager) == (3, {}), "a structure of its own for that block"


def test_a_lora_resident_and_on_the_fly(flux_weights, format):
    """On the fly the host multiplies in full precision, so that plans must follow."""
    model = quantized(flux_weights, format)
    plain = sample(model, **SMALL)
    patched = load_lora_for_models(model, None, checkpoints.lora(flux_weights), 1.0, 0)[0]
    fast = compiled(patched, backend="eager")
    assert (sample(patched, **SMALL) - plain).abs().max() > 0.01
    assert_parity(patched, fast, **SMALL)
    low = in_low_vram(patched)
    assert_parity(low, compiled(low), **SMALL)
    assert layer_of(model).weight_function
    assert_parity(patched, fast, **SMALL)
    assert_parity(model, compiled(model, backend="eager"), **SMALL)


def test_full_precision_where_the_card_lacks_the_format(flux_weights, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: False)
    model = quantized(flux_weights, "float8_e4m3fn")
    assert layer_of(model)._full_precision_mm
    with Counting() as counting:
        assert_parity(model, compiled(model), **SMALL)
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_smoothed_activations_run_eager_and_say_so(flux_weights, format):
    weights = checkpoints.quantized(flux_weights, format)
    model, text = load_as_nodes_do(weights), Texts()
    layer = layer_of(model)
    layer.pre_quant_scale = torch.nn.Parameter(torch.full((layer.in_features,), 1.1), requires_grad=False)
    fast = compiled(model, text=text, backend="eager")
    assert_parity(model, fast, **SMALL)
    reason = f"a layer smooths its activations before it computes in {format}"
    assert f"eager: {reason} (single block 0)" in text.seen[-1]
    assert compiled_blocks(fast).compiled == {"double": 2, "single": 2}
