"""On a CUDA device: modulation ahead of time is the same to the bit, and its weights are not there while sampling."""

import pytest
import torch
from hotpath_pack.devtools.checkpoints import flux1, lora
from hotpath_pack.devtools.gpu_host import calling, compiled, load, offload, quantize, sample
from hotpath_pack.hotpath.counters import breaks_so_far, graphs_so_far

pytestmark = pytest.mark.gpu
RUN = dict(size=(512, 512), tokens=64, steps=3)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic VRAM", "ordinary"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("format", [None, "fp8_e4m3_rowwise"])
def test_the_same_bits_with_a_quarter_less_on_the_device(dynamic, patched, format):
    import comfy.model_management
    from comfy.sd import load_lora_for_models
    from hotpath_pack.host.residency.modulation import modulation_layers

    model = load(3, 4, torch.bfloat16, dynamic=dynamic, hidden=2048)
    assert model.is_dynamic() == dynamic
    if format is not None:
        model = quantize(model, format)
    if patched:
        weights = lora(flux1(3, 4, hidden=2048, dtype=torch.bfloat16, device="cuda"))
        model = load_lora_for_models(model, None, {name: weight.cpu() for name, weight in weights.items()}, 0.5, 0)[0]
    # The step in which the host adds a LoRA may round otherwise than all that follow.
    for _ in range(2):
        want = sample(model, **RUN)
        whole = model.loaded_size()
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
    ahead = offload(model)
    assert torch.equal(sample(ahead, **RUN), want)
    _, wrapper = ahead.get_wrappers("apply_model", "hotpath_offload")
    if dynamic and patched and format is not None:
        assert wrapper.in_place == {"a LoRA on quantized modulation layers"}
        return
    assert wrapper.vectors == RUN["steps"] + 1 and not wrapper.in_place
    layers = modulation_layers(model.model.diffusion_model).values()
    share = sum(comfy.model_management.module_size(layer) for layer in layers)
    # Dynamic VRAM comes in pages.
    assert ahead.loaded_size() <= whole - share + 2**27
    before = graphs_so_far(), breaks_so_far()
    fast = sample(compiled(ahead), **RUN)
    assert (fast - want).norm() / want.norm() < (0.02 if format is None else 0.2)
    assert graphs_so_far() <= before[0] + 2 and breaks_so_far() == before[1]


def test_weights_that_were_given_up_in_mid_run_come_back():
    run = dict(RUN, steps=6)
    lean = offload(load(3, 4, torch.bfloat16, hidden=2048))
    want, whole, there = sample(lean, **run), lean.loaded_size(), []

    def around(call):
        out = call()
        there.append(lean.loaded_size())
        if len(there) == 2:
            # As when another program asks for the card's memory, and returns it.
            lean._vbar_get().free_memory(2**62)
        return out

    assert torch.equal(sample(calling(lean, around), **run), want)
    assert there[1] == whole and there[2] < whole / 2 and there[3:] == [whole] * 3
