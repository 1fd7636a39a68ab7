"""Models of each family with random weights, of the host's own classes: tiny for tests, as wide as the real ones for
benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "axes_dim": [16, 56, 56],
    "vec_in_dim": 768,
    "mlp_ratio": 4.0,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "vec_in_dim": None,
    "guidance_embed": False,
    "txt_ids_dims": [1, 2],
}
_WAN = {
    "image_model": "wan2.1",
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "out_dim": 16,
    "model_type": "t2v",
}


def _flux(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {
        "hidden_size": 128 * heads,
        "num_heads": heads,
        "context_in_dim": text,
        "depth": blocks,
        "depth_single_blocks": blocks,
    }


def _radiance(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {**_flux(heads, blocks, text), "in_dim": 64, "out_dim": 128 * heads, "hidden_dim": 64, "n_layers": 1}


def _shapes(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {
        "hidden_size": 64 * heads,
        "num_heads": heads,
        "context_in_dim": text,
        "depth": blocks,
        "depth_single_blocks": blocks,
    }


def _qwen(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_layers": blocks, "joint_attention_dim": text}


def _z_image(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {"dim": 128 * heads, "n_heads": heads, "n_kv_heads": heads, "n_layers": blocks, "cap_feat_dim": text}


def _lumina2(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {"dim": 96 * heads, "n_heads": heads, "n_kv_heads": heads // 3, "n_layers": blocks, "cap_feat_dim": text}


def _krea2(heads: int, blocks: int, text: int) -> dict[str, Any]:
    groups = max(heads // 4, 1)
    fusion = {"txtdim": text, "txtheads": max(text // 128, 1), "txtkvheads": max(text // 128, 1)}
    return {"features": 128 * heads, "heads": heads, "kvheads": groups, "layers": blocks, "txtlayers": 12, **fusion}


def _wan(heads: int, blocks: int, text: int) -> dict[str, Any]:
    return {"dim": 128 * heads, "ffn_dim": 384 * heads, "num_heads": heads, "num_layers": blocks, "text_dim": text}


def _ltx2(heads: int, blocks: int, text: int) -> dict[str, Any]:
    sound = {"audio_num_attention_heads": heads, "audio_cross_attention_dim": 64 * heads}
    connector = {"connector_attention_head_dim": 32, "connector_num_attention_heads": text // 32}
    return {
        "num_attention_heads": heads,
        "cross_attention_dim": 128 * heads,
        "caption_channels": text,
        "num_layers": blocks,
        **sound,
        **connector,
    }


def _ltx23(heads: int, blocks: int, text: int) -> dict[str, Any]:
    sound = {"audio_connector_attention_head_dim": 64, "audio_connector_num_attention_heads": heads}
    connector = {"connector_attention_head_dim": 128, "connector_num_attention_heads": heads}
    return {**_ltx2(heads, blocks, text), **connector, **sound}


@dataclass(frozen=True)
class Real:
    """A model of a family: the host's configuration of it, what of it depends on width and depth, and both as released
    (heads, blocks of each list, width of its text)."""

    config: str
    fixed: dict[str, Any]
    sized: Callable[[int, int, int], dict[str, Any]]
    heads: int
    blocks: int
    text: int


_NERF = {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 1,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "linear",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
_CHROMA = {key: value for key, value in _FLUX.items() if key != "guidance_embed"}
_Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "qk_norm": True,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_LTX = {
    "image_model": "ltxav",
    "attention_head_dim": 128,
    "audio_attention_head_dim": 64,
    "rope_type": "split",
    "use_middle_indices_grid": True,
    "causal_temporal_positioning": True,
    "connector_num_layers": 1,
}
_LTX_23 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
}
MODELS = {
    "hunyuan_video": Real("HunyuanVideo", {**_HUNYUAN, "guidance_embed": True}, _flux, 24, 20, 4096),
    "hunyuan_video_15": Real(
        "HunyuanVideo15",
        {
            **_HUNYUAN,
            "in_channels": 65,
            "out_channels": 32,
            "patch_size": [1, 1, 1],
            "vec_in_dim": None,
            "byt5": True,
            "use_cond_type_embedding": True,
            "vision_in_dim": 1152,
            "meanflow_sum": True,
        },
        _flux,
        16,
        54,
        3584,
    ),
    "hunyuan_image_21": Real(
        "HunyuanImage21",
        {
            **_HUNYUAN,
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "axes_dim": [64, 64],
            "vec_in_dim": None,
            "byt5": True,
        },
        _flux,
        28,
        20,
        3584,
    ),
    "hunyuan_3d": Real(
        "Hunyuan3Dv2",
        {"image_model": "hunyuan3d2", "in_channels": 64, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": False},
        _shapes,
        16,
        16,
        1536,
    ),
    "longcat": Real("LongCatImage", _FLUX, _flux, 24, 19, 3584),
    "ovis": Real("Flux", {**_FLUX, "yak_mlp": True, "txt_norm": True}, _flux, 24, 6, 2048),
    "chroma_radiance": Real(
        "ChromaRadiance", {**_CHROMA, "image_model": "chroma_radiance", **_NERF}, _radiance, 24, 19, 4096
    ),
    "qwen_image": Real("QwenImage", {"image_model": "qwen_image", "in_channels": 64}, _qwen, 24, 60, 3584),
    "z_image": Real("ZImage", _Z_IMAGE, _z_image, 30, 30, 2560),
    "lumina2": Real(
        "Lumina2",
        {
            **_Z_IMAGE,
            "axes_dims": [32, 32, 32],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
            "z_image_modulation": False,
            "time_scale": 1.0,
            "pad_tokens_multiple": None,
        },
        _lumina2,
        24,
        26,
        2304,
    ),
    "krea2": Real("Krea2", {"image_model": "krea2", "channels": 16, "patch": 2}, _krea2, 48, 28, 2560),
    "ltx2": Real("LTXAV", _LTX, _ltx2, 32, 48, 3840),
    "ltx23": Real("LTXAV", {**_LTX, **_LTX_23}, _ltx23, 32, 48, 3840),
    "wan_t2v": Real("WAN21_T2V", _WAN, _wan, 40, 40, 4096),
    "wan_i2v": Real("WAN21_I2V", {**_WAN, "in_dim": 36, "model_type": "i2v"}, _wan, 40, 40, 4096),
    "wan_ti2v_5b": Real("WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}, _wan, 24, 30, 4096),
}


def build(
    name: str,
    heads: int | None = None,
    blocks: int | None = None,
    text: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ModelPatcher:
    """The model of ``MODELS`` called ``name`` with random weights made on ``device``, whole or with so many ``blocks``
    in each list, attention ``heads`` and so wide a ``text``."""
    real = MODELS[name]
    sized = real.sized(heads or real.heads, blocks or real.blocks, text or real.text)
    kind: Any = getattr(comfy.supported_models, real.config)
    config = kind({**real.fixed, **sized})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=torch.device(device))
    model.diffusion_model.requires_grad_(False).eval()
    fill(model.diffusion_model, seed)
    device = torch.device(device)
    return ModelPatcher(model, device, torch.device("cpu") if device.type == "cpu" else device)


def tiny(name: str, blocks: int = 2, **options: Any) -> ModelPatcher:
    """``build`` with as few heads, and as narrow a text, as the host has the model work with."""
    heads = {"hunyuan_3d": 2, "z_image": 2, "lumina2": 3, "krea2": 2}.get(name, 1)
    return build(name, heads, blocks, 3584 if name == "longcat" else 64, **options)


def fill(diffusion_model: Any, seed: int = 0) -> None:
    """Weights of which each changes the result, and with which activations stay finite."""
    generators: dict[torch.device, torch.Generator] = {}

    def uniform(parameter: Tensor) -> Tensor:
        generator = generators.setdefault(parameter.device, torch.Generator(parameter.device).manual_seed(seed))
        return torch.empty_like(parameter).uniform_(-(3**0.5), 3**0.5, generator=generator)

    for name, parameter in diffusion_model.named_parameters():
        layer = name.rpartition(".")[2]
        norm = parameter.ndim == 1 and layer in ("weight", "scale")
        gain = 0.02 if layer == "bias" else (0.3 if "mod" in name.lower() else 1.0) / parameter[0].numel() ** 0.5
        if parameter.ndim > 1 and layer not in ("weight", "bias"):
            gain = 0.3
        value = uniform(parameter)
        parameter.data.copy_(1 + 0.1 * value if norm else value * gain)
