"""The example workflows and the blueprint of the pack, and tiny stand-ins for the files that they load."""

from __future__ import annotations

import json
import shutil

import torch

from . import checkpoints
from .server import ROOT, HostServer
from .workflows import Workflow

EXAMPLES = ROOT / "example_workflows"
BLUEPRINT = ROOT / "subgraphs" / "Fast Flux.json"
SITE = "https://huggingface.co/"
_QWEN = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
_Z_IMAGE = "Comfy-Org/z_image_turbo/resolve/main/split_files"
_WAN = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
_KREA_2 = "Comfy-Org/Krea-2/resolve/main"
# File -> the host's folder for it, and where to get it.
MODELS = {
    "flux1-dev.safetensors": ("diffusion_models", "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    "flux1-dev-kontext_fp8_scaled.safetensors": (
        "diffusion_models",
        "Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
        "flux1-dev-kontext_fp8_scaled.safetensors",
    ),
    "flux2_dev_fp8mixed.safetensors": (
        "diffusion_models",
        "Comfy-Org/flux2-dev/resolve/main/split_files/diffusion_models/flux2_dev_fp8mixed.safetensors",
    ),
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": (
        "loras",
        "ByteDance/Hyper-SD/resolve/main/Hyper-FLUX.1-dev-8steps-lora.safetensors",
    ),
    "clip_l.safetensors": ("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"),
    "t5xxl_fp16.safetensors": (
        "text_encoders",
        "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    ),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": (
        "text_encoders",
        "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    "mistral_3_small_flux2_fp8.safetensors": (
        "text_encoders",
        "Comfy-Org/flux2-dev/resolve/main/split_files/text_encoders/mistral_3_small_flux2_fp8.safetensors",
    ),
    "ae.safetensors": ("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"),
    "qwen_image_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        f"{_QWEN}/diffusion_models/qwen_image_fp8_e4m3fn.safetensors",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        f"{_QWEN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
    "qwen_image_vae.safetensors": ("vae", f"{_QWEN}/vae/qwen_image_vae.safetensors"),
    "z_image_turbo_bf16.safetensors": (
        "diffusion_models",
        f"{_Z_IMAGE}/diffusion_models/z_image_turbo_bf16.safetensors",
    ),
    "qwen_3_4b.safetensors": ("text_encoders", f"{_Z_IMAGE}/text_encoders/qwen_3_4b.safetensors"),
    "wan2.2_ti2v_5B_fp16.safetensors": (
        "diffusion_models",
        f"{_WAN}/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
    ),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        "text_encoders",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/"
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    "wan2.2_vae.safetensors": ("vae", f"{_WAN}/vae/wan2.2_vae.safetensors"),
    "krea2_turbo_fp8_scaled.safetensors": (
        "diffusion_models",
        f"{_KREA_2}/diffusion_models/krea2_turbo_fp8_scaled.safetensors",
    ),
    "qwen3vl_4b_fp8_scaled.safetensors": (
        "text_encoders",
        f"{_KREA_2}/text_encoders/qwen3vl_4b_fp8_scaled.safetensors",
    ),
    "ltx-2-19b-dev-fp8.safetensors": ("checkpoints", "Lightricks/LTX-2/resolve/main/ltx-2-19b-dev-fp8.safetensors"),
    "gemma_3_12B_it_fp4_mixed.safetensors": (
        "text_encoders",
        "Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors",
    ),
    "flux2-vae.safetensors": ("vae", "Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors"),
}


def twins() -> dict[str, Workflow]:
    """The example workflows in API format, by name."""
    files = sorted((EXAMPLES / "api").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def save_stand_ins(server: HostServer) -> None:
    """A file of each name that the examples load: tiny models and a LoRA, and for the rest a name alone."""
    models = server.base / "models"
    flux1 = checkpoints.flux1(2, 3)
    made = {
        "flux1-dev.safetensors": flux1,
        "flux1-dev-kontext_fp8_scaled.safetensors": checkpoints.quantized(flux1, "float8_e4m3fn"),
        "flux2_dev_fp8mixed.safetensors": checkpoints.quantized(checkpoints.flux2(2, 3), "float8_e4m3fn"),
        "Hyper-FLUX.1-dev-8steps-lora.safetensors": checkpoints.lora(flux1),
    }
    for name, (folder, _) in MODELS.items():
        checkpoints.save(models / folder / name, made.get(name, {"stand_in": torch.zeros(1)}))
    for name, flux2 in (("taef1", False), ("taef2", True)):
        for part, weights in zip(("encoder", "decoder"), checkpoints.autoencoder(flux2=flux2), strict=True):
            checkpoints.save(models / "vae_approx" / f"{name}_{part}.safetensors", weights)
    (server.base / "input").mkdir(exist_ok=True)
    shutil.copy2(server.comfyui / "input" / "example.png", server.base / "input")
