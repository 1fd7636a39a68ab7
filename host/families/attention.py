"""Attention of blocks that call the host's ``optimized_attention``: traced where nothing is in its way, else a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...hotpath.attention import (
    Attend,
    cached_prefers_cudnn,
    calls_in_order,
    cudnn_attention,
    joined,
    opaque_attention,
)
from ...hotpath.compiled import Bind
from ...hotpath.exchange import exchanged
from ...hotpath.sizes import as_size, from_size
from ...hotpath.template import NotHoistable

# What a block may ask of attention by name that changes nothing of what is traced.
_KNOWN = {
    "mask",
    "skip_reshape",
    "transformer_options",
    "preferred_attention",
    "low_precision_attention",
    "_inside_attn_wrapper",
}
# The slices of a call that asks for exact attention.
_EXACT = [3]
# The entry of a region's inputs that holds counts of tokens.
_SIZES = "sizes"
# From ComfyUI 0.32 on, for its node Model Attention Backend.
_CHOOSE = getattr(ModelPatcher, "set_model_optimized_attention", None)


def has_patches(options: Mapping[str, Any]) -> bool:
    """Whether these options bring code of other nodes that runs between blocks, in their place, or within them."""
    return any(options.get("patches", {}).values()) or bool(options.get("patches_replace", {}).get("dit"))


def is_overridden(options: Mapping[str, Any]) -> bool:
    """Whether attention under these options may compute anything else than the host's by default.

    PyTorch's attention is what the host runs by default wherever a block is traced, so that it overrides nothing where
    the host's own node chose it.
    """
    if "optimized_attention_override" not in options:
        return False
    override = options["optimized_attention_override"]
    return _chosen_by_host(override) is not comfy.ldm.modules.attention.attention_pytorch


class SharedAttention:
    """An override of the host's attention where tokens are shared out over devices: the queries of one, the keys and
    values of all, of which the ``others`` have so many. Blocks that know it trace the exchange; it is called with heads
    apart."""

    def __init__(self, others: int) -> None:
        self.others = others
        self._sizes: dict[Any, Any] = {}

    def others_as_size(self, like: Tensor, dynamic: bool) -> Any:
        """``others`` as the ``as_size`` of each block that computes as ``like`` does, the same for all."""
        key = like.device, like.dtype, dynamic, torch.is_inference_mode_enabled()
        if key not in self._sizes:
            self._sizes[key] = as_size(self.others, like, dynamic)
        return self._sizes[key]

    def __call__(
        self,
        attention: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return attention(q, *exchanged(k, v, self.others), heads, *args, **kwargs)


def shared_attention(options: Mapping[str, Any]) -> SharedAttention | None:
    """The attention of one of several devices under these options; None where there is one."""
    override = options.get("optimized_attention_override")
    return override if isinstance(override, SharedAttention) else None


def _chosen_by_host(override: Any) -> Any:
    """The attention function that the host's own override hands each call on to; None for any other override."""
    code = getattr(override, "__code__", None)
    if code is None or _CHOOSE is None or code not in _CHOOSE.__code__.co_consts:
        return None
    hands_on = code.co_freevars == ("optimized_attention",) and not code.co_names and not any(code.co_consts)
    return override.__closure__[0].cell_contents if hands_on else None


def is_plain(attention: Any, options: Mapping[str, Any], patches: tuple[str, ...]) -> bool:
    """Whether a block that calls ``attention`` under these options can be traced with it.

    Args:
        attention: the host's function by the name that the blocks' module calls.
        patches: those around attention that such blocks read.

    Raises:
        NotHoistable: it was replaced by code that does not honour the host's override.
    """
    if not hasattr(attention, "__wrapped__"):
        raise NotHoistable(f"the host's attention was replaced by {attention.__module__}")
    known = options.get("patches", {})
    return (
        attention is comfy.ldm.modules.attention.attention_pytorch
        and not is_overridden(options)
        and not any(known.get(name) for name in patches)
    )


