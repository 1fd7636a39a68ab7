"""ComfyUI's newest modulated norm on one GPU: as its operator, and in the plain form that a region has of it.

    python -m benchmarks.modulated_norm [--width N] [--tokens N]

What Flux.1-dev does at 1024x1024 around one: a gated addition before it, and a Linear (bf16) or a product of rows
quantized to fp8 after it. Microseconds of a CUDA graph with a cold cache. Needs comfy-kitchen and no ComfyUI.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import comfy_kitchen
import torch
from torch import Tensor

from devtools.cli import positive, run_tool

from .kernels import microseconds

# Of a folder, whose name is that of the pack only where a host gives it one.
plain_forms, inductor, rowwise = (
    importlib.import_module(f"hotpath.{name}") for name in ("plain_forms", "inductor", "rowwise")
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.modulated_norm", description=__doc__)
    parser.add_argument("--width", type=positive, default=3072, metavar="N")
    parser.add_argument("--tokens", type=positive, default=4608, metavar="N")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else device}, torch {torch.__version__}")
    make, width = torch.Generator(device).manual_seed(0), given.width

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=device, dtype=torch.bfloat16)

    x, y = (random(1, given.tokens, width) for _ in range(2))
    weight = random(3 * width, width) / width**0.5
    gate, scale, shift = (random(1, 1, width) for _ in range(3))
    rows, ones = weight.to(torch.float8_e4m3fn), torch.ones(3 * width, 1, device=device)

    def bf16() -> Any:
        added = x + y * gate
        return added, torch.nn.functional.linear(comfy_kitchen.adaln(added, scale, shift, 1e-6), weight)

    def fp8() -> Any:
        added = x + y * gate
        normed = comfy_kitchen.adaln(added, scale, shift, 1e-6)[0]
        scales = rowwise.fp8_scales(normed)
        return added, rowwise.fp8_product(rowwise.fp8_rows(normed, scales), scales, rows, ones, None, normed.dtype)

    with torch.inference_mode():
        for name, work in (("bf16", bf16), ("fp8 rowwise", fp8)):
            for form, known in (("operator", {}), ("plain form", plain_forms._FORMS)):
                print(f"{name:<14}{form:<12}{_time(work, known):>9.1f} us", flush=True)
    return 0


def _time(work: Callable[[], Any], forms: dict[str, Callable[..., Any]]) -> float:
    torch._dynamo.reset()
    with patch.object(plain_forms, "_FORMS", forms), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(work, options=inductor.region_options("default", probe=True))
        compiled()
        return microseconds(compiled)


if __name__ == "__main__":
    run_tool(main)
