"""Quantize Repeated Blocks over the host's API."""

import pytest
import requests
from hotpath_pack.devtools.measure import snr
from hotpath_pack.devtools.server import PromptFailed
from hotpath_pack.devtools.workflows import sampling
from live import TOLERANCE

LORA = [("style.safetensors", 0.7)]


@pytest.fixture(scope="module")
def schema(small_flux):
    return small_flux.server.get("/object_info/HotPathQuantizeRepeatedBlocks")["HotPathQuantizeRepeatedBlocks"]


@pytest.fixture(scope="module")
def formats(schema):
    return schema["input"]["required"]["format"][1]["options"]


def test_the_node_is_described(schema, small_flux):
    assert (schema["display_name"], schema["output"]) == ("Quantize Repeated Blocks", ["MODEL"])
    inputs = schema["input"]["required"]
    assert list(inputs) == ["model", "format", "skip"] and all(options["tooltip"] for _, options in inputs.values())
    page = requests.get(f"{small_flux.server.url}/extensions/HotPath/docs/HotPathQuantizeRepeatedBlocks.md", timeout=10)
    assert page.text.startswith("# Quantize Repeated Blocks")


def test_quantized_and_compiled_with_a_lora(small_flux, formats):
    full = small_flux.latent(loras=LORA)
    # Four bits take a CPU long by the host's operators; tests/host has them.
    for format in (name for name in formats if "w4" not in name):
        run = dict(loras=LORA, quantized=format)
        eager = small_flux.latent(**run)
        least = 10 if "int4" in format else 15
        assert snr(full, eager) > least
        # On the CPU the host multiplies fp8_e4m3 dequantized, which rounds, and from then on quantizes, otherwise.
        fast = small_flux.latent(**run, compiled={"backend": "eager"})
        assert snr(full, fast) > least
        if format.startswith("int8") or format == "fp8_e4m3_rowwise":
            assert (fast - eager).abs().max() <= TOLERANCE, format


def test_the_node_shows_what_it_did_and_does_it_once(small_flux, formats):
    result = small_flux.sample(quantized=formats[0], report=True, seed=11)
    texts = [text for node, text in result.texts if node == "quantize"]
    assert texts[0] == "quantizing 29 layers ..."
    assert texts[1].startswith("quantized: blocks ")
    assert f"; 22 layers in {formats[1]}, 7 modulation layers in " in texts[1]
    assert any(event.type == "progress" and event.data.get("node") == "quantize" for event in result.events)
    again = small_flux.sample(quantized=formats[0], loras=[("style.safetensors", 0.31)])
    texts = [text for node, text in again.texts if node == "quantize"]
    assert len(texts) == 1 and texts[0].startswith("quantized: "), "another LoRA quantizes nothing again"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"format": "nvfp4"}, "nvfp4 needs an NVIDIA GPU of compute capability 10.0 or newer"),
        ({"format": "int3"}, "'int3' is unknown. Choose one of "),
        ({"skip": "nothing.*"}, "skip: nothing.* fits no layer of this model's blocks"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(small_flux, formats, inputs, message):
    workflow = sampling(small_flux.checkpoint, small_flux.flux, quantized=formats[0])
    workflow["quantize"]["inputs"].update(inputs)
    with pytest.raises(PromptFailed) as failed:
        small_flux.server.run(workflow)
    assert message in str(failed.value)


def test_saved_and_loaded_again_by_the_host_alone(small_flux, formats):
    format = next(format for format in formats[1:] if format != "fp8_e4m3_rowwise")
    workflow = sampling(small_flux.checkpoint, small_flux.flux, quantized=format, loras=LORA)
    workflow["keep"] = {
        "class_type": "ModelSave",
        "inputs": {"model": ["quantize", 0], "filename_prefix": "kept"},
    }
    server = small_flux.server
    eager = server.latent(server.run(workflow))
    (kept,) = (server.base / "output").glob("kept*.safetensors")
    kept.rename(server.diffusion_models / "kept.safetensors")
    again = server.latent(server.run(sampling("kept.safetensors", small_flux.flux)))
    full = small_flux.latent(loras=LORA)
    assert snr(full, again) > snr(full, eager) - 6 > 15
    with pytest.raises(PromptFailed, match="quantized already"):
        server.run(sampling("kept.safetensors", small_flux.flux, quantized=format))


def test_unloading_leaves_nothing(small_flux, formats):
    small_flux.sample(quantized=formats[0], compiled={"backend": "eager"}, seed=5)
    assert small_flux.server.models_left() > 0
    small_flux.server.free()
    assert small_flux.server.models_left() == 0
