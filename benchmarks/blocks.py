"""Flux.1's blocks written down with the ways to compute them that ``benchmarks.kernels`` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention

from hotpath.attention import cudnn_attention
from hotpath.gelu import logistic_gelu
from hotpath.rotary import rotate
from hotpath.rowwise import computed_once, fp8_product, fp8_rows, fp8_scales

EPS = torch.finfo(torch.float32).eps
Weights = dict[str, Any]


@dataclass(frozen=True)
class Ways:
    """How a block is computed.

    ``fused``: norm and rotary embedding by one kernel. ``halves``: linear2 as two products, without the cat before it.
    ``epilogue``: GELU by the product before it. ``fp8``: products of fp8 rows.
    """

    fused: bool = False
    halves: bool = False
    epilogue: bool = False
    fp8: bool = False

    def quantized(self, weights: Weights) -> Weights:
        """Matrices as rows and scales where it asks for fp8."""
        if not self.fp8:
            return weights
        matrices = {name: weight for name, weight in weights.items() if weight.ndim == 2 and weight.shape[0] > 1}
        scales = {name: fp8_scales(weight) for name, weight in matrices.items()}
        return {
            **weights,
            **{name: (fp8_rows(weight, scales[name]), scales[name]) for name, weight in matrices.items()},
        }

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        if not self.fp8:
            return linear(x, weight, bias)
        rows = computed_once(x.reshape(-1, x.shape[-1]))
        scales = fp8_scales(rows)
        out = fp8_product(fp8_rows(rows, scales), scales, *weight, bias, x.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def gelu_product(self, x: Tensor, weight: Any, bias: Tensor) -> Tensor:
        if not self.epilogue:
            return logistic_gelu(self.product(x, weight, bias))
        out = torch.ops.aten._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
        return out.reshape(*x.shape[:-1], -1)


def part(weight: Any, rows: slice = slice(None), columns: slice = slice(None)) -> Any:
    """Rows and columns of a matrix, quantized or not."""
    if isinstance(weight, Tensor):
        return weight[rows, columns]
    return weight[0][rows, columns], weight[1][rows]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype == torch.float64:
        outs = [scaled_dot_product_attention(q[:, head], k[:, head], v[:, head]) for head in range(q.shape[1])]
        return torch.cat(outs, -1)
    return cudnn_attention(q, k, v)


def heads_of(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def single_weights(randn: Callable[..., Tensor], hidden: int, mlp: int, dim: int) -> Weights:
    first, second = 3 * hidden + mlp, hidden + mlp
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (first, hidden),
        "b1": (first,),
        "w2": (hidden, second),
        "b2": (hidden,),
    }
    shapes |= {name: (1, 1, hidden) for name in ("shift", "scale", "gate")}
    return {name: randn(*shape, scale=0.02) for name, shape in shapes.items()} | norm_scales(randn, dim)


def norm_scales(randn: Callable[..., Tensor], dim: int) -> Weights:
    return {name: 1 + randn(dim, scale=0.1) for name in ("q_scale", "k_scale")}


def single_block(hidden: int, heads: int, ways: Ways, weights: Weights, x: Tensor, table: Tensor) -> Tensor:
    h = modulated(x, weights["shift"], weights["scale"])
    if ways.epilogue:
        qkv = ways.product(h, part(weights["w1"], slice(3 * hidden)), weights["b1"][: 3 * hidden])
        mlp = ways.gelu_product(h, part(weights["w1"], slice(3 * hidden, None)), weights["b1"][3 * hidden :])
    else:
        qkv, mlp = ways.product(h, weights["w1"], weights["b1"]).tensor_split((3 * hidden,), -1)
        mlp = logistic_gelu(mlp)
    q, k, v = heads_of(qkv, heads)
    if ways.fused:
        q, k = torch.ops.hotpath.norm_rotate(q, k, weights["q_scale"], weights["k_scale"], table, EPS)
    else:
        q, k = (rotate(rms_norm(y, y.shape[-1:], weights[s]), table) for y, s in ((q, "q_scale"), (k, "k_scale")))
    out = attend(q, k, v)
    if ways.halves:
        product = ways.product(out, part(weights["w2"], columns=slice(hidden)), None)
        product = product + ways.product(mlp, part(weights["w2"], columns=slice(hidden, None)), weights["b2"])
    else:
        product = ways.product(torch.cat((out, mlp), -1), weights["w2"], weights["b2"])
    return x + product * weights["gate"]


def double_weights(randn: Callable[..., Tensor], hidden: int, mlp: int, dim: int) -> Weights:
    weights: Weights = {}
    for stream in ("txt", "img"):
        shapes: dict[str, tuple[int, ...]] = {
            "qkv": (3 * hidden, hidden),
            "proj": (hidden, hidden),
            "up": (mlp, hidden),
            "down": (hidden, mlp),
        }
        for name, shape in list(shapes.items()):
            shapes[f"{name}_b"] = shape[:1]
        shapes |= {name: (1, 1, hidden) for name in ("shift", "scale", "gate", "shift2", "scale2", "gate2")}
        weights |= {f"{stream}_{name}": randn(*shape, scale=0.02) for name, shape in shapes.items()}
        weights |= {f"{stream}_{name}": scale for name, scale in norm_scales(randn, dim).items()}
    return weights


def double_block(
    hidden: int, heads: int, ways: Ways, weights: Weights, txt: Tensor, img: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    streams, parts = {"txt": txt, "img": img}, []
    for name, x in streams.items():
        h = modulated(x, weights[f"{name}_shift"], weights[f"{name}_scale"])
        parts.append(heads_of(ways.product(h, weights[f"{name}_qkv"], weights[f"{name}_qkv_b"]), heads))
    scales = [[weights[f"{name}_{which}_scale"] for name in streams] for which in ("q", "k")]
    if ways.fused:
        qkv = map(list, zip(*parts, strict=True))
        q, k, v = torch.ops.hotpath.norm_rotate_joint(*qkv, *scales, table, EPS)
    else:
        q, k = (
            rotate(
                torch.cat([rms_norm(p[i], p[i].shape[-1:], s) for p, s in zip(parts, scales[i], strict=True)], 2), table
            )
            for i in (0, 1)
        )
        v = torch.cat([p[2] for p in parts], 2)
    attn = attend(q, k, v).tensor_split((txt.shape[1],), 1)
    outs = []
    for (name, x), out in zip(streams.items(), attn, strict=True):
        x = x + ways.product(out, weights[f"{name}_proj"], weights[f"{name}_proj_b"]) * weights[f"{name}_gate"]
        h = modulated(x, weights[f"{name}_shift2"], weights[f"{name}_scale2"])
        h = ways.gelu_product(h, weights[f"{name}_up"], weights[f"{name}_up_b"])
        outs.append(x + ways.product(h, weights[f"{name}_down"], weights[f"{name}_down_b"]) * weights[f"{name}_gate2"])
    return outs[0], outs[1]
