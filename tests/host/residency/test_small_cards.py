"""When memory ends: each node goes on as ComfyUI would without it, with the same image, and says so."""

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from comfy.quant_ops import get_layout_class
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.quantizing import formats
from hotpath_pack.host.residency import dynamic_vram, modulation, streaming
from hotpath_pack.host.residency.budget import Budget
from hotpath_pack.host.residency.offload import OffloadSettings, offload_repeated_blocks
from hotpath_pack.hotpath.stream import leaving_order
from sampling import SMALL, TOLERANCE, Texts, ahead_of, compiled, load, offloaded, quantized, sample, streamed_of

RUN = dict(SMALL, steps=3)


def fails_at(monkeypatch, owner, name, calls):
    """Memory ends in the given calls of ``name``; gives how often it was called."""
    made, original = [], getattr(owner, name)

    def failing(*args, **kwargs):
        made.append(None)
        if len(made) - 1 in calls:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return made


@pytest.mark.parametrize("layer", [0, 3, -1])
@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["eager", "compiled"])
def test_modulation_is_computed_in_place(flux, monkeypatch, layer, wrap):
    want = sample(flux, **RUN)
    layers = len(modulation.modulation_layers(flux.model.diffusion_model))
    lean = offloaded(flux)
    with monkeypatch.context() as patched:
        made = fails_at(patched, modulation, "_resident", {layer % layers})
        got = sample(wrap(lean), **RUN)
    assert len(made) == layer % layers + 1, "tried once a run"
    assert torch.equal(got, want) if wrap is not compiled else (got - want).abs().max() < TOLERANCE
    assert ahead_of(lean).in_place == {"the GPU has no memory left to make it ahead"}
    assert torch.equal(sample(lean, **RUN), want)
    assert not ahead_of(lean).in_place and ahead_of(lean).vectors == RUN["steps"] + 1, "the next prompt tries again"


def test_blocks_that_do_not_arrive_ahead_are_moved_by_the_host(flux, monkeypatch):
    want = sample(flux, **RUN)
    lean = offloaded(flux, budget="0 %")
    with monkeypatch.context() as patched:
        made = fails_at(patched, streaming, "_Run", {0})
        assert torch.equal(sample(lean, **RUN), want)
    assert len(made) == 1, "tried once a run"
    (said,) = streamed_of(lean).not_streamed
    assert said == "the GPU has no memory left for blocks that arrive ahead; set prefetch_blocks to 0"
    assert not streamed_of(lean).bytes_copied
    assert torch.equal(sample(lean, **RUN), want)
    assert streamed_of(lean).bytes_copied and not streamed_of(lean).not_streamed


