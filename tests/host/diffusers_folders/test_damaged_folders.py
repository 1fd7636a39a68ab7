"""What is wrong with a folder of diffusers is named with its file."""

import json

import pytest
from diffusers import AutoencoderKL
from folders import change_config
from hotpath_pack.host.diffusers_folders.load import load_diffusers_flux
from sampling import Texts


def change_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def second(folder):
    return folder / "diffusion_pytorch_model-00002-of-00003.safetensors"


def without_first_line(path):
    path.write_bytes(path.read_bytes()[:-100])


def in_another_place(weights):
    weights["proj_out.bias"] = "../../secret.safetensors"


DAMAGE = {
    "a missing shard": (lambda folder: second(folder).unlink(), "00002-of-00003.safetensors is missing; .* lists it"),
    "half downloaded": (
        lambda folder: without_first_line(second(folder)),
        "00002-of-00003.safetensors is damaged or only in part downloaded: .*Download it again",
    ),
    "a pointer of Git LFS": (
        lambda folder: second(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "00002-of-00003.safetensors is damaged",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("diffusion*")],
        "transformer holds no .safetensors file",
    ),
    "another model": (
        lambda folder: change_config(folder, _class_name=AutoencoderKL.__name__),
        "config.json: this is AutoencoderKL, and not FluxTransformer2DModel or Flux2Transformer2DModel",
    ),
    "no class": (lambda folder: change_config(folder, _class_name=None), "config.json: this is no model of diffusers"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json can't be read as a config"),
    "no mapping": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "text for a number": (
        lambda folder: change_config(folder, num_layers="two"),
        "config.json: diffusers can't make a FluxTransformer2DModel of it",
    ),
    "more blocks in the config": (
        lambda folder: change_config(folder, num_layers=3),
        r"lack transformer_blocks.2.norm1.linear.weight, .* and .* more weights of the FluxTransformer2DModel",
    ),
    "fewer blocks in the config": (
        lambda folder: change_config(folder, num_single_layers=1),
        r"00003.safetensors: single_transformer_blocks.1.\S+, .* belong to no FluxTransformer2DModel of config.json",
    ),
    "another width in the config": (
        lambda folder: change_config(folder, joint_attention_dim=96),
        r"00003.safetensors: context_embedder.weight is \[256, 64\], and by config.json \[256, 96\]",
    ),
    "another rotary embedding": (
        lambda folder: change_config(folder, axes_dims_rope=[32, 48, 48]),
        r"config.json: ComfyUI's Flux computes otherwise: axes_dims_rope is \[32, 48, 48\] and ComfyUI has \(16",
    ),
    "quantized": (
        lambda folder: change_config(
            folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "config.json: the weights are quantized by bitsandbytes .* in a layout that ComfyUI has no layers for",
    ),
    "an index that leads elsewhere": (
        lambda folder: change_index(folder, in_another_place),
        r"index.json names '../../secret.safetensors', which is not a file of this folder",
    ),
    "an index of nothing": (
        lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[1]"),
        "index.json is no index of safetensors files",
    ),
    "two sets": (
        lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}"),
        "holds more than one set of weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_with_a_folder_is_named_with_its_file(dev, damage):
    make, message = DAMAGE[damage]
    make(dev)
    with pytest.raises(ValueError, match=message) as failed:
        load_diffusers_flux("dev", Texts())
    assert str(dev) in str(failed.value)


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            r"bitsandbytes \(bnb_4b.*nf4\)",
        ),
        ({"quant_method": "torchao", "quant_type": "int4wo"}, r"torchao \(quant_type int4wo\)"),
        ({"quant_method": "quanto", "weights_dtype": "float8"}, r"quanto \(weights_dtype float8\)"),
        ({"quant_method": "gguf"}, "gguf"),
        ({"bits": 3}, "an unknown method"),
    ],
)
def test_other_quantization_is_refused_with_the_reason(dev, quantization, told):
    change_config(dev, quantization_config=quantization)
    with pytest.raises(
        ValueError, match=f"config.json: the weights are quantized by {told}.* ComfyUI has no layers for"
    ):
        load_diffusers_flux("dev", Texts())
