"""On a CUDA device: kernels of this pack beside the formulas that they stand for."""

import pytest
import torch
from hotpath_pack.devtools.gpu_host import compiled, computed, load, quantize, sample
from hotpath_pack.devtools.measure import snr
from hotpath_pack.hotpath.counters import graphs_so_far
from hotpath_pack.hotpath.gelu import gelu_of_linear, logistic_gelu
from hotpath_pack.hotpath.inductor import region_options
from hotpath_pack.hotpath.rotary import has_kernel, norm_rotate, norm_rotate_joint
from hotpath_pack.hotpath.rowwise import has_int8_kernel, int8_product

EPS = torch.finfo(torch.float32).eps
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_kernel(), reason="needs Triton")]


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def exact(run, *tensors):
    return run(
        *([x.double().cpu() for x in each] if isinstance(each, list) else each.double().cpu() for each in tensors)
    )


def region(function):
    return torch.compile(function, fullgraph=True, options=region_options("default", probe=False))


@pytest.mark.parametrize("tokens, heads, dim", [(4608, 24, 128), (77, 5, 64)])
def test_norm_and_rotary_embedding_in_a_graph(tokens, heads, dim):
    packed, scale = random(1, tokens, 3 * heads * dim + 64), 1 + 0.1 * random(dim)
    table = torch.randn(1, 1, tokens, dim // 2, 2, 2, device="cuda")
    q, k, v = packed[..., : 3 * heads * dim].unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    with torch.inference_mode():
        got = region(lambda *given: norm_rotate(*given, EPS))(q, k, scale, scale, table)
        want = exact(lambda *given: norm_rotate(*given, EPS), q, k, scale, scale, table)
        for one, other in zip(got, want, strict=True):
            assert snr(other, one.double().cpu()) > 50
        streams = [[x[:, :, :20], x[:, :, 20:]] for x in (q, k, v)]
        joined = region(lambda *given: norm_rotate_joint(*given, EPS))(*streams, [scale] * 2, [scale] * 2, table)
        for one, other in zip(joined, (*got, v), strict=True):
            assert torch.equal(one, other)


def test_gelu_in_the_epilogue_of_a_product_is_closer_than_after_it():
    x, weight, bias = random(2, 300, 256), random(512, 256) / 16, random(512)
    with torch.inference_mode():
        want = exact(lambda *given: logistic_gelu(torch.nn.functional.linear(*given)), x, weight, bias)
        after = logistic_gelu(torch.nn.functional.linear(x, weight, bias))
        within = region(gelu_of_linear)(x, weight, bias)
    assert snr(want, within.double().cpu()) > max(50, snr(want, after.double().cpu()) - 0.1)


def test_blocks_in_fewer_passes_are_as_close_to_eager():
    run = dict(size=(512, 512), tokens=64)
    model = load(2, 3, torch.bfloat16)
    want = sample(model, **run)
    written = sample(compiled(model), **run)
    graphs = graphs_so_far()
    fused = sample(computed(compiled(model), "bind_fused"), **run)
    assert graphs_so_far() == graphs + 2, "not the same code again"
    assert (fused - want).norm() < 1.3 * (written - want).norm()


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
