"""Quantize Repeated Blocks on a MODEL that is loaded already, through the host's own sampling."""

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from changes import in_low_vram
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.measure import snr
from hotpath_pack.host.quantizing import quantize as host_quantize
from hotpath_pack.host.quantizing.formats import FORMATS, VECTOR_FORMAT, node_formats, require_format_here
from hotpath_pack.host.quantizing.quantize import quantization
from sampling import (
    Counting,
    Texts,
    assert_parity,
    assert_two_graphs,
    compiled,
    compiled_blocks,
    load,
    quantized,
    sample,
)

# PyTorch's fp8 product on the CPU is a plain loop.
SMALL = dict(width=32, height=32, tokens=4, steps=1)
RUNNABLE = node_formats()[1:]
# dB of one step against full precision that these lively weights reach; those of a whole Flux are below.
SNR = {
    "int8_dynamic": 38,
    "int8_weight_only": 44,
    "fp8_e4m3_rowwise": 26,
    "fp8_e4m3": 26,
    "int4_weight_only": 19,
    "convrot_w4a4": 8,
}
# All but the one that computes in an opaque call a layer; test_quantized_opaque.py counts its graphs.
TRACED = [name for name in RUNNABLE if name != "convrot_w4a4"]
# What the host's own loader doesn't know.
NOT_IN_FILES = ("fp8_e4m3_rowwise", "int4_weight_only")


@pytest.fixture(autouse=True)
def as_on_a_card(fp8_product):
    pass


def linears(model):
    names = dict(model.model.diffusion_model.named_modules())
    return {name: module for name, module in names.items() if hasattr(module, "in_features")}


@pytest.mark.parametrize("format", TRACED)
def test_two_graphs_and_what_eager_quantized_gives(flux, format):
    assert_two_graphs(quantized(flux, format), **SMALL)


@pytest.mark.parametrize("format", TRACED)
@pytest.mark.sweep(keep=["int8_dynamic"])
def test_generated_code_is_nearer_to_eager_than_quantization_is_to_full_precision(flux, format):
    model = quantized(flux, format)
    full, eager = sample(flux, **SMALL), sample(model, **SMALL)
    with Counting() as counting:
        fast = sample(compiled(model, backend="inductor"), **SMALL)
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert (fast - eager).norm() < 0.3 * (eager - full).norm()


@pytest.mark.parametrize("format", RUNNABLE)
@pytest.mark.sweep(keep=["fp8_e4m3_rowwise"])
def test_a_step_of_a_whole_flux_is_near_full_precision(format):
    flux = load(checkpoints.normal(checkpoints.flux1()))
    run = dict(width=128, height=128, steps=1)
    least = 36 if "4" in format.removeprefix("fp8_e4m3") else 55 if "int8" in format else 45
    assert snr(sample(flux, **run), sample(quantized(flux, format), **run)) >= least


def test_a_scale_for_each_row_stands_large_rows_better():
    run, gains = dict(width=128, height=128, steps=1), []
    for seed in range(4):
        flux = load(checkpoints.normal(checkpoints.flux1(seed=seed), seed=seed, outliers=True))
        full = sample(flux, **run)
        of_rows, of_all = (snr(full, sample(quantized(flux, name), **run)) for name in ("fp8_e4m3_rowwise", "fp8_e4m3"))
        gains.append(of_rows - of_all)
    assert sum(gains) / len(gains) >= 1, gains


def test_the_model_that_came_in_stays_as_it_is(flux):
    before = {name: tensor.clone() for name, tensor in flux.model.state_dict().items()}
    want = sample(flux, **SMALL)
    model = quantized(flux)
    sample(model, **SMALL)
    after = flux.model.state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)
    assert sample(flux, **SMALL).equal(want)
    assert model.model is not flux.model and not model.is_clone(flux)


def test_everything_but_the_blocks_linears_is_shared(flux):
    model = quantized(flux)
    theirs = flux.model.diffusion_model
    for name, tensor in model.model.diffusion_model.named_parameters():
        if isinstance(tensor, comfy.quant_ops.QuantizedTensor):
            assert "_blocks." in name and name.endswith(".weight")
        else:
            assert tensor.data_ptr() == theirs.get_parameter(name).data_ptr(), name


def test_modulation_is_weight_only_and_embedders_and_norms_stay(flux):
    layers = linears(quantized(flux, "fp8_e4m3_rowwise"))
    for name, layer in layers.items():
        if "_blocks." not in name:
            assert not isinstance(layer.weight, comfy.quant_ops.QuantizedTensor), name
        elif "mod" in name:
            assert (layer.quant_format, layer._full_precision_mm) == (VECTOR_FORMAT.host_name, True), name
        else:
            assert (layer.quant_format, layer._full_precision_mm) == ("fp8_e4m3_rowwise", False), name


