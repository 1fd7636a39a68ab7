"""On a CUDA device: blocks replayed as CUDA graphs give the bits of the same regions unrecorded, whatever moves.

Run it also with ``PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync``, the allocator that the host takes by default.
"""

import gc
import random

import pytest
import torch
from hotpath_pack.devtools.checkpoints import flux1, lora
from hotpath_pack.devtools.gpu_host import compiled, load, offload, quantize, sample
from hotpath_pack.hotpath.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.gpu
GIB = 2**30
SIZES = ((256, 256), (512, 384))


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))


@pytest.fixture(autouse=True)
def no_recordings():
    yield
    from hotpath_pack.host.compiling import replay

    for recordings in replay._RECORDINGS.values():
        recordings.drop()
    gc.collect()


def both(model):
    """``model`` with the same regions unrecorded, and recorded wherever that is safe."""
    off, on = compiled(model, cache="auto", cuda_graphs="off"), compiled(model, cache="auto")
    replays_of(on).always = True
    return off, on


def replays_of(model):
    return model.get_wrappers("apply_model", "hotpath_compile")[0].replays


def unload():
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.unload_all_models()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic VRAM", "ordinary"])
@pytest.mark.parametrize("format", [None, "fp8_e4m3_rowwise", "int8_dynamic"])
def test_the_same_bits_whatever_moves_between(dynamic, format):
    """A random walk over models, LoRAs, sizes and branches, with memory moves forced between."""
    import comfy.model_management
    from comfy.sd import load_lora_for_models

    weights = {name: weight.cpu() for name, weight in lora(flux1(2, 3, hidden=512, device="cuda")).items()}
    models = []
    for _ in range(2):
        model = load(2, 3, torch.bfloat16, dynamic=dynamic, hidden=512)
        models.append(quantize(model, format) if format else model)
    pairs = [both(model) for model in models]
    pairs.append([load_lora_for_models(side, None, weights, 0.5, 0)[0] for side in pairs[0]])

    def unload_in_part(model):
        with torch.inference_mode():
            model.partially_unload(model.offload_device, model.model_size() // 2)

    moves = (
        lambda model: unload(),
        unload_in_part,
        lambda model: comfy.model_management.soft_empty_cache(),
        lambda model: replays_of(model).drop(),
        lambda model: None,
    )
    # The first run of all may differ from those after it, in the host itself.
    sample(pairs[0][0], SIZES[0], steps=1)
    choose, wants, replayed, counted = random.Random(0), {}, 0, 0
    for turn in range(24):
        number, size, cfg = choose.randrange(len(pairs)), choose.choice(SIZES), choose.choice((1.0, 3.0))
        off, on = pairs[number]
        run = dict(size=size, steps=4, cfg=cfg)
        patched = format is not None and number == 2
        if (number, size, cfg) not in wants:
            wants[number, size, cfg] = sample(off, **run)
        choose.choice(moves)(on)
        if patched:
            # The host itself computes otherwise in the step in which it adds a LoRA to quantized weights.
            sample(pairs[0][0], SIZES[0], steps=1)
        assert torch.equal(sample(on, **run), wants[number, size, cfg]), (turn, number, run)
        counted += not patched
        replayed += not patched and replays_of(on).replayed == {"double": 2, "single": 3}
    # Where the host left weights in RAM they are not recorded.
    assert replayed >= 0.75 * counted, replays_of(on).summary()


@pytest.mark.parametrize("format", ["fp8_e4m3_rowwise", "int8_dynamic"])
def test_a_lora_on_a_quantized_model_runs_as_the_same_recordings(format):
    """But in the step in which the host adds it, which is no compiled one; and nothing is compiled for it."""
    from comfy.sd import load_lora_for_models
    from torch._dynamo.utils import counters

    weights = {name: weight.cpu() for name, weight in lora(flux1(2, 3, hidden=512, device="cuda")).items()}
    model = quantize(load(2, 3, torch.bfloat16, hidden=512), format)
    off, on = both(model)
    sample(on, steps=4)
    graphs = counters["stats"]["unique_graphs"]
    for strength in (0.5, -1.0):
        plain, patched = [load_lora_for_models(side, None, weights, strength, 0)[0] for side in (off, on)]
        sample(plain, steps=1)
        want = sample(plain, steps=4)
        assert not torch.equal(want, sample(off, steps=4))
        sample(patched, steps=5)
        assert replays_of(on).replayed == {"double": 2, "single": 3}, replays_of(on).summary()
        assert torch.equal(sample(patched, steps=4), want), strength
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_step_takes_no_more_memory_and_gives_it_back():
    model = load(4, 8, torch.bfloat16, dynamic=False, hidden=2048)
    run = dict(size=(1024, 1024), tokens=512, steps=4)
    peaks = []
    for side in both(model):
        sample(side, **run)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        sample(side, **run)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        # Recordings keep memory between prompts, too, which is counted below; beside PyTorch the driver has some.
        peaks.append((allocated, reserved, reserved + total - free - torch.cuda.memory_reserved()))
    replays = replays_of(side)
    assert replays.replayed == {"double": 4, "single": 8}
    assert all(with_graphs <= without + 0.3 * GIB for without, with_graphs in zip(*peaks, strict=True)), peaks
    kept = replays.bytes
    assert 0 < kept < 1.5 * GIB
    unload()
    assert replays.bytes == 0


def test_streamed_weights_are_never_recorded():
    model = load(3, 4, torch.bfloat16, dynamic=False, hidden=512)
    off, on = both(offload(model, budget="30 %"))
    sample(off)
    want = sample(off, steps=4)
    assert torch.equal(sample(on, steps=4), want)
    from hotpath_pack.host.compiling.replay import STREAMED

    assert STREAMED in replays_of(on).why_not


@pytest.mark.parametrize("fault", ["synchronizes", "interrupted", "out of memory"])
def test_a_recording_that_fails_leaves_the_device_as_it_was(fault):
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = CudaGraphs(device)
    x, weights = torch.ones(1024, device=device), {"w": torch.full((1024,), 2.0, device=device)}

    def fails(weights):
        y = x * weights["w"]
        if fault == "synchronizes":
            y.sum().item()
        if fault == "interrupted":
            raise KeyboardInterrupt
        if fault == "out of memory":
            raise torch.OutOfMemoryError("no")

    for _ in range(2):
        with pytest.raises(BaseException) as raised:
            recorder.record(fails, weights)
        assert not isinstance(raised.value, AssertionError)
    assert torch.equal(x * 3, torch.full_like(x, 3))
    recording = recorder.record(lambda weights: x.mul_(weights["w"]), weights)
    assert x[0] == 1
    recording.replay()
    weights["w"].fill_(3)
    recording.replay()
    assert x[0] == 6
    recording.reset()


def test_matrix_products_keep_their_workspace_in_the_recording():
    """Whoever frees cuBLAS's workspaces between, as PyTorch's own CUDA graphs do, takes nothing from a recording."""
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = CudaGraphs(device)
    a, b = (torch.randn(96, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(96, 96, device=device, dtype=torch.bfloat16)
    want = a @ b.t()
    recording = recorder.record(lambda weights: out.copy_(a @ weights["b"].t()), {"b": b})
    for _ in range(3):
        torch._C._cuda_clearCublasWorkspaces()
        sentinels = [torch.zeros(2**20, device=device) for _ in range(64)]
        recording.replay()
        assert torch.equal(out, want) and all(not sentinel.any() for sentinel in sentinels)
