"""Flux blocks in a template that compute the same in fewer passes over memory.

The host's own forward runs on a stand-in for the block, some parts of which are others:

* The norm leaves q and k as they are, and the attention normalizes and rotates them at once. In double blocks it joins
  the streams too, so that the host's ``cat`` of them is used by nothing and left out of the graph.
* A single block's last product is one of the attention's output and one of the MLP's, without a ``cat`` of the two.
* GELU is computed by the product before it in a double block's MLP.

What each is good for: ``python -m benchmarks.kernels``. All are equal to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from ...hotpath.attention import cudnn_attention
from ...hotpath.gelu import LogisticGelu, gelu_of_linear
from ...hotpath.rotary import norm_rotate, norm_rotate_joint
from ...hotpath.template import plan_block
from ..residency.weights import layer_states, plain_layers
from .kinds import BlockKind

log = logging.getLogger(__name__)

# Options by which a block is asked to. The first holds the rotary embedding; a block that can't goes by the host's.
ROTATES, IN_HALVES, WITH_EPILOGUE = "hotpath_rotates", "hotpath_in_halves", "hotpath_with_epilogue"
_HEADS, _HEAD_DIM, _TEXT, _IMAGE = 2, 32, 3, 5


class StandIn:
    """``module`` with other parts under some names, for a forward that reads it as ``self``."""

    def __init__(self, module: Any, **parts: Any) -> None:
        self.module = module
        for name, part in parts.items():
            setattr(self, name, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Scales:
    """What the norms of q and of k multiply by in each stream, and their epsilon."""

    def __init__(self, *norms: Any) -> None:
        both = [(norm.query_norm, norm.key_norm) for norm in norms]
        self.plain = all(type(each) is nn.RMSNorm for pair in both for each in pair)
        self.q = [query.weight for query, _ in both] if self.plain else []
        self.k = [key.weight for _, key in both] if self.plain else []
        # As PyTorch takes it for float32 and all that is computed in it.
        epsilons = [each.eps for pair in both for each in pair] if self.plain else [None]
        self.eps = epsilons[0] or torch.finfo(torch.float32).eps
        self.alike = all(eps == epsilons[0] for eps in epsilons)

    def suit(self) -> bool:
        """Whether the kernel can take them: one epsilon, and a head dim that is a power of 2."""
        scales = (*self.q, *self.k)
        if not self.plain or not self.alike or any(scale is None for scale in scales):
            return False
        dim = scales[0].shape[0]
        return bool(dim >= 16 and dim & (dim - 1) == 0)


def _attend(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return cudnn_attention(q, k, v) if kwargs.get("mask") is None else attend(q, k, v, *args, **kwargs)


class FusedSingleBlock(SingleStreamBlock):
    """The host's single block, which computes in fewer passes where its options say so."""

    def forward(self, **kwargs: Any) -> Tensor:
        options = kwargs["transformer_options"]
        pe, scales = options.get(ROTATES), Scales(self.norm)
        if pe is None or not scales.suit():
            return SingleStreamBlock.forward(self, **kwargs)
        halves: list[Tensor] = []

        def attend(host: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **more: Any) -> Tensor:
            q, k = norm_rotate(q, k, scales.q[0], scales.k[0], pe, scales.eps)
            out = _attend(host, q, k, *args, **more)
            halves.append(out)
            return out

        def activate(mlp: Tensor) -> Tensor:
            halves.append(self.mlp_act(mlp))
            return halves[1]

        def project(joined: Tensor) -> Tensor:
            # It is the two halves side by side, which nothing else reads, so that no code is made to join them.
            attention, mlp = halves
            weight, width = self.linear2.weight, attention.shape[-1]
            return linear(attention, weight[:, :width]) + linear(mlp, weight[:, width:], self.linear2.bias)

        parts: dict[str, Any] = {"norm": lambda q, k, v: (q, k)}
        # A gated MLP multiplies what its SiLU gives; a quantized product was measured to gain nothing.
        if IN_HALVES in options and type(self.linear2) is nn.Linear and not isinstance(self.mlp_act, nn.SiLU):
            parts |= {"mlp_act": activate, "linear2": project}
        kwargs["transformer_options"] = {"optimized_attention_override": attend}
        return SingleStreamBlock.forward(StandIn(self, **parts), **kwargs)


