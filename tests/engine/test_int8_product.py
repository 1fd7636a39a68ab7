"""8-bit products scaled in one Triton kernel: what PyTorch gives, to the bit."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hotpath_pack.hotpath.rowwise import has_int8_kernel
from torch.utils._triton import has_triton_package

ROOT = Path(__file__).resolve().parent.parent.parent
# Triton's interpreter runs kernels on the CPU in a process that asks for it before it imports Triton.
INTERPRETED = """
import itertools, sys, types

import torch

pack = types.ModuleType("hotpath_pack")
pack.__path__ = [sys.argv[1]]
sys.modules["hotpath_pack"] = pack
from hotpath_pack.hotpath import triton_int8 as kernel

# Rounded to bf16 the interpreter's numbers are not PyTorch's.
types = torch.float32, torch.float16
for (m, k, n), dtype, by_row, biased in itertools.product(
    ((5, 64, 48), (37, 96, 70), (70, 200, 40)), types, (True, False), (True, False)
):
    rows, weight = (torch.randint(-128, 128, (many, k), dtype=torch.int8) for many in (m, n))
    scales, weight_scale = torch.rand(m, 1) / 100, torch.rand(n, 1) / 100 if by_row else torch.rand(()) / 100
    bias = torch.randn(n) if biased else None
    out = torch.full((m, n), float("nan"), dtype=dtype)
    shape = 32, 32, 64, 2, 4, 2
    kernel.launch(kernel.int8_product_kernel, rows, scales, weight, weight_scale, bias, out, shape)
    product = (rows.int() @ weight.int().t()).float()
    want = (product * (scales * weight_scale.reshape(1, -1))).to(dtype)
    assert torch.equal(out, want if bias is None else want + bias.to(dtype)), (m, k, n, dtype, by_row, biased)
print("equal")
"""


@pytest.mark.skipif(not has_triton_package(), reason="Triton has no package for this system")
def test_the_kernel_gives_the_same_bits():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", INTERPRETED, str(ROOT)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


def test_there_is_none_without_a_device_that_multiplies_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not has_int8_kernel()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: [(8, 6), (7, 5)][index])
    assert not has_int8_kernel(), "RTX 20 series"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 6))
    assert has_int8_kernel() == has_triton_package()
    monkeypatch.setattr("torch.version.hip", "7.2")
    assert not has_int8_kernel()


@pytest.mark.skipif(not has_triton_package(), reason="Triton has no package for this system")
def test_what_a_program_takes_fits_the_card(monkeypatch):
    from hotpath_pack.hotpath import triton_int8

    for kib in (64, 99, 163, 227):
        card = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, card=card: card)
        rows, columns, depth, _, _, stages = triton_int8.shape_on(None)
        assert (rows + columns) * depth * stages <= kib * 1024
