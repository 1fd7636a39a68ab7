"""The API-format twins of the example workflows, on a live server.

Each is posted as it is, but small: fewer pixels and steps, a backend that generates no code, tiny models under the real
names. The host's text encoders and autoencoders are of fixed sizes, gigabytes in all. In their place are a development
node, whose text is random numbers, and TAEF1 and TAEF2, which the host's own loader loads. FluxKontextImageScale makes
a megapixel of any picture; ImageScale is in its place.
"""

from copy import deepcopy

import pytest
import requests
from hotpath_pack.devtools.examples import BLUEPRINT, save_stand_ins, twins
from hotpath_pack.devtools.server import PromptFailed
from live import TOLERANCE

COMPILE = "HotPathCompileRepeatedBlocks"
COMPILED = "2 double and 3 single blocks run as 2 regions"
SMALL = {"width": 128, "height": 128, "steps": 2, "rounds": 1, "text_tokens": 16, "backend": "eager"}
TINY = {"ae.safetensors": "taef1", "flux2-vae.safetensors": "taef2"}
TEXT = {"class_type": "HotPathDevTextEncoder", "inputs": {"tokens": 16, "text_width": 64, "pooled_width": 32}}
SAMPLED = [name for name in twins() if name.startswith("Flux") and name != "Flux benchmark"]


@pytest.fixture(scope="module")
def server(small_flux):
    save_stand_ins(small_flux.server)
    return small_flux.server


def small(workflow):
    workflow = deepcopy(workflow)
    for node in workflow.values():
        inputs = node["inputs"]
        inputs.update({name: value for name, value in SMALL.items() if name in inputs})
        if node["class_type"] in ("DualCLIPLoader", "CLIPLoader"):
            node.update(deepcopy(TEXT))
        elif node["class_type"] == "VAELoader":
            inputs["vae_name"] = TINY[inputs["vae_name"]]
        elif node["class_type"] == "FluxKontextImageScale":
            node["class_type"] = "ImageScale"
            inputs.update(upscale_method="area", width=128, height=128, crop="center")
    return workflow


def find(workflow, kind):
    (found,) = (name for name, node in workflow.items() if kind in node["class_type"])
    return found


def without(workflow, name):
    """A workflow whose node ``name`` is bypassed: what took its output takes what it took."""
    left = {other: deepcopy(node) for other, node in workflow.items() if other != name}
    for node in left.values():
        links = {key: workflow[name]["inputs"]["model"] for key, link in node["inputs"].items() if link == [name, 0]}
        node["inputs"].update(links)
    return left


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.sweep(keep=["Flux on 12 GB", "Flux with LoRA"])
def test_a_twin_samples_compiled_what_it_does_eager(server, name):
    workflow = small(twins()[name])
    formats = server.get("/object_info/HotPathQuantizeRepeatedBlocks")["HotPathQuantizeRepeatedBlocks"]
    wanted = {node["inputs"].get("format") for node in workflow.values()} - {None}
    if not wanted <= set(formats["input"]["required"]["format"][1]["options"]):
        pytest.skip(f"this ComfyUI has no {wanted}")
    sampler = find(workflow, "Sampler") if "KSamplerSelect" not in str(workflow) else find(workflow, "SamplerCustom")
    workflow["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "latent"}}
    compiled = server.run(workflow)
    assert (find(workflow, COMPILE), COMPILED) in {(node, text.split(",")[0]) for node, text in compiled.texts}
    assert len(compiled.history["outputs"][find(workflow, "SaveImage")]["images"]) == 1
    eager = server.latent(server.run(without(workflow, find(workflow, COMPILE))), "latent")
    assert eager.isfinite().all() and eager.std() > 0.1
    assert (server.latent(compiled, "latent") - eager).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in twins() if not name.startswith("Flux")])
def test_a_twin_of_another_family_is_what_the_hosts_nodes_take(server, name):
    """Their models come in one size, gigabytes: the prompt is taken, and ends where it loads a name alone."""
    workflow, nodes = twins()[name], server.get("/object_info")
    for node in workflow.values():
        required = nodes[node["class_type"]]["input"]["required"]
        assert set(required) <= set(node["inputs"])
        if node["class_type"] == "CLIPLoader" and node["inputs"]["type"] not in required["type"][0]:
            pytest.skip(f"this ComfyUI has no text encoder of {node['inputs']['type']}")
    with pytest.raises(PromptFailed) as failed:
        server.run(workflow)
    assert "Loader" in workflow[failed.value.node_id]["class_type"] and failed.value.type.endswith("Error")


def test_the_benchmark_twin_measures_both_sides(server):
    workflow = small(twins()["Flux benchmark"])
    result = server.run(workflow)
    assert (find(workflow, COMPILE), COMPILED) in {(node, text.split(",")[0]) for node, text in result.texts}
    shown = result.history["outputs"]
    text = shown[find(workflow, "Benchmark")]["text"][0]
    assert text.startswith("Flux, 128x128, batch 1, 16 text tokens, 2 steps")
    assert "\ncompiled: " in text and "\neager: " in text
    assert len(shown[find(workflow, "SaveImage")]["images"]) == 1


def test_what_is_served_is_each_twin_with_a_thumbnail_and_nothing_else(server):
    assert sorted(server.get("/workflow_templates")["HotPath"]) == sorted(twins())
    assert len(twins()) == 12
    for name in twins():
        assert server.get(f"/api/workflow_templates/HotPath/{name}.json")["version"] == 0.4
        thumbnail = requests.get(f"{server.url}/api/workflow_templates/HotPath/{name}.jpg", timeout=10)
        assert thumbnail.headers["Content-Type"] == "image/jpeg" and thumbnail.content[:2] == b"\xff\xd8"


def test_the_blueprint_is_served(server):
    entries = server.get("/global_subgraphs").items()
    ((key, entry),) = ((key, entry) for key, entry in entries if entry["source"] == "custom_node")
    assert (entry["name"], entry["info"]["node_pack"]) == ("Fast Flux", "custom_nodes.HotPath")
    assert server.get(f"/global_subgraphs/{key}")["data"] == BLUEPRINT.read_text(encoding="utf-8")
