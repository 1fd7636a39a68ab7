"""On a CUDA device: kernels of this pack beside the formulas that they stand for."""

import pytest
import torch
from hotpath_pack.devtools.gpu_host import compiled, load, quantize, sample
from hotpath_pack.hotpath.inductor import region_options
from hotpath_pack.hotpath.rowwise import has_int8_kernel, int8_product

pytestmark = pytest.mark.gpu


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def region(function):
    return torch.compile(function, fullgraph=True, options=region_options("default", probe=False))


@pytest.mark.skipif(not has_int8_kernel(), reason="needs a compute capability of 8.0")
@pytest.mark.parametrize(
    "rows, depth, width", [(4608, 3072, 21504), (4608, 15360, 3072), (17, 3072, 9216), (1, 96, 70)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_8_bit_rows_to_the_bit(rows, depth, width, biased):
    x, weight = (torch.randint(-128, 128, (many, depth), device="cuda").to(torch.int8) for many in (rows, width))
    scales, weight_scale = (torch.rand(many, 1, device="cuda") / 1000 for many in (rows, width))
    bias = random(width) if biased else None
    with torch.inference_mode():
        got = region(int8_product)(x, scales, weight, weight_scale, bias, torch.bfloat16)
        # Sums of products of 8 bits are exact in float64.
        product = (x.double() @ weight.double().t()).float()
        want = (product * (scales * weight_scale.t())).bfloat16()
        assert torch.equal(got, want if bias is None else want + bias)


def test_a_model_in_int8_is_as_it_is_eager():
    run = dict(size=(512, 512), tokens=64)
    model = quantize(load(2, 3, torch.bfloat16), "int8_dynamic")
    want = sample(model, **run)
    fast = compiled(model)
    got = sample(fast, **dict(run, steps=8))
    assert (sample(fast, **run) - want).norm() / want.norm() < 0.05 and got.isfinite().all()
    blocks = fast.get_wrappers("apply_model", "hotpath_compile")[0]
    assert blocks.replays.replayed.total() in (0, 5), "all or none, as the device waits or not"
