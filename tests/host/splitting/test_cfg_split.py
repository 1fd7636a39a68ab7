"""The host's own MultiGPU CFG Split behind Compile Repeated Blocks: right, and two graphs whatever the device. The
devices are imitated: to the host ``cpu`` and ``cpu:1`` are two, with a model and a thread each."""

import comfy.model_management
import comfy.multigpu
import comfy.sd
import pytest
import torch
from hotpath_pack.devtools import checkpoints
from sampling import Counting, Texts, assert_parity, compiled, compiled_blocks, sample

DEVICES = [torch.device("cpu"), torch.device("cpu", 1)]


@pytest.fixture
def filed(flux_weights, tmp_path, monkeypatch):
    """A tiny Flux from a file, which the host can load again, on a machine with two devices."""
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES)
    return comfy.sd.load_diffusion_model(str(checkpoints.save(tmp_path / "flux.safetensors", flux_weights)))


def over_devices(model):
    """``model`` as the host's node makes it, and the device and weights of each call of it."""
    made, calls = comfy.multigpu.create_multigpu_deepclones(model, 2), []

    def note(executor, *args, **kwargs):
        options = kwargs.get("transformer_options") or next(a for a in args if isinstance(a, dict) and "sigmas" in a)
        calls.append((options["multigpu_thread_device"], executor.class_obj))
        return executor(*args, **kwargs)

    made.add_wrapper_with_key("diffusion_model", "note", note)
    return made, calls


def test_both_halves_run_compiled_at_once_on_their_own_weights(filed):
    text = Texts()
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        fast, calls = over_devices(compiled(filed, text=text))
        for change in (dict(), dict(width=48, tokens=7)):
            assert_parity(filed, fast, cfg=3.0, **change)
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert [len([1 for device, _ in calls if device == each]) for each in DEVICES] == [4, 4]
    assert len({id(diffusion_model) for _, diffusion_model in calls}) == 2
    assert compiled_blocks(fast).compiled == {"double": 2, "single": 3} and compiled_blocks(fast).eager == {}
    assert text.last["state"] == "compiled"
    (other,) = fast.get_additional_models_with_key("multigpu")
    with torch.inference_mode():
        before = sample(fast, cfg=3.0)
        other.model.diffusion_model.single_blocks[0].linear1.weight.mul_(0.5)
    assert (sample(fast, cfg=3.0) - before).abs().max() > 1e-3, "one device ran the weights of the other"