def region_arguments(
    inputs: Mapping[str, Any], like: Tensor, dynamic: bool, sizes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A block's arguments without its options, with those called ``sizes`` as sizes, by which a graph serves all."""
    taken = {name: value for name, value in inputs.items() if name != "transformer_options"}
    counts = [name for name in sizes if taken.get(name) is not None]
    taken[_SIZES] = {name: as_size(taken.pop(name), like, dynamic) for name in counts}
    return taken


def block_arguments(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``region_arguments`` took the block's arguments apart into, with these options."""
    taken = {name: value for name, value in inputs.items() if name != _SIZES}
    sizes = {name: from_size(size) for name, size in inputs[_SIZES].items()}
    return {**taken, **sizes, "transformer_options": options}


def bind_traced(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """No patch and no override: the block reads nothing else from its options."""
    return block_arguments(inputs, {})


def bind_cudnn(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """As ``bind_traced``, with cuDNN's attention where there is no mask."""
    return block_arguments(inputs, {"optimized_attention_override": cudnn_first})


def bind_called_out(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Attention as a call."""
    return block_arguments(inputs, {"optimized_attention_override": partial(called_out, calls_in_order())})


def is_own(function: Any, module: ModuleType) -> bool:
    """Whether ``function``, which ``module`` has, and all that it wraps is code of that module's file, or of a package
    any of its files."""
    homes = tuple(getattr(module, "__path__", [module.__file__]))
    while getattr(getattr(function, "__code__", None), "co_filename", "").startswith(homes):
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


def _is_hosts_default() -> bool:
    """Whether what the host runs by default is its call of PyTorch's attention, so that another order of PyTorch's
    kernels computes the same."""
    module, ops = comfy.ldm.modules.attention, comfy.ops
    return is_own(module.attention_pytorch, module) and is_own(ops.scaled_dot_product_attention, ops)


def chosen(traced: Bind, with_cudnn: Bind, opaque: Bind) -> Callable[[Attend | None, Tensor], Bind]:
    """``Interface.bind_for`` of blocks that are traced in one of these ways."""

    def bind_for(attend: Attend | None, like: Tensor) -> Bind:
        if attend is not None:
            return opaque
        return with_cudnn if cached_prefers_cudnn(like.device) and _is_hosts_default() else traced

    return bind_for


def cudnn_first(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
) -> Tensor:
    """An override of the host's attention: cuDNN's where nothing but attention itself is asked for."""
    mask, more = _asked(args, kwargs)
    if mask is not None or more:
        return attend(q, k, v, heads, *args, **kwargs)
    if not kwargs.get("skip_reshape"):
        q, k, v = by_heads(q, heads), by_heads(k, heads), by_heads(v, heads)
    return cudnn_attention(q, k, v)


def called_out(
    call: Attend, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
) -> Tensor:
    """An override of the host's attention that leaves one opaque ``call`` in the graph.

    Raises:
        NotImplementedError: the block asks for something that the call can't pass on, so that it must run eager.
    """
    mask, more = _asked(args, kwargs)
    if more:
        raise NotImplementedError(f"the block asks attention for {', '.join(sorted(more))}")
    if not kwargs.get("skip_reshape"):
        q, k, v = by_heads(q, heads), by_heads(k, heads), by_heads(v, heads)
    exact = kwargs.get("low_precision_attention", True) is False
    return call(q, k, v, None, mask, _EXACT if exact else [])


def skipped(attend: Callable[..., Tensor], q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An override of the host's attention that computes none, where a patch after it gives what it would."""
    return joined(q)


def patches_called_out(*slices: str) -> dict[str, Any]:
    """Options under which a block that has the host's hooks around attention calls out in their place once, with what
    the hooks are told under the names ``slices``."""
    result: list[Tensor] = []

    def call_out(
        q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Tensor | None, extra_options: dict[str, Any]
    ) -> dict[str, None]:
        told = [end for name in slices for end in extra_options.get(name, [])]
        result.append(opaque_attention(q, k, v, pe, attn_mask, told))
        return {"pe": None}

    def deliver(attn: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return result[0]

    patches = {"attn1_patch": [call_out], "attn1_output_patch": [deliver]}
    return {"patches": patches, "optimized_attention_override": skipped}


def patched_before(
    patches: Iterable[Callable[..., Mapping[str, Any]]],
    extra_options: Mapping[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries, keys, values, rotation and mask as the ``patches`` before attention leave them."""
    for patch in patches:
        out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra_options)
        q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
        pe, mask = out.get("pe", pe), out.get("attn_mask", mask)
    return q, k, v, pe, mask


def attend_by_heads(
    attention: Callable[..., Tensor],
    options: Mapping[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
    slices: Sequence[int],
) -> Tensor:
    """``attention`` of the host, on the full options of this very call."""
    asked = {"transformer_options": options, "skip_reshape": True, **precision(slices)}
    return attention(q, k, v, q.shape[1], mask, **asked)


def precision(slices: Sequence[int]) -> dict[str, bool]:
    """What a call of ``called_out`` asked the host's attention for, by its slices."""
    return {"low_precision_attention": False} if list(slices) == _EXACT else {}


def _asked(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """The mask, and the names of whatever else a block asks for than attention as PyTorch's default."""
    more = {name for name, value in kwargs.items() if name not in _KNOWN and value is not None and value is not False}
    if len(args) > 1:
        more.add("more than a mask")
    return (args[0] if args else kwargs.get("mask")), more


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * head dim) -> (batch, heads, tokens, head dim)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def has_queries(mask: Tensor | None) -> bool:
    """Whether ``mask`` has a row for each query."""
    return mask is not None and mask.ndim > 1 and mask.shape[-2] > 1


def mask_dims(mask: Tensor | None, both: bool) -> tuple[int, ...]:
    """Token dimensions of a mask (..., query tokens, key tokens), or with ``both`` off of one (..., tokens)."""
    if mask is None:
        return ()
    return (mask.ndim - 2, mask.ndim - 1) if both else (mask.ndim - 1,)
