"""Load and Save as Diffusers Flux over the host's API."""

import json

import pytest
import requests
from hotpath_pack.devtools.server import PromptFailed
from hotpath_pack.devtools.workflows import sampling
from live import TOLERANCE, serve

LORA = [("style.safetensors", 0.7)]


def loading(live, folder, **options):
    workflow = sampling(live.checkpoint, live.flux, **options)
    workflow["model"] = {"class_type": "HotPathLoadDiffusersFlux", "inputs": {"folder": folder}}
    return workflow


def saving(live, prefix="diffusers/styled", **options):
    workflow = sampling(live.checkpoint, live.flux, loras=LORA, **options)
    workflow["keep"] = {
        "class_type": "HotPathSaveAsDiffusersFlux",
        "inputs": {"model": workflow["sampler"]["inputs"]["model"], "filename_prefix": prefix},
    }
    return workflow


@pytest.fixture(scope="module")
def saved(small_flux):
    """The name of a folder with a LoRA baked in, what the nodes showed, and the latent of the MODEL."""
    server = small_flux.server
    result = server.run(saving(small_flux))
    assert [path.name for path in (server.base / "output" / "diffusers").iterdir()] == ["styled_00001_"]
    return "styled_00001_", result, server.latent(result)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("HotPathLoadDiffusersFlux", ["folder"]),
        ("HotPathSaveAsDiffusersFlux", ["model", "filename_prefix"]),
    ],
)
def test_the_nodes_are_described(small_flux, node, inputs):
    schema = small_flux.server.get(f"/object_info/{node}")[node]
    assert list(schema["input"]["required"]) == inputs
    assert all(options["tooltip"] for _, options in schema["input"]["required"].values())
    page = requests.get(f"{small_flux.server.url}/extensions/HotPath/docs/{node}.md", timeout=10)
    assert page.text.startswith(f"# {schema['display_name']}\n")


def test_saved_with_a_lora_and_loaded_again(small_flux, saved):
    name, result, want = saved
    server = small_flux.server
    shown = [text for node, text in result.texts if node == "keep"]
    assert shown[0] == "applying patches ..." and shown[-1] == f"saved as diffusers/{name}"
    assert any(event.type == "progress" and event.data.get("node") == "keep" for event in result.events)
    (options,) = server.get("/object_info/HotPathLoadDiffusersFlux")["HotPathLoadDiffusersFlux"]["input"]["required"][
        "folder"
    ][1:]
    assert options["options"] == [name]
    result = server.run(loading(small_flux, name))
    assert (server.latent(result) - want).abs().max() <= TOLERANCE
    assert (small_flux.latent() - want).abs().max() > 0.01, "the LoRA changes the image"
    shown = [text for node, text in result.texts if node == "model"]
    assert shown[-1].startswith("FluxTransformer2DModel: ")
    assert any(event.type == "progress" and event.data.get("node") == "model" for event in result.events)


def test_compiled_and_with_another_lora_it_is_as_eager(small_flux, saved):
    name, *_ = saved
    server = small_flux.server
    for options in ({}, {"loras": LORA, "width": 128}):
        eager = server.latent(server.run(loading(small_flux, name, **options)))
        fast = server.latent(server.run(loading(small_flux, name, compiled={"backend": "eager"}, **options)))
        assert (fast - eager).abs().max() <= TOLERANCE
    assert small_flux.counts()["graphs"] == 2


@pytest.mark.parametrize("name", ["../../secret", "/etc", "styled_00001_/..", "", 7, ["model", 0]])
def test_a_folder_that_is_not_listed_is_refused(small_flux, saved, name):
    with pytest.raises(PromptFailed):
        small_flux.server.run(loading(small_flux, name))


@pytest.mark.parametrize("prefix", ["../../elsewhere", "/tmp/elsewhere"])
def test_nothing_is_written_outside_the_output_folder(small_flux, prefix):
    with pytest.raises(PromptFailed, match="outside the output folder is not allowed"):
        small_flux.server.run(saving(small_flux, prefix))


def test_a_damaged_folder_is_named(small_flux, saved):
    folder = small_flux.server.base / "models" / "diffusers" / "damaged" / "transformer"
    folder.mkdir(parents=True)
    source = small_flux.server.base / "output" / "diffusers" / saved[0]
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = "diffusion_pytorch_model.safetensors"
    (folder / weights).write_bytes((source / weights).read_bytes()[:-1000])
    with pytest.raises(PromptFailed) as failed:
        small_flux.server.run(loading(small_flux, "damaged"))
    assert f"{folder / weights} is damaged or only in part downloaded" in str(failed.value)


def test_without_diffusers_the_rest_of_the_pack_works(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "diffusers.py").write_text("raise ImportError('No module named diffusers')\n")
    folder = tmp_path / "host" / "models" / "diffusers" / "some"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with serve(tmp_path / "host", 1, 1, PYTHONPATH=str(hidden)) as live:
        assert live.difference(compiled={"backend": "eager"}) <= TOLERANCE
        for workflow in (loading(live, "some"), saving(live)):
            with pytest.raises(PromptFailed, match="needs the package diffusers .*pip install 'diffusers>="):
                live.server.run(workflow)
