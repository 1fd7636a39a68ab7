"""Folders of diffusers in int8, as MODELs of the host's int8 layers."""

import comfy.quant_ops
import pytest
import torch
from folders import VARIANTS, change_config, lively
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.measure import snr
from hotpath_pack.host.diffusers_folders.load import load_diffusers_flux, load_folder
from safetensors.torch import load_file
from sampling import Texts, assert_two_graphs, sample

# Named as bitsandbytes 0.50.2 and optimum-quanto 0.2.7 (through diffusers 0.42.1) were seen to name them.
INT8 = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda layer, data, scale: {
            f"{layer}.weight": data,
            f"{layer}.SCB": scale.flatten() * 127,
            f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),
        },
    ),
    "quanto": (
        {"quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": None},
        lambda layer, data, scale: {
            f"{layer}.weight._data": data,
            f"{layer}.weight._scale": scale,
            f"{layer}.input_scale": torch.ones(()),
            f"{layer}.output_scale": torch.ones(()),
        },
    ),
}


def save_int8(method, folder, skip=()):
    """A Flux.1 dev whose Linear layers are int8; returns diffusers' model of the same dequantized weights."""
    kind, config, _ = VARIANTS["dev"]
    transformer = lively(kind, **config)
    given, stored_as = INT8[method]
    weights = dict(transformer.state_dict())
    for layer, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and layer not in skip:
            weight = weights.pop(f"{layer}.weight")
            scale = weight.abs().amax(1, keepdim=True) / 127
            data = (weight / scale).round().to(torch.int8)
            weights.update(stored_as(layer, data, scale))
            module.weight = torch.nn.Parameter(data * scale, requires_grad=False)
    transformer.save_config(folder)
    change_config(folder, quantization_config=given)
    checkpoints.save(folder / "diffusion_pytorch_model.safetensors", weights)
    return transformer


has_int8 = "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS
needs_int8 = pytest.mark.skipif(not has_int8, reason="this ComfyUI has no such layers")


def test_int8_in_a_comfyui_without_such_layers(models, monkeypatch):
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "int8_tensorwise", raising=False)
    save_int8("quanto", models / "diffusers" / "small")
    with pytest.raises(ValueError, match="config.json: the weights are quantized by quanto in int8, .* Update ComfyUI"):
        load_diffusers_flux("small", Texts())


@needs_int8
@pytest.mark.parametrize("method", INT8)
def test_int8_weights_are_loaded_as_they_are(models, method):
    transformer = save_int8(method, models / "diffusers" / "small")
    # As nodes do; the host needs it for quantized weights.
    with torch.inference_mode():
        model = load_diffusers_flux("small", Texts())
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert layer.quant_format == "int8_tensorwise"
    want = [transformer.transformer_blocks[0].attn.get_submodule(name).weight for name in ("to_q", "to_k", "to_v")]
    assert (layer.weight.dequantize().float() - torch.cat(want)).abs().max() < 1e-2
    full = load_folder(save_full(transformer, models))
    assert snr(sample(full), sample(model)) > 35
    assert_two_graphs(model)


def change_weights(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    checkpoints.save(path, weights)


@needs_int8
@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("bitsandbytes", {"proj_out.SCB": torch.ones(3)}, "proj_out has 3 scales for 64 rows of torch.int8"),
        (
            "bitsandbytes",
            {"proj_out.weight": torch.ones(64, 256)},
            "proj_out has 64 scales for 64 rows of torch.float32",
        ),
        ("bitsandbytes", {"proj_out.weight_format": torch.tensor(1)}, "proj_out.weight_format is not 0"),
        ("quanto", {"proj_out.input_scale": torch.tensor(0.5)}, "proj_out.input_scale is not 1"),
        ("quanto", {"stray.weight._scale": torch.ones(3)}, "stray.weight._scale belong to no FluxTransformer2DModel"),
    ],
)
def test_int8_that_the_hosts_layers_cannot_express(models, method, change, message):
    save_int8(method, models / "diffusers" / "odd")
    change_weights(models / "diffusers" / "odd", lambda weights: weights.update(change))
    with pytest.raises(ValueError, match=message):
        load_diffusers_flux("odd", Texts())


def save_full(transformer, models):
    transformer.save_pretrained(models / "full")
    return models / "full"


@needs_int8
def test_half_of_a_merged_layer_quantized(models):
    save_int8("quanto", models / "diffusers" / "mixed", skip=["transformer_blocks.1.attn.to_k"])
    with pytest.raises(
        ValueError, match=r"mixed: transformer_blocks.1.attn.to_q.weight, .* not all of them are quantized"
    ):
        load_diffusers_flux("mixed", Texts())
