"""Checkpoints in formats that this pack has no layer of its own for: one opaque call a layer, as the host computes."""

import json

import comfy.quant_ops
import comfy_kitchen.tensor
import pytest
import torch
from changes import in_low_vram
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints
from sampling import Counting, assert_parity, assert_two_graphs, compiled, compiled_blocks, load, sample

SMALL = dict(width=32, height=32, tokens=4, steps=1)
# What the host says of a layer in its file beside the format.
FORMATS = {
    "convrot_w4a4": dict(convrot_groupsize=16),
    "asym_w4a8_int8": dict(group_size=16, convrot_groupsize=16),
    "nvfp4": {},
    "mxfp8": {},
}


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


def quantized(weights, format):
    """A MODEL of ``weights`` whose Linears of blocks are in ``format``, through the host's loader."""
    if format not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {format}")
    layout = comfy.quant_ops.get_layout_class(comfy.quant_ops.QUANT_ALGOS[format]["comfy_tensor_layout"])
    conf = FORMATS[format]
    made = dict(weights)
    for name, weight in weights.items():
        if name.endswith(".weight") and weight.ndim == 2 and "_blocks." in name:
            data, params = layout.quantize(weight, **conf)
            tensors = layout.state_dict_tensors(data, params)
            made.update({name + suffix: tensor for suffix, tensor in tensors.items()})
            text = json.dumps({"format": format, **conf}).encode()
            made[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    with torch.inference_mode():
        model = load(made, dtype=torch.float32)
    for module in model.model.diffusion_model.modules():
        if getattr(module, "quant_format", None) is not None:
            # As on a card that multiplies in it.
            module._full_precision_mm = False
    return model


def test_two_graphs_and_what_the_host_computes(flux, flux_weights, format):
    model = quantized(flux_weights, format)
    difference = (sample(model, **SMALL) - sample(flux, **SMALL)).abs().max()
    assert difference > 1e-3, "quantization changes the image"
    assert_two_graphs(model, **SMALL)


@pytest.mark.parametrize("format", ["convrot_w4a4", "nvfp4"])
def test_a_lora_resident_and_on_the_fly(flux_weights, format):
    """On the fly the host multiplies in full precision, so that plans must follow."""
    model = quantized(flux_weights, format)
    patched = load_lora_for_models(model, None, checkpoints.lora(flux_weights), 1.0, 0)[0]
    fast = compiled(patched, backend="eager")
    assert_parity(patched, fast, **SMALL)
    low = in_low_vram(patched)
    assert_parity(low, compiled(low, backend="eager"), **SMALL)
    assert_parity(patched, fast, **SMALL)


def test_a_layer_in_another_form_of_the_format_is_planned_anew(flux_weights):
    model = quantized(flux_weights, "convrot_w4a4")
    fast = compiled(model, backend="eager")
    assert_parity(model, fast, **SMALL)
    layout = comfy.quant_ops.get_layout_class("TensorCoreConvRotW4A4Layout")
    layer = model.model.diffusion_model.single_blocks[1].linear1
    data, params = layout.quantize(layer.weight.dequantize(), convrot_groupsize=4)
    layer.weight = torch.nn.Parameter(comfy.quant_ops.QuantizedTensor(data, layer.layout_type, params), False)
    with Counting() as counting:
        assert_parity(model, fast, **SMALL)
    assert (counting.graphs, compiled_blocks(fast).eager) == (1, {})


def test_a_layout_that_the_host_comes_to_load(flux_weights, monkeypatch):
    """As newer ones do with AWQ's, which is quantized elsewhere: weights in groups with a zero point each."""
    name = "TensorCoreAWQW4A16Layout"
    layout = getattr(comfy_kitchen.tensor, name)
    algorithm = {"storage_t": torch.int8, "parameters": set(), "comfy_tensor_layout": name, "quantize_input": False}
    monkeypatch.setitem(comfy.quant_ops.QUANT_ALGOS, "awq_w4a16", algorithm)
    model = quantized(flux_weights, "convrot_w4a4")
    for block in model.model.diffusion_model.single_blocks:
        layer = block.linear1
        rows, columns = layer.out_features, layer.in_features
        with torch.inference_mode():
            scales = torch.full((columns // 16, rows), 0.02)
            data = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
            facts = dict(orig_dtype=torch.float32, orig_shape=(rows, columns), group_size=16)
            params = layout.Params(scale=scales, zeros=scales * 0.5, **facts)
            layer.weight = torch.nn.Parameter(comfy.quant_ops.QuantizedTensor(data, name, params), False)
        layer.quant_format, layer.layout_type = "awq_w4a16", name
    fast = compiled(model, backend="eager")
    assert_parity(model, fast, **SMALL)
    assert compiled_blocks(fast).eager == {} and dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 3}
