"""Weights in the block formats of ggml, beside what the package ``gguf`` makes of the same bytes."""

import gguf
import numpy
import pytest
import torch
from hotpath_pack.hotpath.ggml import KINDS
from torch.func import functional_call

OUT, IN = 6, 512
# Of a block in halves: where its scales are, which random bits would make infinite.
SCALES = {"BF16": [], "Q6_K": [104], "Q3_K": [54], "Q2_K": [40, 41]}


def random_bytes(name):
    """(out, bytes of a row) uint8."""
    kind, rng = KINDS[name], numpy.random.default_rng(0)
    if name == "BF16":
        return (rng.standard_normal((OUT, IN)).astype(numpy.float32).view(numpy.uint32) >> 16).astype("u2").view("u1")
    data = rng.integers(0, 256, (OUT, IN // kind.BLOCK * kind.BYTES), dtype=numpy.uint8)
    halves = data.reshape(-1, kind.BYTES).view(numpy.float16)
    for place in SCALES.get(name, [0, 1] if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]):
        halves[:, place] = rng.uniform(-0.02, 0.02, len(halves))
    return data


def dequantized(name, data, compute, dtype=torch.float32):
    layer, data = KINDS[name](OUT, IN, None, compute), torch.from_numpy(data)
    if name == "BF16":
        tensors = {"weight": data.view(torch.bfloat16)}
    else:
        tensors = {"weight": data, "halves": data.view(torch.float16)}
    return functional_call(layer, tensors, (torch.eye(IN, dtype=dtype),)).T


@pytest.mark.parametrize("name", KINDS)
def test_bits_are_those_of_the_package_gguf(name):
    theirs, data = gguf.GGMLQuantizationType[name], random_bytes(name)
    assert gguf.GGML_QUANT_SIZES[theirs] == (KINDS[name].BLOCK, KINDS[name].BYTES)
    want = torch.from_numpy(gguf.quants.dequantize(data, theirs))
    assert dequantized(name, data, torch.float32).equal(want) and want.std() > 0
    assert dequantized(name, data, None).equal(want), "in the dtype of the activations"
    # Two roundings of float16 at most, of the scale and of the value, and one of their difference.
    rounded = dequantized(name, data, torch.float16)
    assert (rounded - want).abs().max() <= 3 * 2**-11 * want.abs().max()
    assert dequantized(name, data, torch.float16, torch.bfloat16).equal(rounded.bfloat16())


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_what_the_package_quantizes(name):
    """Weights that were numbers before; the other formats it can read alone."""
    weight = numpy.random.default_rng(0).standard_normal((OUT, IN)).astype(numpy.float32)
    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
    got = dequantized(name, data, torch.float32)
    assert (got - torch.from_numpy(weight)).norm() < 0.15 * got.norm()


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS"])
def test_inductor_rounds_less(name):
    """Generated code keeps float32 where eager rounds to float16 between operations: nearer to the true weight."""
    data = random_bytes(name)
    layer, tensors = KINDS[name](OUT, IN, None, torch.float16), torch.from_numpy(data)
    true = dequantized(name, data, torch.float32)

    @torch.compile(fullgraph=True)
    def run(weight, x):
        return functional_call(layer, {"weight": weight, "halves": weight.view(torch.float16)}, (x,))

    got = run(tensors, torch.eye(IN)).T
    assert (got - true).norm() <= (dequantized(name, data, torch.float16) - true).norm()
