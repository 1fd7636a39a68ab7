"""What can't be shared out over devices runs on one, with the reason; so does what another node changes."""

import comfy.model_management
import comfy.multigpu
import comfy.sd
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.sd import load_bypass_lora_for_models
from hotpath_pack.devtools import checkpoints, patches
from hotpath_pack.host.residency.offload import OffloadSettings, offload_repeated_blocks
from sampling import Texts, assert_parity, compiled, sample
from shared_out import SILENT, blocks_of, quantized, split
from torch import autocast
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.usefixtures("devices")


def with_bypass(model):
    weights = checkpoints.lora(checkpoints.flux1(2, 3))
    return load_bypass_lora_for_models(model, None, weights, 1.0, 0)[0]


def with_own_forward(model):
    diffusion_model = model.model.diffusion_model
    diffusion_model.forward_orig = lambda *args, **kwargs: Flux.forward_orig(diffusion_model, *args, **kwargs) * 0.5
    return model


def with_patch(name):
    def put(model):
        clone = model.clone()
        getattr(patches, name)(clone, 0.3)
        return clone

    return put


def with_blocks_of_its_own(model):
    """As a step cache does: other lists of blocks while the model runs."""

    def wrapper(executor, *args, **kwargs):
        inner = executor.class_obj
        blocks, inner.double_blocks = inner.double_blocks, torch.nn.ModuleList(list(inner.double_blocks)[:1])
        try:
            return executor(*args, **kwargs)
        finally:
            inner.double_blocks = blocks

    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "cache", wrapper)
    return clone


def with_hook(model):
    layer = model.model.diffusion_model.double_blocks[1].img_mlp[2]
    # The same weights may come here twice.
    if not layer._forward_hooks:
        layer.register_forward_hook(lambda module, inputs, out: out * 0.5)
    return model


def with_layer_of_its_own(model):
    layer = model.model.diffusion_model.txt_in
    layer.forward = lambda x: type(layer).forward(layer, x) * 0.5
    return model


def with_another_theta(model):
    model.model.diffusion_model.pe_embedder.theta = 500
    return model


def with_another_eps(model):
    model.model.diffusion_model.single_blocks[1].pre_norm.eps = 0.5
    return model


def with_what_changes_in_mid_run(model):
    """A node that changes what a layer computes by before the second of three steps."""
    steps = []

    def wrapper(executor, *args, **kwargs):
        steps.append(None)
        model.model.diffusion_model.double_blocks[0].img_norm1.eps = 0.5 if len(steps) % 3 == 2 else 1e-6
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "changes", wrapper)
    return clone


@torch.inference_mode()
def with_a_weight_in_place(model):
    weight = model.model.diffusion_model.single_blocks[2].linear2.weight
    # The same weights may come here twice.
    weight.copy_(weight.sign() * 0.01)
    return model


def with_a_method_of_its_own(model):
    layer = model.model.diffusion_model.single_blocks[0].linear1
    layer.forward_comfy_cast_weights = lambda x: type(layer).forward_comfy_cast_weights(layer, x)
    return model


def with_other_axes(model):
    model.model.diffusion_model.pe_embedder.axes_dim = [56, 56, 16]
    return model


def without_guidance(model):
    model.model.diffusion_model.params.guidance_embed = False
    return model


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def around(scope):
    def with_scope(model):
        def wrapper(executor, *args, **kwargs):
            with scope():
                return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key("diffusion_model", "scope", wrapper)
        return clone

    return with_scope


REFUSED = {
    "a patch of another node": with_patch("attn1_patch"),
    "attention of its own": with_patch("attention_override"),
    "reads the tokens of the whole image": with_patch("patches_replace"),
    "other blocks in place": with_blocks_of_its_own,
    "replaces forward_orig": with_own_forward,
    "hooks into double_blocks.1.img_mlp.2": with_hook,
    "changed pe_embedder": with_another_theta,
    "changed single_blocks.1.pre_norm": with_another_eps,
    "changed single_blocks.2.linear2.weight in place": with_a_weight_in_place,
    "hooks into txt_in or replaces its forward": with_layer_of_its_own,
    "changed pe_embedder, which": with_other_axes,
    "changed the model": without_guidance,
    "changed single_blocks.0.linear1": with_a_method_of_its_own,
    "around every module or function": around(lambda: autocast("cpu", torch.bfloat16)),
    "every module or function of this thread": around(Mode),
    "as a bypass LoRA": with_bypass,
    "Offload Repeated Blocks": lambda model: offload_repeated_blocks(model, OffloadSettings(budget="0 %"), SILENT),
    "MultiGPU CFG Split": lambda model: comfy.multigpu.create_multigpu_deepclones(model, 2),
    "after Quantize Repeated Blocks": quantized,
    "fullgraph off": lambda model: compiled(model, "none", "0", fullgraph=False),
    "too few to be shared out": lambda model: model,
    "timestep zero": lambda model: model,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cant_be_shared_out_runs_on_one_device_with_the_reason(filed, file, reason):
    text, run = Texts(), dict(tokens=3) if "too few" in reason else {}
    if reason == "timestep zero":
        filed = comfy.sd.load_diffusion_model(file("flux2"))
        run = dict(reference_latents=[torch.randn(1, 128, 8, 6)], reference_latents_method="index_timestep_zero")
    changed = REFUSED[reason](filed)
    two = REFUSED[reason](split(filed, text=text))
    assert_parity(changed, two, **run)
    assert blocks_of(two).steps == 0
    assert (
        text.last["state"] == "one_device" and text.seen[-1].startswith("on one device: ") and reason in text.seen[-1]
    )


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["eager", "compiled"])
def test_what_is_changed_in_mid_run_is_changed_on_one_device(filed, wrap):
    text = Texts()
    two = wrap(with_what_changes_in_mid_run(split(filed, text=text)))
    assert_parity(with_what_changes_in_mid_run(filed), two, steps=3)
    assert blocks_of(two).steps == 2
    (said,) = [seen for seen in text.seen if seen.startswith("on one device")]
    assert "another node changed double_blocks.0.img_norm1 in mid-run" in said


def test_one_device_is_the_identity_and_says_so(filed):
    text = Texts()
    one = split(filed, "0", text)
    assert text.seen == ["one device (cpu): nothing is shared out"]
    assert not one.wrappers and not one.additional_models and torch.equal(sample(filed), sample(one))
    again = split(split(filed), "0")
    assert not again.get_wrappers("apply_model", "hotpath_split") and not again.additional_models


def test_a_loader_that_makes_no_second_model_is_told(flux):
    text = Texts()
    one = split(flux, text=text)
    assert text.last["state"] == "one_device" and "cached_patcher_init" in text.seen[-1]
    assert torch.equal(sample(flux), sample(one))


@pytest.mark.parametrize(
    "devices, said", [("3", "has 3 (0 to 2) and no 3"), ("-1", "no -1"), ("a", "is none"), ("", "is")]
)
def test_devices_that_are_none(filed, devices, said):
    with pytest.raises(ValueError, match="devices: .*") as refused:
        split(filed, devices)
    assert said in str(refused.value)
