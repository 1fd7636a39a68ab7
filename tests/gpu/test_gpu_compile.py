"""On a CUDA device, with the host's dynamic VRAM: parity, counts, and memory while compiling."""

import functools

import pytest
import torch
from hotpath_pack.devtools.checkpoints import flux1, lora
from hotpath_pack.devtools.gpu_host import compiled, load, quantize, sample
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


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic VRAM", "ordinary"])
def test_a_step_is_issued_without_waiting_for_the_device(dynamic):
    model = load(2, 3, torch.bfloat16, dynamic=dynamic)
    fast = compiled(model)
    sample(fast)

    def unwaiting(apply_model, args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return apply_model(args["input"], args["timestep"], **args["c"])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    fast.set_model_unet_function_wrapper(unwaiting)
    assert (sample(fast, steps=3) - sample(model, steps=3)).norm() / sample(model, steps=3).norm() < 0.02


@pytest.mark.parametrize("format", ["float8_e4m3fn", "int8_tensorwise"])
def test_quantized_checkpoints_run_as_two_graphs_as_the_host_computes_them(format, monkeypatch):
    from hotpath_pack.host.families import flux

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
    if format == "int8_tensorwise":
        # The host's kernel divides by the scale in float32, its layout on a CPU and ours in the dtype of activations.
        return
    # cuDNN's attention and the traced rotary embedding round in another order than the host's.
    as_the_host = functools.partial(flux._arguments, options={})
    for bind in ("bind_traced", "bind_cudnn"):
        monkeypatch.setattr(flux, bind, as_the_host)
    same_operations = sample(compiled(model, backend="eager"), **run)
    assert (same_operations - eager).norm() / eager.norm() < rounding


@pytest.mark.parametrize("format", ["int8_dynamic", "fp8_e4m3_rowwise", "fp8_e4m3", "int8_weight_only"])
def test_a_loaded_model_quantized_with_a_lora_on_it(format):
    from comfy.sd import load_lora_for_models

    run = dict(size=(512, 512), tokens=64)
    weights = flux1(2, 3, dtype=torch.bfloat16)
    plain = load(2, 3, torch.bfloat16)
    for strength in (0.0, 0.5):
        full = load_lora_for_models(plain, None, lora(weights), strength, 0)[0] if strength else plain
        want, small = sample(full, **run), quantize(full, format)
        eager, before = sample(small, **run), (graphs_so_far(), breaks_so_far())
        noise = (eager - want).norm() / want.norm()
        assert 1e-3 < noise < 0.2
        fast = compiled(small)
        for _ in range(2):
            got = sample(fast, **run)
            # Both round to the next step now and then; neither is further from full precision than the other.
            assert (got - want).norm() / want.norm() < 1.25 * noise
        (wrapper,) = fast.get_wrappers("apply_model", "hotpath_compile")
        assert wrapper.eager == {} and graphs_so_far() <= before[0] + 2 and breaks_so_far() == before[1]


def test_quantizing_takes_the_memory_of_a_layer():
    hidden = 2048
    model = load(4, 8, torch.bfloat16, hidden=hidden)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize(model, "fp8_e4m3_rowwise")
    # The largest in bf16, in fp8 by rows and joined, and some rows: less than its copy in float32 and the result.
    layer = 7 * hidden * hidden
    assert torch.cuda.max_memory_allocated() - before <= layer * (4 + 1)


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
