"""What other packs put on a MODEL, one of each kind. Each has an effect that grows with its strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_NORMS = ("img_norm1", "img_attn.norm.query_norm", "txt_norm2")


def attn1_patch(model: Any, strength: float) -> None:
    """Change queries and keys by block and step, and text keys by their own."""

    def patch(q: Tensor, k: Tensor, v: Tensor, pe: Any = None, attn_mask: Any = None, extra_options: Any = None) -> Any:
        gain = 1 + strength * extra_options["block_index"] + float(extra_options["sigmas"][0])
        offset = extra_options["img_slice"][0]
        k = torch.cat((k[:, :, :offset] * gain, k[:, :, offset:]), 2)
        return {"q": q * gain, "k": k, "v": v}

    model.set_model_attn1_patch(patch)


def attn1_patch_that_adds_tokens(model: Any, strength: float) -> None:
    """As image prompt adapters do: more keys and values than queries, hence its own rotary embedding and mask."""

    def patch(q: Tensor, k: Tensor, v: Tensor, pe: Any = None, attn_mask: Any = None, extra_options: Any = None) -> Any:
        from comfy.ldm.flux.math import apply_rope

        q, k = apply_rope(q, k, pe)
        extra = torch.full_like(k[:, :, :3], strength)
        return {"q": q, "k": torch.cat((k, extra), 2), "v": torch.cat((v, extra), 2), "pe": None}

    model.set_model_attn1_patch(patch)


def attn1_output_patch(model: Any, strength: float) -> None:
    """Scale what attention gives image tokens, by the kind of block."""

    def patch(attn: Tensor, extra_options: Any) -> Tensor:
        scale = strength * (2 if extra_options["block_type"] == "single" else 1)
        out = attn.clone()
        out[:, extra_options["img_slice"][0] :] *= 1 + scale
        return out

    model.set_model_attn1_output_patch(patch)


def attention_override(model: Any, strength: float) -> None:
    """Replace the attention function."""

    def override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return func(q * (1 + strength), k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


def patches_replace(model: Any, strength: float) -> None:
    """Change what double block 1 gives and single block 2 takes."""

    def double(args: Any, extra: Any) -> Any:
        out = extra["original_block"](args)
        return {"img": out["img"] * (1 + strength), "txt": out["txt"]}

    def single(args: Any, extra: Any) -> Any:
        return {"img": extra["original_block"]({**args, "img": args["img"] * (1 - strength)})["img"]}

    model.set_model_patch_replace(double, "dit", "double_block", 1)
    model.set_model_patch_replace(single, "dit", "single_block", 2)


def noise(*shape: int) -> Tensor:
    """A constant would be lost in the next layer norm."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def patches_replace_that_skips(model: Any, strength: float) -> None:
    """Take the place of single block 1."""

    def skip(args: Any, extra: Any) -> Any:
        return {"img": args["img"] + strength * noise(*args["img"].shape)}

    model.set_model_patch_replace(skip, "dit", "single_block", 1)


def controlnet_residuals(model: Any, strength: float) -> None:
    """Add to the first double block and the second single block."""

    def wrapper(apply_model: Any, args: Any) -> Any:
        diffusion = model.model.diffusion_model

        def residual(value: float) -> Tensor:
            x = args["input"]
            tokens = math.prod(math.ceil(side / diffusion.patch_size) for side in x.shape[2:])
            return value * noise(x.shape[0], tokens, diffusion.hidden_size)

        control = {"input": [residual(strength), None], "output": [None, residual(-strength)]}
        return apply_model(args["input"], args["timestep"], **{**args["c"], "control": control})

    model.set_model_unet_function_wrapper(wrapper)


def number_in_place(model: Any, strength: float) -> None:
    """Change what norms of the second double block add, once the first one runs, and back after the step."""
    norms = [module for name, module in model.model.diffusion_model.double_blocks[1].named_modules() if name in _NORMS]
    before = [norm.eps for norm in norms]

    def first(args: Any, extra: Any) -> Any:
        for norm in norms:
            norm.eps = strength
        return extra["original_block"](args)

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return executor(*args, **kwargs)
        finally:
            for norm, eps in zip(norms, before, strict=True):
                norm.eps = eps

    model.add_wrapper_with_key("diffusion_model", "number_in_place", wrapper)
    model.set_model_patch_replace(first, "dit", "double_block", 0)


def rope_options(model: Any, strength: float) -> None:
    """Move and stretch positions."""
    model.set_model_rope_options(scale_x=1 + strength, shift_x=0, scale_y=1, shift_y=strength, scale_t=1, shift_t=0)


PATCHES: Mapping[str, Callable[[Any, float], None]] = {
    patch.__name__: patch
    for patch in (
        attn1_patch,
        attn1_patch_that_adds_tokens,
        attn1_output_patch,
        attention_override,
        patches_replace,
        patches_replace_that_skips,
        controlnet_residuals,
        number_in_place,
        rope_options,
    )
}
