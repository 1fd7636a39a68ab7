"""Norm and rotary embedding as one: the Triton kernel gives what PyTorch gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hotpath_pack.hotpath.rotary import has_kernel, norm_rotate

ROOT = Path(__file__).resolve().parent.parent.parent
EPS = torch.finfo(torch.float32).eps
# Triton's interpreter runs kernels on the CPU in a process that asks for it before it imports Triton.
INTERPRETED = """
import itertools, sys, types

import torch

pack = types.ModuleType("hotpath_pack")
pack.__path__ = [sys.argv[1]]
sys.modules["hotpath_pack"] = pack
from hotpath_pack.hotpath import rotary, triton_rotary as kernel

kernel.wrap_triton = lambda function: function
EPS = torch.finfo(torch.float32).eps


def heads_of(packed, heads, dim):
    return packed[..., : 3 * heads * dim].unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)


def compare(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-5)


for dtype, tables in itertools.product((torch.float32, torch.float16), (1, 2)):
    batch, tokens, heads, dim = 2, 19, 7, 16
    q, k, _ = heads_of(torch.randn(batch, tokens, 3 * heads * dim + 8).to(dtype), heads, dim)
    scales = [(1 + 0.1 * torch.randn(dim)).to(dtype) for _ in range(2)]
    table = torch.randn(tables, 1, tokens, dim // 2, 2, 2)
    want = rotary.norm_rotate(q, k, *scales, table, EPS)
    compare(kernel.norm_rotate(q, k, *scales, table, EPS), want)

heads, dim, counts = 3, 32, (5, 18)
streams = [heads_of(torch.randn(1, tokens, 3 * heads * dim), heads, dim) for tokens in counts]
scales = [[1 + 0.1 * torch.randn(dim) for _ in counts] for _ in range(2)]
table = torch.randn(1, 1, sum(counts), dim // 2, 2, 2)
qkv = [list(each) for each in zip(*streams, strict=True)]
want = rotary.norm_rotate_joint(*qkv, *scales, table, EPS)
compare(kernel.norm_rotate_joint(*qkv, *scales, table, EPS), want)
print("compared")
"""


@pytest.mark.skipif(not has_kernel(), reason="Triton has no package for this system")
def test_the_kernel_in_one_stream_and_in_two_that_it_joins():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", INTERPRETED, str(ROOT)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "compared", done.stderr


def test_as_the_host_does_a_longer_table_is_cut_and_a_shorter_refused():
    q, k = torch.randn(2, 1, 2, 4, 16)
    scale, table = torch.ones(16), torch.randn(1, 1, 6, 8, 2, 2)
    cut = norm_rotate(q, k, scale, scale, table[:, :, :4], EPS)
    assert all(map(torch.equal, norm_rotate(q, k, scale, scale, table, EPS), cut))
    for wrong in (table[:, :, :3], table.expand(2, -1, -1, -1, -1, -1)):
        with pytest.raises(ValueError, match="rotary embedding is of shape"):
            norm_rotate(q, k, scale, scale, wrong, EPS)