@pytest.mark.parametrize("format", RUNNABLE)
@pytest.mark.sweep(keep=["int8_dynamic", "int4_weight_only"])
def test_a_lora_before_or_after_gives_the_same(flux, flux_weights, format):
    lora = checkpoints.lora(flux_weights)
    before = quantized(load_lora_for_models(flux, None, lora, 1.0, 0)[0], format)
    after = load_lora_for_models(quantized(flux, format), None, lora, 1.0, 0)[0]
    plain, want = sample(quantized(flux, format), **SMALL), sample(after, **SMALL)
    assert (want - plain).abs().max() > 0.01
    assert sample(before, **SMALL).equal(want)
    full = sample(load_lora_for_models(flux, None, lora, 1.0, 0)[0], **SMALL)
    assert snr(full, want) > SNR[format] - 10
    assert_parity(after, compiled(after, backend="eager"), **SMALL)
    low = in_low_vram(after)
    assert_parity(low, compiled(low), **SMALL)
    assert sample(quantized(flux, format), **SMALL).equal(plain), "the LoRA left nothing behind"


def test_a_loaded_and_patched_model_gives_its_own_weights(flux, flux_weights):
    want = sample(quantized(flux), **SMALL)
    other = load({name: weight.clone() for name, weight in flux_weights.items()})
    patched = load_lora_for_models(other, None, checkpoints.lora(flux_weights), 1.0, 0)[0]
    sample(patched, **SMALL)
    assert patched.backup, "the LoRA is baked into the weights now"
    assert sample(quantized(other), **SMALL).equal(want)


def test_not_done_again_for_the_same_inputs(flux, flux_weights):
    first = quantized(flux)
    patched = load_lora_for_models(flux, None, checkpoints.lora(flux_weights), 1.0, 0)[0]
    assert quantized(patched).model is first.model
    assert quantized(flux, skip="img_mlp.2").model is not first.model


def test_a_quantized_model_goes_with_the_model_it_was_made_from(flux_weights):
    import gc
    import weakref

    flux = load({name: weight.clone() for name, weight in flux_weights.items()})
    model = quantized(flux)
    twin = weakref.ref(model.model)
    del model
    gc.collect()
    assert twin() is not None, "kept for the next prompt"
    del flux
    gc.collect()
    assert twin() is None


def test_what_is_left_alone(flux):
    text = Texts()
    model = quantized(flux, skip="img_mlp.2, single_blocks.0.*", text=text)
    kept = {name for name, layer in linears(model).items() if "_blocks." in name and not hasattr(layer, "quant_format")}
    assert kept == {
        "double_blocks.0.img_mlp.2",
        "double_blocks.1.img_mlp.2",
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
        "single_blocks.0.modulation.lin",
    }
    assert "5 left alone as asked" in text.seen[-1] == quantization(model).summary()
    fast = compiled(model, backend="eager")
    assert_parity(model, fast, **SMALL)
    assert compiled_blocks(fast).eager == {}


def test_layers_too_small_to_gain(flux_weights):
    narrow = load(checkpoints.flux1(1, 1, hidden=128))
    text = Texts()
    quantized(narrow, text=text)
    assert f"too small for {RUNNABLE[0]}" in text.seen[-1] and "modulation layers in " in text.seen[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(format="int3"), f"format: 'int3' is unknown. Choose one of {RUNNABLE[0]}"),
        (dict(format="nvfp4"), rf"nvfp4 needs an NVIDIA GPU of compute capability 10.0 .* can run {RUNNABLE[0]}"),
        (dict(skip="img_mpl.2"), "skip: img_mpl.2 fits no layer.*img_attn.qkv"),
        (dict(skip="*"), "nothing is left to quantize"),
    ],
)
def test_bad_input_names_itself_and_loses_nothing(flux, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantized(flux, **arguments)
    sample(flux, **SMALL)


def test_models_that_are_quantized_already(flux, flux_weights):
    with torch.inference_mode():
        scaled = load(dict(checkpoints.quantized(flux_weights, "float8_e4m3fn")), dtype=torch.float32)
        cast = load(dict(flux_weights), dtype=torch.float8_e4m3fn)
    for model in (scaled, cast, quantized(flux)):
        with pytest.raises(ValueError, match="model: its blocks are quantized already"):
            quantized(model)


def test_what_another_node_did_in_place_is_not_lost_silently(flux):
    module = flux.model.diffusion_model.single_blocks[1].linear1
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"changed this model in place .*forward hook.*before that node"):
        quantized(flux)
    handle.remove()
    quantized(flux)
    patched = flux.clone()
    patched.add_object_patch("diffusion_model.forward_orig", flux.model.diffusion_model.forward_orig)
    with pytest.raises(ValueError, match="another node replaces diffusion_model.forward_orig"):
        quantized(patched)


class Foreign(torch.nn.Linear):
    """What a pack of GGUF files puts in place of the host's."""


