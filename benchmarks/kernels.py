"""Ways to compute the parts of Flux.1-dev's blocks on one GPU: their accuracy, and then their time.

    python -m benchmarks.kernels [--parts NAME ...] [--fa3 WHEEL] [--json FILE]

At 1024x1024 with 512 text tokens, with random weights, in turns, each replayed as a CUDA graph with a cold cache: what
a step waits for between kernels is not in it. ``dB`` is the signal-to-noise ratio to the same in float64. Needs neither
ComfyUI nor a model.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from devtools.cli import run_tool, write_json
from devtools.measure import snr
from hotpath import triton_int8
from hotpath.attention import cudnn_attention
from hotpath.inductor import region_options

from . import fp8_attention

HIDDEN, HEADS, DIM, MLP = 3072, 24, 128, 12288
TEXT, IMAGE = 512, 4096
ROUNDS = 5
FP8 = torch.float8_e4m3fn
INT8_SHAPES = (triton_int8.SMALLER, triton_int8.SHAPE, (128, 256, 128, 8, 8, 3), (256, 128, 128, 8, 8, 3))
Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--tokens", type=int, nargs=2, default=(TEXT, IMAGE), metavar=("TEXT", "IMAGE"))
    parser.add_argument("--fa3", type=Path, metavar="WHEEL", help="of the package fa3-fwd, for its attention in fp8")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    rows: Rows = []
    for part in given.parts:
        print(f"\n{part}\n{'':<44}{'us':>9}{'dB':>8}", flush=True)
        replays: list[tuple[dict[str, Any], Callable[[], Any]]] = []
        with torch.inference_mode():
            PARTS[part](functools.partial(measure, rows, part, replays), *given.tokens, given.fa3)
        in_turns(replays)
    if given.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        write_json(given.json, {**about, "rows": rows})
    return 0


def measure(rows: Rows, part: str, replays: list[Any], name: str, work: Callable[[], Any], want: Any = None) -> None:
    """Add one row, and its work to ``replays``; what fails says so and is left out."""
    row: dict[str, Any] = {"part": part, "name": name, "times": []}
    rows.append(row)
    try:
        out = work()
        if want is not None:
            got, exact = (torch.cat([x.double().flatten() for x in tensors(many)]) for many in (out, want))
            row["dB"] = snr(exact, got)
        del out
        replays.append((row, recorded(work)))
    except Exception as error:
        traceback.print_exc(limit=-3)
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{name}: {row['error']}", flush=True)


def in_turns(replays: Sequence[tuple[dict[str, Any], Callable[[], Any]]]) -> None:
    """Time the rows of a part one after the other, several times over: a card at its power limit slows down."""
    for _ in range(ROUNDS):
        for row, replay in replays:
            row["times"] += triton.testing.do_bench(replay, warmup=5, rep=30, return_mode="all")
    for row, _ in replays:
        row["us"] = 1e3 * median(row.pop("times"))
        print(f"{row['name']:<44}{row['us']:>9.1f}{row.get('dB', float('nan')):>8.1f}", flush=True)


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """``work`` as a CUDA graph, which holds the addresses of what ``work`` holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(work: Callable[[], Any] = work) -> None:
        graph.replay()

    return replay


def compiled(function: Callable[..., Any], *dynamic: tuple[Tensor, int]) -> Callable[..., Any]:
    """``function`` compiled as a region is, alone in Dynamo's cache."""
    for tensor, dim in dynamic:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, options=region_options("default", probe=False))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device()) * scale).to(dtype)


def attention(row: Any, text: int, image: int, fa3: Path | None) -> None:
    """cuDNN's attention in bf16 beside kernels that multiply in fp8; q and k are what the rotary embedding gives."""
    tokens = text + image
    q, k, v = (randn(1, tokens, HEADS, DIM).transpose(1, 2) for _ in range(3))
    want = exact_attention(q, k, v)
    row("cuDNN, bf16", lambda: cudnn_attention(q, k, v).unflatten(-1, (HEADS, DIM)).transpose(1, 2), want)
    small = [x.to(FP8) for x in (q, k, v)]
    row("q, k, v to fp8", lambda: [x.to(FP8) for x in (q, k, v)])
    if fa3 is not None:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(fa3).extract("fa3_fwd/_C.abi3.so", folder)
            torch.ops.load_library(f"{folder}/fa3_fwd/_C.abi3.so")
        for name, given in (("FA3, bf16", (q, k, v)), ("FA3, fp8 unscaled", small)):
            rows = [x.transpose(1, 2) for x in given]
            row(name, lambda rows=rows: torch.ops.fa3_fwd.fwd(*rows, num_splits=1)[0].transpose(1, 2), want)
    attend: Callable[..., Tensor] = fp8_attention.attend
    eights = [x.contiguous() for x in small[:2]] + [small[2].transpose(2, 3).contiguous()]
    for shape in fp8_attention.SHAPES:
        row(f"Triton, fp8, {shape}", functools.partial(attend, *eights, *shape), want)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
    outs = [
        scaled_dot_product_attention(wide_q[:, head], wide_k[:, head], wide_v[:, head]) for head in range(q.shape[1])
    ]
    return torch.stack(outs, 1)


def int8(row: Any, text: int, image: int, fa3: Path | None) -> None:
    """Products of 8-bit rows of a double and a single block, scaled, with what follows them in bf16."""
    for tokens, depth, width in (
        (image, HIDDEN, 3 * HIDDEN),
        (image, MLP, HIDDEN),
        (text + image, HIDDEN, 3 * HIDDEN + MLP),
        (text + image, HIDDEN + MLP, HIDDEN),
    ):
        name = f"{tokens} x {depth} x {width}"
        x, w = (torch.randint(-127, 128, (rows, depth), device=device()).to(torch.int8) for rows in (tokens, width))
        scales = [torch.rand(rows, 1, device=device()) * 1e-3 for rows in (tokens, width)]
        bias, full = randn(width), randn(width, depth)

        def today(x: Tensor, scale: Tensor, w: Tensor = w, bias: Tensor = bias, scales: Any = scales) -> Tensor:
            return (torch._int_mm(x, w.t()).float() * (scale * scales[1].t())).bfloat16() + bias

        want = today(x, scales[0])
        row(
            f"{name}: int32, then scales",
            functools.partial(compiled(today, (x, 0), (scales[0], 0)), x, scales[0]),
            want,
        )
        row(f"{name}: bf16", functools.partial(torch.nn.functional.linear, x.bfloat16(), full, bias))
        out = torch.empty_like(want)
        for shape in INT8_SHAPES:
            given = x, scales[0], w, scales[1], bias, out

            def direct(given: Any = given, shape: Any = shape) -> Tensor:
                triton_int8.launch(triton_int8.int8_product_kernel, *given, shape)
                return given[-1]

            row(f"{name}: kernel, {shape}", direct, want)


PARTS: dict[str, Callable[..., None]] = {
    "attention": attention,
    "int8": int8,
}

if __name__ == "__main__":
    run_tool(main)
