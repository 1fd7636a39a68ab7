"""Offload Repeated Blocks over the host's API."""

import pytest
import requests
import torch
from hotpath_pack.devtools.server import PromptFailed
from live import TOLERANCE

NODE = "HotPathOffloadRepeatedBlocks"
LORA = [("style.safetensors", 0.7)]


def test_the_node_is_described(small_flux):
    schema = small_flux.server.get(f"/object_info/{NODE}")[NODE]
    assert (schema["display_name"], schema["output"]) == ("Offload Repeated Blocks", ["MODEL"])
    inputs = schema["input"]["required"]
    assert list(inputs) == ["model", "budget", "prefetch_blocks", "pin_memory", "modulation", "resident"]
    assert all(options["tooltip"] for _, options in inputs.values())
    page = requests.get(f"{small_flux.server.url}/extensions/HotPath/docs/{NODE}.md", timeout=10)
    assert page.text.startswith("# Offload Repeated Blocks")


@pytest.mark.parametrize("quantized", [None, "int8_dynamic"])
def test_the_same_bits_and_compiled_the_same_image(small_flux, quantized):
    quantize = small_flux.server.get("/object_info/HotPathQuantizeRepeatedBlocks")["HotPathQuantizeRepeatedBlocks"]
    if quantized and quantized not in quantize["input"]["required"]["format"][1]["options"]:
        pytest.skip(f"this ComfyUI has no {quantized}")
    run = dict(loras=LORA, quantized=quantized, steps=3)
    eager = small_flux.latent(**run)
    result = small_flux.sample(**run, offload={}, report=True)
    assert torch.equal(small_flux.server.latent(result), eager)
    texts = [text for node, text in result.texts if node == "offload"]
    assert texts[0] == "making modulation for 4 vectors ahead ..."
    assert texts[1].startswith("modulation made ahead for 4 vectors (")
    assert texts[-1] == f"{texts[1]}; all 5 blocks resident"
    described = result.history["outputs"]["report"]["text"][0]
    assert all(part in described for part in texts[-1].split("; "))
    (made,) = (entry for entry in small_flux.server.report()["modulation"] if entry["vectors"])
    assert made["node_id"] == "offload" and made["vectors"] == 4 and made["table_bytes"] > 0
    fast = small_flux.latent(**run, offload={}, compiled={"backend": "eager"})
    assert (fast - eager).abs().max() <= TOLERANCE


@pytest.mark.parametrize("budget", ["0 %", "0.01 GiB", "60 %"])
@pytest.mark.sweep(keep=["0.01 GiB"])
def test_streamed_blocks_give_the_same_bits_and_compiled_the_same_image(small_flux, budget):
    run = dict(steps=2)
    eager = small_flux.latent(**run)
    result = small_flux.sample(**run, offload={"budget": budget})
    assert torch.equal(small_flux.server.latent(result), eager)
    text = [text for node, text in result.texts if node == "offload"][-1]
    (entry,) = (entry for entry in small_flux.server.report()["streamed"] if entry["node_id"] == "offload")
    assert f"{entry['streamed_blocks']} streamed" in text and entry["bytes_copied"] > 0
    fast = small_flux.latent(**run, offload={"budget": budget}, compiled={"backend": "eager"})
    assert (fast - eager).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "odd, message",
    [
        ({"modulation": "never"}, "'never' not in \\['ahead', 'in place'\\]"),
        ({"budget": "half"}, "budget: 'half' is no budget. Write 'auto', a number of GiB"),
        ({"prefetch_blocks": 9}, "prefetch_blocks"),
    ],
)
def test_an_odd_input_is_named_and_the_next_prompt_runs(small_flux, odd, message):
    with pytest.raises(PromptFailed, match=message):
        small_flux.sample(offload=odd)
    assert torch.equal(small_flux.latent(offload={"modulation": "in place"}), small_flux.latent())
