import torch
from hotpath_pack.hotpath.rowwise import FP8, computed_once, fp8_product, fp8_rows, fp8_scales, int8_rows
from hypothesis import given
from hypothesis import strategies as st

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))


def rows(shape, seed, spread):
    """Normal numbers whose rows are of sizes up to ``10 ** spread`` apart, the first one zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (spread * torch.rand(shape[0], 1, generator=generator))
    x[0] = 0
    return x


@given(SHAPES, st.integers(0, 9), st.floats(-8, 8))
def test_int8_is_within_half_a_step_of_each_row(shape, seed, spread):
    x = rows(shape, seed, spread)
    data, scales = int8_rows(x)
    assert data.dtype == torch.int8 and scales.shape == (shape[0], 1)
    assert ((data * scales - x).abs() <= 0.5001 * scales + 1e-30).all()
    assert (data[1:].abs().amax(1) == 127).all(), "each row uses all of its range"


@given(SHAPES, st.integers(0, 9))
def test_stochastic_rounding_is_right_on_average(shape, seed):
    x, noise = rows(shape, seed, 0), torch.Generator().manual_seed(seed)
    drawn = [int8_rows(x, torch.rand(shape, generator=noise)) for _ in range(200)]
    assert all(((data * scales - x).abs() <= 1.0001 * scales + 1e-30).all() for data, scales in drawn)
    mean = torch.stack([data.float() for data, _ in drawn]).mean(0)
    assert ((mean * drawn[0][1] - x).abs() <= 0.25 * drawn[0][1] + 1e-30).all()


@given(SHAPES, st.integers(0, 9), st.floats(-8, 8))
def test_fp8_keeps_three_bits_of_each_number(shape, seed, spread):
    x = rows(shape, seed, spread)
    scales = fp8_scales(x)
    data = fp8_rows(x, scales)
    assert data.dtype == FP8
    # Below 2**-6 of a scale it has steps of 2**-9.
    assert ((data.float() * scales - x).abs() <= torch.maximum(x.abs() / 16, scales * 2**-10) * 1.0001).all()


@given(SHAPES, st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_the_product_is_that_of_the_dequantized(shape, outputs, seed, biased):
    x, weight = rows(shape, seed, 2), rows((outputs, shape[1]), seed + 1, 2)
    scales, weight_scale = fp8_scales(x), fp8_scales(weight)
    data, weight_data = fp8_rows(x, scales), fp8_rows(weight, weight_scale)
    bias = torch.linspace(-1, 1, outputs) if biased else None
    got = fp8_product(data, scales, weight_data, weight_scale, bias, torch.float32)
    want = torch.nn.functional.linear(data.double() * scales, weight_data.double() * weight_scale, None)
    want = want if bias is None else want + bias
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5 * (1 + want.abs().max()))


def test_what_is_read_twice_is_stored_for_inductor():
    def quantized(x):
        rows = computed_once(torch.nn.functional.silu(x))
        return fp8_rows(rows, fp8_scales(rows))

    stored = []

    def keep(graph, inputs):
        stored.extend(node.target for node in graph.graph.nodes if "force_stride_order" in str(node.target))
        return graph.forward

    x = torch.randn(8, 16)
    assert torch.equal(torch.compile(quantized, backend=keep, fullgraph=True)(x).float(), quantized(x).float())
    assert len(stored) == 1
    assert computed_once(x) is x, "nothing is to be gained where no compiler is"
