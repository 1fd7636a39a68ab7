"""On a CUDA device, with the host's dynamic VRAM: parity, counts, and memory while compiling."""

import pytest
import torch
from hotpath_pack.devtools.gpu_host import compiled, load, sample
from hotpath_pack.hotpath.counters import breaks_so_far, graphs_so_far

GIB = 2**30
pytestmark = pytest.mark.gpu


def test_two_graphs_whatever_the_size_and_what_eager_gives():
    model = load(2, 3, torch.float32)
    fast, before = compiled(model), (graphs_so_far(), breaks_so_far())
    for run in (dict(), dict(size=(320, 320)), dict(tokens=77), dict(size=(512, 512), steps=4)):
        want = sample(model, **run)
        assert want.std() > 0.1
        assert (sample(fast, **run) - want).abs().max() <= 1e-4
    assert (graphs_so_far(), breaks_so_far()) == (before[0] + 2, before[1])


@pytest.mark.parametrize("format", ["float8_e4m3fn", "int8_tensorwise"])
def test_quantized_checkpoints_run_as_two_graphs_as_the_host_computes_them(format):
    run = dict(size=(512, 512), tokens=64)
    plain = load(2, 3, torch.bfloat16)
    want = sample(plain, **run)
    rounding = (sample(compiled(plain), **run) - want).norm() / want.norm()
    model = load(2, 3, torch.bfloat16, format)
    eager, before = sample(model, **run), (graphs_so_far(), breaks_so_far())
    fast = compiled(model)
    for _ in range(2):
        # What rounds to bf16 in another order now and then quantizes to the next step, which in fp8 is a sixteenth.
        assert (sample(fast, **run) - eager).norm() / eager.norm() < 10 * rounding < 0.1
    (wrapper,) = fast.get_wrappers("apply_model", "hotpath_compile")
    assert wrapper.eager == {} and (graphs_so_far(), breaks_so_far()) == (before[0] + 2, before[1])
    same_operations = sample(compiled(model, backend="eager"), **run)
    assert (same_operations - eager).norm() / eager.norm() < rounding


def test_the_step_that_compiles_takes_a_block_more_than_an_eager_step():
    hidden = 2048
    model = load(4, 8, torch.bfloat16, hidden=hidden)
    run = dict(size=(1024, 1024), tokens=512, steps=1)
    sample(model, **run)
    peaks = []
    for side in (model, compiled(model)):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        sample(side, **run)
        peaks.append(torch.cuda.max_memory_allocated())
    weights = 36 * hidden**2 * 2
    activations = (4096 + 512) * hidden * 12 * 2
    assert peaks[1] <= peaks[0] + weights + activations, [f"{peak / GIB:.2f} GiB" for peak in peaks]
