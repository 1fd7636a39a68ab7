"""Flux transformers in diffusers' format, to and from a MODEL: where each weight belongs and what the host can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.ldm.flux.model
import comfy.utils
import torch
from torch import Tensor

OLDEST_DIFFUSERS = "0.37.0"

# What the host's Flux code fixes, by diffusers' class; with another value the image would be wrong.
FIXED: Mapping[str, Mapping[str, Any]] = {
    "FluxTransformer2DModel": {
        "patch_size": 1,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "out_channels": 64,
    },
    "Flux2Transformer2DModel": {
        "patch_size": 1,
        "attention_head_dim": 128,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "mlp_ratio": 3.0,
        "eps": 1e-6,
        "timestep_guidance_channels": 256,
        "out_channels": 128,
    },
}

# What the host's own table, which it keeps for LoRAs, leaves out.
_FLUX2_PLACES = {
    **{
        f"{stream}.linear.weight": f"{stream}.lin.weight"
        for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    **{
        f"time_guidance_embed.{theirs}_embedder.linear_{number}.weight": f"{ours}_in.{layer}.weight"
        for theirs, ours in (("timestep", "time"), ("guidance", "guidance"))
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    },
}


@dataclass(frozen=True)
class Place:
    """Where the host keeps a weight of diffusers: ``rows`` (start, count) of ``name``, or all of it.

    ``convert`` makes one from the other, in either direction.
    """

    name: str
    rows: tuple[int, int] | None = None
    convert: Callable[[Tensor], Tensor] | None = None

    def within(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The part of the host's weight, as a view."""
        weight = weights[self.name]
        return weight if self.rows is None else weight.narrow(0, *self.rows)


def require_diffusers(node: str) -> Any:
    """The package, imported when a node needs it and not before.

    Raises:
        RuntimeError: it is not installed, or too old.
    """
    try:
        import diffusers
        from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{node} needs the package diffusers {OLDEST_DIFFUSERS} or newer ({error}). Install it in ComfyUI's Python "
            f"with: python -m pip install 'diffusers>={OLDEST_DIFFUSERS}'"
        ) from error
    return diffusers


def on_meta(kind: Any, config: Mapping[str, Any]) -> Any:
    """diffusers' model without its weights."""
    with torch.device("meta"):
        return kind.from_config(dict(config)).requires_grad_(False)


def unlike_the_host(config: Mapping[str, Any]) -> Iterator[str]:
    """What in a config of diffusers the host would compute otherwise, in words."""
    fixed = FIXED[config["_class_name"]]
    for name, value in fixed.items():
        given = config[name]
        if name == "out_channels" and given is None:
            given = config["in_channels"]
        if (tuple(given) if isinstance(given, (list, tuple)) else given) != value:
            yield f"{name} is {given} and ComfyUI has {value}"


def places(config: Mapping[str, Any]) -> dict[str, Place]:
    """The place of each weight that a model of this config may have, by diffusers' name."""
    shape = {
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
    }
    table: dict[str, Any] = comfy.utils.flux_to_diffusers(shape)
    if config["_class_name"] == "Flux2Transformer2DModel":
        table.update(_FLUX2_PLACES)
    return {key: _place(entry) for key, entry in table.items()}


def _place(entry: Any) -> Place:
    """One of the host's: a name, or (name, None or (dim, start, count)), or that and a function."""
    if isinstance(entry, str):
        return Place(entry)
    name, part, *convert = entry
    return Place(name, None if part is None else part[1:], *convert)


def config_of(diffusion_model: Any) -> dict[str, Any]:
    """The config that diffusers' class takes for one of the host's Flux models; what it leaves out is as in ``FIXED``.

    Raises:
        ValueError: diffusers has no class for the model.
    """
    params: Any = getattr(diffusion_model, "params", None)
    if type(diffusion_model) is not comfy.ldm.flux.model.Flux or params.yak_mlp or params.txt_norm:
        raise ValueError(
            f"model: this is {type(diffusion_model).__name__}, and only Flux.1 and Flux.2 can become a folder of "
            "diffusers' Flux classes. Save it with ModelSave instead."
        )
    kind = "Flux2Transformer2DModel" if params.global_modulation else "FluxTransformer2DModel"
    config = {
        **FIXED[kind],
        "_class_name": kind,
        "in_channels": diffusion_model.img_in.in_features,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in_dim,
        "guidance_embeds": params.guidance_embed,
    }
    if kind == "FluxTransformer2DModel":
        config["pooled_projection_dim"] = params.vec_in_dim
    return config


def transformer_of(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """diffusers' model of a config of its, with the host's ``weights``, whose memory it shares wherever it can.

    Raises:
        ValueError: the weights are not those that diffusers has for this config.
    """
    transformer = on_meta(getattr(require_diffusers("Flux in diffusers' format"), config["_class_name"]), config)
    table = places(config)
    state = {}
    for name in transformer.state_dict():
        place = table[name]
        weight = place.within(weights).detach()
        state[name] = weight if place.convert is None else place.convert(weight)
    if left := weights.keys() - {table[name].name for name in state}:
        raise ValueError(
            f"model: diffusers' {config['_class_name']} has no weights such as {min(left)}. Save it with ModelSave "
            "instead."
        )
    transformer.load_state_dict(state, assign=True)
    return transformer
