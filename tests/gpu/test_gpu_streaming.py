"""On a CUDA device: streamed blocks give the same bits, arrive while others compute, and keep to the budget."""

from statistics import median

import pytest
import torch
from hotpath_pack.devtools.checkpoints import flux1, lora
from hotpath_pack.devtools.gpu_host import (
    compiled,
    load,
    milliseconds,
    offload,
    predict_streaming,
    quantize,
    sample,
    time_steps,
)
from hotpath_pack.hotpath.counters import breaks_so_far, graphs_so_far
from hotpath_pack.hotpath.stream import Stream, StreamCopies

pytestmark = pytest.mark.gpu
RUN = dict(size=(512, 512), tokens=64, steps=3)
BUDGETS = ("0 %", "30 %", "60 %")


def streamed_of(model):
    return model.get_wrappers("apply_model", "hotpath_offload")[0]


@pytest.mark.parametrize("format", [None, "fp8_e4m3_rowwise"])
@pytest.mark.parametrize("pin_memory", [True, False], ids=["pinned", "not pinned"])
def test_the_same_bits_at_every_budget_and_two_graphs(format, pin_memory):
    model = load(3, 4, torch.bfloat16, dynamic=False, hidden=2048)
    if format is not None:
        model = quantize(model, format)
    # The first run of all may differ from those after it, in the host itself.
    sample(model, **RUN)
    want = sample(model, **RUN)
    before = graphs_so_far(), breaks_so_far()
    for budget in BUDGETS:
        lean = offload(model, budget=budget, pin_memory=pin_memory)
        assert torch.equal(sample(lean, **RUN), want)
        assert streamed_of(lean).bytes_copied and not streamed_of(lean).not_streamed
        fast = sample(compiled(lean), **RUN)
        assert (fast - want).norm() / want.norm() < (0.02 if format is None else 0.2)
    assert graphs_so_far() <= before[0] + 2 and breaks_so_far() == before[1]


def test_a_lora_is_applied_on_arrival():
    from comfy.sd import load_lora_for_models

    model = load(3, 4, torch.float32, dynamic=False, hidden=512)
    weights = lora(flux1(3, 4, hidden=512, device="cuda"))
    weights = {name: weight.cpu() for name, weight in weights.items()}
    patched = load_lora_for_models(model, None, weights, 0.5, 0)[0]
    want = sample(patched, **RUN)
    assert (want - sample(model, **RUN)).norm() > 0
    for lean in (offload(patched, budget="0 %"), compiled(offload(patched, budget="0 %"))):
        # What stays on the device the host patches in fp16.
        assert (sample(lean, **RUN) - want).norm() / want.norm() < 1e-3


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic VRAM", "ordinary"])
def test_the_budget_bounds_what_is_on_the_device(dynamic):
    import comfy.model_management

    model = load(6, 12, torch.bfloat16, dynamic=dynamic, hidden=2048)
    want = sample(model, **RUN)
    whole = model.model_size()
    for share in (60, 30):
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        lean = offload(model, budget=f"{share} %")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert torch.equal(sample(lean, **RUN), want)
        # Dynamic VRAM comes in pages, with pages pinned by the block that computes.
        assert lean.loaded_size() <= whole * share / 100 + (2**27 if dynamic else 0)
        if not dynamic:
            slots = 2 * max(lean._block_sizes().values())
            activations = 2**28
            assert torch.cuda.max_memory_allocated() - before <= whole * share / 100 + slots * 1.01 + activations
    assert torch.equal(sample(model, **RUN), want)


def test_a_step_is_slower_than_with_all_resident_by_what_the_model_of_the_bus_predicts():
    run = dict(size=(1024, 1024), tokens=512)
    model = load(4, 8, torch.bfloat16, dynamic=False, hidden=3072)
    resident = compiled(offload(model))
    sample(resident, **run)
    alone = median(time_steps(resident, **run, steps=8)[1][2:])
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    bandwidth = pinned.nbytes / milliseconds(lambda: target.copy_(pinned, non_blocking=True))
    for budget in ("60 %", "0 %"):
        lean = compiled(offload(model, budget=budget))
        sample(lean, **run)
        measured = median(time_steps(lean, **run, steps=8)[1][2:])
        streamed, predicted = predict_streaming(lean, alone, bandwidth)
        assert streamed and measured < 1.15 * predicted, f"{budget}: {measured:.1f} ms, predicted {predicted:.1f} ms"


class Timed(StreamCopies):
    """Copies with an event at the start of each."""

    def __init__(self, device):
        super().__init__(device)
        self.times = []

    def copy(self, sources, targets, after):
        if after is not None:
            self._side.wait_event(after)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self._side)
        arrival = super().copy(sources, targets, after)
        end.record(self._side)
        self.times.append((start, end))
        return arrival


def test_copies_run_while_blocks_compute():
    device = torch.device("cuda")
    engine = Timed(device)
    size, blocks = 2**28, 8
    sources = [torch.full((size,), block, dtype=torch.uint8, pin_memory=True) for block in range(2)]
    stream = Stream(engine, device, size, range(blocks), 1, lambda block: [(sources[block % 2], 0)])
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    computes = []
    for _ in range(2):
        for block in range(blocks):
            with stream.present(block) as slot:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                for _ in range(8):
                    matrix @ matrix
                assert stream.slots[slot][:4].tolist() == [block % 2] * 4 if block == 5 else True
                end.record()
                computes.append((start, end))
    torch.cuda.synchronize()
    copied = median(start.elapsed_time(end) for start, end in engine.times)
    computed = median(start.elapsed_time(end) for start, end in computes)
    whole = computes[blocks][0].elapsed_time(computes[-1][1]) / (blocks - 1)
    assert whole < 1.25 * max(copied, computed) < copied + computed


def test_dynamic_vram_brings_the_next_block_while_one_computes():
    import comfy.model_management

    model = load(4, 8, torch.bfloat16, hidden=2048)
    run = dict(size=(1024, 1024), tokens=512)
    want = sample(model, **run, steps=2)
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    fast = compiled(offload(model, budget="0 %"))
    assert (sample(fast, **run, steps=2) - want).norm() / want.norm() < 0.02
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        sample(fast, **run, steps=3)
        torch.cuda.synchronize()
    spans = [
        (event.name().startswith("Memcpy HtoD"), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.profiler.DeviceType.CUDA and event.duration_ns() > 50_000
    ]
    copies = [span for span in spans if span[0]]
    computes = [span for span in spans if not span[0]]
    both = sum(
        max(0, min(end, copied) - max(start, began)) for _, start, end in computes for _, began, copied in copies
    )
    # Other processes on the card draw out either.
    shorter = min(sum(end - start for _, start, end in some) for some in (copies, computes))
    assert both > 0.7 * shorter
