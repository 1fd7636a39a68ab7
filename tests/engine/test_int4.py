"""Weights in 4 bits, in groups of 64 with levels closer the smaller they are."""

import pytest
import torch
from hotpath_pack.hotpath.int4 import GROUP, dequantized_groups, int4_groups


def weight(rows=64, columns=512):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def decibels(want, got):
    return 10 * torch.log10(want.square().sum() / (want - got).square().sum())


def test_bits_and_error():
    want = weight()
    packed, scales = int4_groups(want)
    assert (packed.shape, packed.dtype) == ((64, 256), torch.uint8)
    assert (scales.shape, scales.dtype) == ((64, 512 // GROUP), torch.float16)
    got = dequantized_groups(packed, scales, torch.float32)
    evenly = (want.reshape(-1, GROUP) / (scale := want.reshape(-1, GROUP).abs().amax(1, keepdim=True) / 8)).round()
    even = (evenly.clamp(-8, 7) * scale).reshape(want.shape)
    assert decibels(want, got) > 21.4 and decibels(want, got) > decibels(want, even) + 1
    assert dequantized_groups(*int4_groups(got), torch.float32).equal(got), "what was quantized stays as it is"
    assert dequantized_groups(packed, scales, torch.bfloat16).equal(got.bfloat16())


@pytest.mark.parametrize("odd", [0.0, 1e-12, 1e5, -1e5])
def test_groups_of_zeros_tiny_and_huge_numbers_stay_finite(odd):
    want = weight()
    want[3] = odd
    want[4, 7] = odd
    got = dequantized_groups(*int4_groups(want), torch.float32)
    assert got.isfinite().all()
    assert got[3].abs().max() <= 1.1 * abs(odd) + 1e-6


def test_noise_rounds_without_bias():
    want, generator = weight(16, 128), torch.Generator().manual_seed(1)
    many = [int4_groups(want, torch.rand(want.shape, generator=generator)) for _ in range(400)]
    mean = sum(dequantized_groups(*each, torch.float32) for each in many) / len(many)
    assert (mean - want).abs().max() < 0.002 < (dequantized_groups(*many[0], torch.float32) - want).abs().max()
