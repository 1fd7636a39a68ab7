"""Tokens shared out over devices: what one device gives, whatever the sizes, and one device with the reason where it
can't be. The devices are imitated: to the host ``cpu``, ``cpu:1`` and ``cpu:2`` are three, with a model each."""

import types

import comfy.model_management
import comfy.multigpu
import comfy.sd
import pytest
import torch
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints, patches
from hotpath_pack.devtools.reruns import Reruns, forwards_in_fibers, of_each_device
from hotpath_pack.host.compiling import replay
from hotpath_pack.hotpath import exchange, graphs
from hotpath_pack.hotpath.internals import memory
from hotpath_pack.hotpath.recorded import Recordings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sampling import Counting, Texts, assert_parity, compiled, compiled_blocks, sample
from shared_out import DEVICES, assert_shared, blocks_of, other_copy, quantized, split

pytestmark = pytest.mark.usefixtures("devices")


@pytest.fixture(scope="module", params=["flux1", "flux2", pytest.param("chroma", marks=pytest.mark.sweep)])
def family(request, file):
    return request.param, comfy.sd.load_diffusion_model(file(request.param))


@given(
    width=st.integers(2, 7),
    height=st.integers(2, 6),
    tokens=st.integers(6, 19),
    batch=st.integers(1, 3),
    all=st.booleans(),
)
@settings(max_examples=2, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size_text_and_batch_is_what_one_device_gives(family, width, height, tokens, batch, all):
    (name, model), text = family, Texts()
    two = split(model, "all" if all else "1", text)
    unit = 32 if name == "flux2" else 16
    assert_parity(model, two, width=width * unit, height=height * unit, tokens=tokens, batch=batch, steps=1)
    assert_shared(two, 1)
    assert text.last["state"] == "done" and text.seen[-1].startswith("tokens shared out over cpu, cpu:1")


def test_masks_references_and_control_of_uneven_counts(filed):
    two = split(filed, "all")
    reference = dict(reference_latents=[torch.randn(1, 16, 6, 10)], reference_latents_method="index")
    assert_parity(filed, two, width=80, tokens=7, **reference)
    assert_shared(two)
    for rows in (1, 16 + 9):
        mask = torch.randn(1, rows, 16 + 9)
        assert (
            sample(filed, tokens=9, attention_mask=mask, attention_mask_img_shape=(4, 4)) - sample(filed, tokens=9)
        ).abs().max() > 1e-3
        assert_parity(filed, two, tokens=9, attention_mask=mask, attention_mask_img_shape=(4, 4))
        assert_shared(two)
    patches.controlnet_residuals(filed, 0.4)
    controlled = split(filed)
    assert_parity(filed, controlled, tokens=9)
    assert_shared(controlled)


def test_compiled_it_is_two_graphs_whatever_the_device_size_text_or_lora(filed, flux_weights):
    two = split(filed, "all")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        fast = compiled(two)
        for change in (dict(), dict(width=48), dict(tokens=11)):
            assert_parity(filed, fast, **change)
            assert_shared(fast)
        patched, _ = load_lora_for_models(fast, None, checkpoints.lora(flux_weights), 1.0, 0)
        want, _ = load_lora_for_models(filed, None, checkpoints.lora(flux_weights), 1.0, 0)
        assert_parity(want, patched)
        assert (sample(want) - sample(filed)).abs().max() > 0.01
        assert_shared(patched)
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert compiled_blocks(fast).eager == {} and compiled_blocks(fast).compiled == {"double": 2, "single": 3}


@pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")
@pytest.mark.parametrize("both", [True, False], ids=["both", "one"])
def test_replayed_blocks_meet_as_often_as_others(filed, monkeypatch, both):
    """Where one device records and the other does not, too, and what is only compared meets nobody."""
    recorders = [Reruns(waits=False), Reruns(waits=False)]
    room = [True, both]
    recordings = [Recordings(each, lambda size, place=place: room[place]) for place, each in enumerate(recorders)]
    monkeypatch.setattr(replay, "recordings_on", of_each_device(recordings))
    fast = compiled(split(filed), backend="inductor")
    for change in (dict(steps=4), dict(width=48, steps=4), dict(tokens=11, steps=3), dict(steps=2)):
        assert_parity(filed, fast, **change)
        assert_shared(fast, change["steps"])
    assert [each.recorded > 0 for each in recorders] == [True, both]
    room[1] = True
    recordings[1].retry()
    assert_parity(filed, fast, steps=7)
    assert_shared(fast, 7)
    assert min(each.replays for each in recorders) >= 5
    assert compiled_blocks(fast).eager == {}


class _Torch:
    """``torch`` as Inductor's code sees it, whose operators that wait for others are plain functions, as they are
    between the pieces of a recording."""

    def __init__(self):
        self.ops = types.SimpleNamespace(aten=torch.ops.aten, hotpath=types.SimpleNamespace())
        for name in ("give", "take"):
            setattr(self.ops.hotpath, name, types.SimpleNamespace(default=getattr(self, f"_{name}")))

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def _give(mine, others):
        exchange.give(mine, mine.new_empty(others, *mine.shape[1:]))

    @staticmethod
    def _take(mine, others, after):
        meeting, place = exchange._at(mine)
        return meeting.take(place)


@pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")
def test_blocks_without_operators_that_wait_run_on_one_thread(filed, monkeypatch):
    """As those that were all recorded do; and threads come back for what was not."""
    ran = forwards_in_fibers(monkeypatch)
    # What could be recorded is compiled ahead, and none is.
    recordings = Recordings(Reruns(waits=False), lambda size: False)
    monkeypatch.setattr(replay, "recordings_on", lambda device: recordings)
    fast = compiled(split(filed), backend="inductor")
    changes = dict(steps=4), dict(width=48, steps=2), dict(batch=2, steps=3)
    for change in changes:
        assert_parity(filed, fast, **change)
    assert len(ran) == 9 and not any(ran)
    with monkeypatch.context() as recorded:
        for code in list(memory._code.values()):
            recorded.setitem(code, "torch", _Torch())
        for number, change in enumerate(changes):
            ran.clear()
            assert_parity(filed, fast, **change)
            assert_shared(fast, change["steps"])
            # A run has a crew of its own, which goes on as the one before.
            assert ran == [number > 0] + [True] * (change["steps"] - 1)
    ran.clear()
    assert_parity(filed, fast, steps=2)
    assert_shared(fast, 2)
    assert not any(ran), "nothing was recorded any more"
    assert compiled_blocks(fast).eager == {}


def test_after_quantizing_each_device_has_quantized_blocks(filed):
    model = quantized(filed)
    two = split(model)
    layers = [each.single_blocks[0].linear1 for each in (model.model.diffusion_model, other_copy(two))]
    assert layers[0].quant_format == layers[1].quant_format
    assert_parity(model, compiled(two))
    assert_shared(two)


def without_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize("where", ["img_in", "single_blocks.1", "final_layer"])
def test_a_device_that_fails_ends_in_the_image_of_one_with_the_reason(filed, where):
    text = Texts()
    two = split(filed, "all", text)
    want = sample(filed, steps=3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(other_copy(two).get_submodule(where), "forward", without_memory)
        got = sample(two, steps=3)
        assert torch.equal(want, got), "one device's to the bit"
    assert (blocks_of(two).steps, blocks_of(two).why_not) == (0, "cpu:2 failed: no memory left")
    assert text.last["state"] == "one_device" and text.seen[-1] == "on one device: cpu:2 failed: no memory left"
    assert_parity(filed, two)
    assert_shared(two)


def test_an_interrupt_that_another_device_sees_ends_the_prompt(filed):
    two = split(filed)

    def interrupted(*args, **kwargs):
        raise comfy.model_management.InterruptProcessingException

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(other_copy(two).final_layer, "forward", interrupted)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(two)
    assert_parity(filed, two)


def test_no_memory_for_the_copies_ends_in_the_image_of_one_device(filed, monkeypatch):
    two, load_models = split(filed), comfy.model_management.load_models_gpu

    def limited(models, *args, **kwargs):
        if any(model.load_device.index for model in models):
            raise torch.OutOfMemoryError("no memory left")
        return load_models(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", limited)
    assert torch.equal(sample(filed), sample(two))
    assert "failed: no memory left" in blocks_of(two).why_not
    monkeypatch.undo()
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES)
    assert_parity(filed, two)
    assert_shared(two)


def test_copies_are_loaded_once_and_go_with_their_model(filed):
    first, second = split(filed), split(filed)
    assert other_copy(first) is other_copy(second)
    sample(first)
    sample(second)
    assert other_copy(first) is other_copy(second) is not filed.model.diffusion_model
