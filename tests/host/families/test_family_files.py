"""Other families as users have them: files that the host's loader reads, and the ControlNets that it has for them."""

import json

import comfy.controlnet
import comfy.ldm.lumina.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy_extras.nodes_model_patch as model_patches
import pytest
import torch
from hotpath_pack.devtools import checkpoints, family_models
from safetensors.torch import save_file
from sampling import Counting, assert_parity, compiled, compiled_blocks, offloaded, quantized, sample
from test_families import GRAPHS, tiny

CPU = torch.device("cpu")
# Heads, blocks and width of the text. Of Qwen-Image's and Z-Image's width the host's loader knows one alone.
FILES = {
    "wan_t2v": (2, 2, 4096),
    "wan_i2v": (2, 1, 4096),
    "krea2": (4, 2, 2560),
    "ltx2": (2, 2, 64),
    "qwen_image": (24, 1, 3584),
    "z_image": (30, 1, 2560),
}
# Of gigabytes, so that what the others show of quantizing is not shown again.
WIDE = ("krea2", "qwen_image", "z_image")
SMALL = dict(width=64, height=64, tokens=6, steps=1)


def loaded(name, folder):
    """A MODEL of a file with random weights, and of which class the host took it for."""
    made = family_models.build(name, *FILES[name], dtype=torch.bfloat16).model
    weights = {key: value.to(torch.bfloat16).contiguous() for key, value in made.diffusion_model.state_dict().items()}
    # What the files of LTX-Video say of themselves.
    real = family_models.MODELS[name]
    config = {key: value for key, value in {**real.fixed, **real.sized(*FILES[name])}.items() if key != "image_model"}
    metadata = {"config": json.dumps({"transformer": config})} if name.startswith("ltx") else None
    save_file(weights, folder / f"{name}.safetensors", metadata)
    del weights
    path = str(folder / f"{name}.safetensors")
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32}), type(made)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.sweep(keep=["wan_t2v"])
def test_a_file_compiles_is_quantized_and_offloaded(name, tmp_path):
    model, kind = loaded(name, tmp_path)
    assert type(model.model) is kind
    want = sample(model, **SMALL)
    fast = compiled(model, backend="eager")
    with Counting() as counting:
        assert_parity(model, fast, **SMALL)
    assert (counting.graphs, counting.breaks, compiled_blocks(fast).eager) == (GRAPHS.get(name, 1), 0, {})
    lean = offloaded(model, budget="0 %")
    assert sample(lean, **SMALL).equal(want)
    if name in WIDE:
        return
    assert_parity(lean, compiled(lean, backend="eager"), **SMALL)
    small = quantized(model, "int8_weight_only")
    assert 0 < (sample(small, **SMALL) - want).norm() < 0.1 * want.norm()
    fast = compiled(small, backend="eager")
    assert_parity(small, fast, **SMALL)
    assert compiled_blocks(fast).eager == {}


def test_a_controlnet_of_qwen_image():
    model = tiny("qwen_image")
    config = dict(num_attention_heads=1, num_layers=2, joint_attention_dim=64, in_channels=64)
    net = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(
        operations=comfy.ops.manual_cast, dtype=torch.float32, device=CPU, **config
    )
    family_models.fill(net)
    # Latents of a picture as they are, where a prompt has a picture and the model's autoencoder.
    control = comfy.controlnet.ControlNet(
        net.eval(), compression_ratio=1, load_device=CPU, preprocess_image=lambda hint: hint.unsqueeze(2)
    )

    def condition(positive):
        hint = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        control.set_cond_hint(hint, 0.8, (0.0, 1.0))
        return [[text, {**options, "control": control}] for text, options in positive]

    fast = compiled(model, backend="eager")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, fast)
        assert_parity(model, fast, condition=condition)
    assert (counting.graphs, counting.breaks, compiled_blocks(fast).eager) == (GRAPHS["qwen_image"], 0, {})
    assert (sample(model, condition=condition) - sample(model)).abs().max() > 1e-3


def autoencoder(frames):
    """A small one of the host. With ``frames`` latents have a dimension for them, as those of Qwen-Image's own have."""
    parts = zip(("encoder", "decoder"), checkpoints.autoencoder(), strict=True)
    weights = {f"taesd_{part}.{name}": tensor for part, held in parts for name, tensor in held.items()}
    vae = comfy.sd.VAE(sd={**weights, "vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)})
    if frames:
        encode = vae.encode
        vae.encode = lambda image: encode(image).unsqueeze(2)
    return vae


def model_patch(name):
    """What the host's loader makes of a file of a ControlNet that is a patch of the model."""
    made = dict(operations=comfy.ops.manual_cast, dtype=torch.float32, device=CPU)
    if name == "z_image":
        net = comfy.ldm.lumina.controlnet.ZImage_Control(dim=256, n_heads=2, n_kv_heads=2, n_control_layers=6, **made)
    else:
        net = model_patches.QwenImageBlockWiseControlNet(num_layers=2, dim=128, **made)
    family_models.fill(net)
    return comfy.model_patcher.ModelPatcher(net.eval(), CPU, CPU)


@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
@pytest.mark.sweep(keep=["z_image"])
def test_controlnets_that_patch_the_model(name):
    model = tiny(name)
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    apply = model_patches.QwenImageDiffsynthControlnet().diffsynth_controlnet
    with torch.inference_mode():
        (patched,) = apply(model, model_patch(name), autoencoder(frames=name == "qwen_image"), image, 0.8)
    fast = compiled(patched, backend="eager")
    with Counting() as counting:
        assert_parity(patched, fast)
        assert_parity(patched, fast, width=96, tokens=24)
    assert (counting.graphs, counting.breaks, compiled_blocks(fast).eager) == (GRAPHS[name], 0, {})
    assert (sample(patched) - sample(model)).abs().max() > 1e-3