def test_a_layer_of_another_pack(flux):
    block = flux.model.diffusion_model.double_blocks[0]
    block.img_attn.proj = Foreign(256, 256)
    with pytest.raises(ValueError, match=r"double_blocks.0.img_attn.proj can't be quantized: .*Foreign"):
        quantized(flux)


def test_interrupted_and_tried_again(flux, monkeypatch):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantized(flux)
    assert flux.model not in host_quantize._LAST
    sample(quantized(flux), **SMALL)


@pytest.mark.parametrize("format", RUNNABLE)
@pytest.mark.sweep(keep=["int8_dynamic", "fp8_e4m3"])
def test_a_saved_checkpoint_loads_in_a_plain_host(flux, format):
    model = quantized(flux, format)
    saved = model.model.diffusion_model.state_dict()
    if format in NOT_IN_FILES:
        with pytest.raises(KeyError, match=format), torch.inference_mode():
            load(saved, dtype=torch.float32)
        return
    with torch.inference_mode():
        again = load({name: tensor.clone() for name, tensor in saved.items()}, dtype=torch.float32)
    # There the modulation layers, and int8_weight_only's, quantize what they multiply too.
    assert snr(sample(flux, **SMALL), sample(again, **SMALL)) > min(SNR[format], SNR["int8_dynamic"] - 3)
    assert {layer.quant_format for layer in linears(again).values() if hasattr(layer, "quant_format")} == {
        FORMATS[format].host_name,
        VECTOR_FORMAT.host_name,
    }


@pytest.fixture(scope="module")
def full_width():
    return load(checkpoints.flux1(1, 1, hidden=3072, dtype=torch.bfloat16), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["convrot_w4a4", "asym_w4a8_int8"])
def test_four_bits_of_the_hosts_where_it_has_them(monkeypatch, name):
    format, card = FORMATS[name], torch.device("cuda", 0)
    monkeypatch.setattr(comfy.model_management, "is_nvidia", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setitem(comfy.quant_ops.QUANT_ALGOS, name, {})
    assert (format.missing(torch.device("cpu")) is None) == (name == "convrot_w4a4")
    assert "NVIDIA GPU of compute capability" in format.missing(card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert format.missing(card) is None
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, name)
    assert format.missing(card) == f"a newer ComfyUI, which has {name} layers"


def test_four_bits_take_a_quarter_and_their_scales():
    weight = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    small = FORMATS["int4_weight_only"].quantize(weight, torch.bfloat16)
    assert host_quantize.weight_bytes(small) / weight.nbytes == 4.25 / 16


# Four bits of a whole block with a search take minutes on a CPU.
@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("int4_weight_only", "asym_w4a8_int8")])
@pytest.mark.sweep(keep=["int8_dynamic"])
def test_memory_of_blocks_of_full_width(full_width, format):
    if "ComfyUI" in (FORMATS[format].missing(torch.device("cpu")) or ""):
        pytest.skip("this ComfyUI has no such layers")
    formats, counts = host_quantize.choose(full_width.model.diffusion_model, FORMATS[format], "")
    with torch.inference_mode():
        _, done = host_quantize._quantize(full_width, formats, counts, host_quantize.states_of(full_width), Texts())
    # A power of two for each 32 values is a thirty-second more.
    most = {"nvfp4": 0.35, "mxfp8": 0.5125, "convrot_w4a4": 0.33}
    assert done.bytes_after / done.bytes_before <= most.get(format, 0.51)


def test_a_second_copy_of_the_model_is_quantized_too(flux_weights, tmp_path):
    """As the host makes for a second GPU, or where dynamic VRAM does not serve."""
    path = checkpoints.save(tmp_path / "flux.safetensors", flux_weights)
    with torch.inference_mode():
        model = quantized(comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32}))
        copy = model.clone(force_deepcopy=True)
    assert copy.model is not model.model
    assert quantization(copy) == quantization(model)
    assert sample(copy, **SMALL).equal(sample(model, **SMALL))


def test_the_node_offers_what_runs_here_and_validates_the_rest():
    assert node_formats() == ["auto", *RUNNABLE] and "nvfp4" not in RUNNABLE
    assert ("convrot_w4a4" in RUNNABLE) == ("convrot_w4a4" in comfy.quant_ops.QUANT_ALGOS)
    assert require_format_here("auto") is FORMATS[RUNNABLE[0]]
    with pytest.raises(ValueError, match="compute capability 10.0"):
        require_format_here("mxfp8")


@pytest.mark.parametrize("make", ["flux2", "chroma"])
@pytest.mark.sweep(keep=["flux2"])
def test_other_models(make):
    model = load(getattr(checkpoints, make)())
    small = quantized(model, "int8_weight_only")
    assert_parity(small, compiled(small, backend="eager"), **SMALL)
    assert snr(sample(model, **SMALL), sample(small, **SMALL)) > 20