@pytest.mark.parametrize("format", formats.FORMATS.values(), ids=list(formats.FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_quantized_some_rows_at_a_time_has_the_same_bits(monkeypatch, format, dtype):
    try:
        get_layout_class(format.layout)
    except KeyError:
        pytest.skip(f"this ComfyUI has no {format.layout}")
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = formats.QuantizedTensor.from_float(weight.float(), format.layout, **dict(format.options)).to(dtype)
    monkeypatch.setattr(formats, "AT_ONCE", 256 * 100)
    parts = format.quantize(weight, dtype)
    assert parts._params.orig_shape == whole._params.orig_shape and parts._params.orig_dtype == dtype
    assert torch.equal(parts._qdata.view(torch.uint8), whole._qdata.view(torch.uint8))
    assert torch.equal(parts._params.scale, whole._params.scale)


def test_a_layer_that_does_not_fit_is_quantized_in_ram(monkeypatch):
    tiny = checkpoints.flux1(1, 1)
    want = sample(quantized(load(dict(tiny)), "int8_weight_only"), **SMALL)
    made = fails_at(monkeypatch, formats.Format, "quantize", {2})
    assert torch.equal(sample(quantized(load(dict(tiny)), "int8_weight_only"), **SMALL), want)
    assert len(made) > 3


@pytest.mark.parametrize("budget", ["0 %", "auto"])
def test_weights_that_were_loaded_in_inference_mode_and_unloaded_outside_of_it(budget):
    """As ComfyUI does between prompts: PyTorch then has no version counter for them, and no view of them."""
    tiny = checkpoints.flux1(1, 2)
    want = sample(load(dict(tiny)), **RUN)
    with torch.inference_mode():
        model = load(dict(tiny))
    layers = streaming.streamable_layers(model.model.diffusion_model, False)
    for parameter in [
        parameter for block in layers.values() for layer in block.values() for parameter in layer.parameters()
    ]:
        parameter.data = parameter.data.clone()
    assert not parameter.is_inference()
    with pytest.raises(RuntimeError, match="version counter"):
        parameter.view(-1)
    assert modulation._version(parameter) is None
    for lean in (compiled(model), compiled(offloaded(model, "in place", budget=budget))):
        with torch.inference_mode():
            assert (sample(lean, **RUN) - want).abs().max() < TOLERANCE


class Vbar:
    """The host's memory of a MODEL as comfy-aimdo has it: what may be kept lies below the watermark. Nothing is given
    up below its limit, which this one can't be given."""

    max_size = 10**9

    def __init__(self, loaded=0):
        self.calls = []
        self.loaded = loaded

    def set_watermark(self, size):
        self.calls.append(("watermark", size))

    def prioritize(self):
        self.calls.append("all may come")

    def loaded_size(self):
        return self.loaded


@pytest.fixture
def dynamic(flux, monkeypatch):
    """A MODEL with dynamic VRAM, as the host makes it for a CUDA device; it can't be loaded here, nor pinned."""
    monkeypatch.setattr(ModelPatcherDynamic, "register_load_device", lambda self, device: None)
    yield ModelPatcherDynamic(flux.model, torch.device("cuda", 0), torch.device("cpu"))
    # Its clones have nothing to unpin.
    flux.model.dynamic_patchers.clear()


def test_a_budget_bounds_what_dynamic_vram_keeps_and_auto_leaves_it_to_the_host(dynamic):
    vbar = Vbar()
    dynamic.model.dynamic_vbars[dynamic.load_device] = vbar
    dynamic_vram.Kept(Budget()).limit(dynamic)
    assert vbar.calls == []
    dynamic_vram.Kept(Budget(share=0.5)).limit(dynamic)
    assert vbar.calls == [("watermark", dynamic.model_size() // 2)]
    del dynamic.model.dynamic_vbars[dynamic.load_device]
    dynamic_vram.Kept(Budget(share=0.5)).limit(dynamic)


def test_weights_that_were_given_up_come_back_once_their_memory_is_free(dynamic, monkeypatch):
    free = {"free": 0, "kept": 0}
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda device, torch_free_too: (free["free"], free["kept"])
    )
    reserved = comfy.model_management.extra_reserved_memory()
    vbar = dynamic.model.dynamic_vbars[dynamic.load_device] = Vbar(loaded=1000)
    kept = dynamic_vram.Kept(Budget(share=0.5))
    # In the first step nothing is missing, a page less is no loss, and then all is gone.
    for loaded in (1000, 950, 0):
        vbar.loaded = loaded
        kept.regain(dynamic)
    assert vbar.calls == []
    # What PyTorch keeps is for the next step's activations.
    free.update(free=2 * reserved + 2000, kept=reserved + 2000)
    kept.regain(dynamic)
    assert vbar.calls == []
    free["kept"] = 0
    kept.regain(dynamic)
    assert vbar.calls == ["all may come", ("watermark", dynamic.model_size() // 2)]
    vbar.loaded = 1000
    kept.regain(dynamic)
    assert len(vbar.calls) == 2
    # What streamed beside a budget is not given up when it goes.
    vbar.calls.clear()
    for share in (0, 0.25):
        streaming = dynamic_vram.Kept(Budget(share=share))
        for there in (0.75, share):
            vbar.loaded = int(there * dynamic.model_size())
            free["free"] = 2 * reserved + dynamic.model_size()
            streaming.regain(dynamic)
    assert vbar.calls == []
    del dynamic.model.dynamic_vbars[dynamic.load_device]
    kept.regain(dynamic)


@pytest.mark.parametrize("resident", ["spread", "first", "last"])
@pytest.mark.parametrize("ahead", [True, False])
def test_dynamic_vram_gives_weights_up_in_the_order_of_the_node(dynamic, resident, ahead):
    settings = OffloadSettings(resident=resident, modulation="ahead" if ahead else "in place")
    lean = offload_repeated_blocks(dynamic, settings, Texts())
    assert lean.is_dynamic() and type(dynamic) is ModelPatcherDynamic
    listed = sorted(lean._load_list(for_dynamic=True))
    assert sorted(map(dynamic_vram.name_of, listed)) == sorted(
        map(dynamic_vram.name_of, dynamic._load_list(for_dynamic=True))
    )
    names = [dynamic_vram.name_of(entry).removeprefix("diffusion_model.") for entry in listed]
    blocks = [
        [(path, comfy.model_management.module_size(layer)) for path, layer in layers.items()]
        for layers in streaming.streamable_layers(lean.model.diffusion_model, ahead).values()
    ]
    leaving = [
        blocks[block][layer][0]
        for block, layer in leaving_order([[size for _, size in layers] for layers in blocks], resident)
    ]
    made_ahead = modulation.modulation_layers(lean.model.diffusion_model) if ahead else {}
    assert set(names[len(names) - len(made_ahead) :]) == set(made_ahead)
    stays = names[: len(names) - len(made_ahead)]
    assert stays[len(stays) - len(leaving) :] == leaving[::-1]
    again = offload_repeated_blocks(lean, OffloadSettings(resident="first"), Texts())
    assert again.get_attachment(dynamic_vram.KEY) == ("first", True)
    assert (
        type(lean.clone()) is dynamic_vram.LaidOut
        and type(
            again.clone(
                disable_dynamic=True,
                model_override=(
                    lean.model,
                    (lean.backup, lean.backup_buffers, lean.object_patches_backup, lean.pinned),
                ),
            )
        )
        is ModelPatcher
    )