class FusedDoubleBlock(DoubleStreamBlock):
    """The host's double block, which computes in fewer passes where its options say so."""

    def forward(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        options = kwargs["transformer_options"]
        pe, scales = options.get(ROTATES), Scales(self.txt_attn.norm, self.img_attn.norm)
        # Where its products are quantized it was measured to gain nothing.
        if pe is None or not scales.suit() or type(self.img_attn.qkv) is not nn.Linear:
            return DoubleStreamBlock.forward(self, **kwargs)
        txt: list[Tensor] = []
        img: list[Tensor] = []

        def norm_into(stream: list[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
            def norm(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                stream.extend((q, k, v))
                return q, k

            return norm

        def attend(host: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Tensor:
            joined_q, joined_k, joined_v = ([txt[index], img[index]] for index in range(3))
            q, k, v = norm_rotate_joint(joined_q, joined_k, joined_v, scales.q, scales.k, pe, scales.eps)
            return _attend(host, q, k, v, *args, **more)

        parts: dict[str, Any] = {
            "txt_attn": StandIn(self.txt_attn, norm=norm_into(txt)),
            "img_attn": StandIn(self.img_attn, norm=norm_into(img)),
        }
        if WITH_EPILOGUE in options:
            parts |= {"txt_mlp": _with_epilogue(self.txt_mlp), "img_mlp": _with_epilogue(self.img_mlp)}
        kwargs["transformer_options"] = {"optimized_attention_override": attend}
        return DoubleStreamBlock.forward(StandIn(self, **parts), **kwargs)


def _with_epilogue(mlp: Any) -> Callable[[Tensor], Tensor]:
    """An MLP whose first product computes its GELU too, where it is one of plain layers with a bias."""
    if not isinstance(mlp, nn.Sequential) or [type(layer) for layer in mlp] != [nn.Linear, LogisticGelu, nn.Linear]:
        return mlp
    first: Any = mlp[0]
    second: Any = mlp[2]
    if first.bias is None:
        return mlp
    return lambda x: second(gelu_of_linear(x, first.weight, first.bias))


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    DoubleStreamBlock: FusedDoubleBlock,
    SingleStreamBlock: FusedSingleBlock,
}


@contextmanager
def twins(kinds: Iterable[BlockKind]) -> Iterator[None]:
    """Let templates of ``kinds`` be twins, which a ``bind`` may ask for fewer passes. Not what users get: nothing has
    shown yet what a whole step gains, and a graph of a twin is none that another folder of this pack can load."""
    chosen = [kind for kind in kinds if kind.block in TWINS]
    try:
        for kind in chosen:
            object.__setattr__(kind, "twin", TWINS[kind.block])
        yield
    finally:
        for kind in chosen:
            object.__setattr__(kind, "twin", None)


@torch.no_grad()
def same_as_the_host(bind: Callable[..., Mapping[str, Any]], bind_fused: Callable[..., Mapping[str, Any]]) -> bool:
    """Whether the blocks of this ComfyUI give the same with ``bind_fused`` in their twins as with ``bind``.

    The twins know in which order the host joins its streams and its halves, and that it does nothing else to them.
    Small blocks on the CPU show whether it is so.
    """
    try:
        return all(_same(kind, gated, bind, bind_fused) for kind in TWINS for gated in (False, True))
    except Exception as error:
        # What a block of another ComfyUI raises when it is made or called in this way is not known.
        log.info("blocks of this ComfyUI run as they are written: %s", error)
        return False


def _same(
    kind: type, gated: bool, bind: Callable[..., Mapping[str, Any]], bind_fused: Callable[..., Mapping[str, Any]]
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width, tokens = _HEADS * _HEAD_DIM, _TEXT + _IMAGE
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    block = kind(width, _HEADS, mlp_ratio=2.0, mlp_silu_act=gated, **made).requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(random(*parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1))
    twin = plan_block(block, plain_layers(block, fuses=True), layer_states).template
    twin.__class__ = TWINS[kind]
    inputs: dict[str, Any] = {"vec": random(1, width), "pe": random(1, 1, tokens, _HEAD_DIM // 2, 2, 2)}
    streams = {"x": tokens} if kind is SingleStreamBlock else {"txt": _TEXT, "img": _IMAGE}
    inputs |= {name: random(1, count, width) for name, count in streams.items()}
    # Blocks change their streams in place.
    want, got = ({name: value.clone() for name, value in inputs.items()} for _ in range(2))
    outs = [block(**bind(want)), functional_call(twin, dict(block.named_parameters()), (), dict(bind_fused(got)))]
    exact, fused = (torch.cat([out] if isinstance(out, Tensor) else list(out), 1) for out in outs)
    return torch.allclose(exact, fused, rtol=1e-4, atol=1e-4)
