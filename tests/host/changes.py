"""What users, the host and its later versions do to a MODEL."""

from comfy.sd import load_lora_for_models
from hotpath_pack.devtools.host_nodes import low_vram


def with_lora(model, weights, strength):
    patched, _ = load_lora_for_models(model, None, weights, strength, 0)
    assert patched.patches
    return patched


def in_low_vram(model):
    clone = model.clone()
    low_vram(clone, 1.0)
    return clone


def with_activation(model, kind):
    """Puts a module of ``kind`` into the MLP of each double block."""
    for block in model.model.diffusion_model.double_blocks:
        block.img_mlp[1] = kind()
    return model
