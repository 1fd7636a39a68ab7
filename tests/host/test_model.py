"""The MODEL that came in stays what it was, whatever happens to the one that goes out."""

import gc
import weakref

import comfy.model_base
import comfy.model_management
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from conditions import in_fill, with_reference
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host import check_version
from sampling import Counting, Texts, assert_parity, compiled, compiled_blocks, load, sample, swapped


def forwards(model):
    diffusion = model.model.diffusion_model
    return [block for block in (*diffusion.double_blocks, *diffusion.single_blocks) if "forward" in block.__dict__]


def test_the_input_is_not_changed(flux):
    before = sample(flux)
    sample(compiled(flux))
    assert not flux.get_wrappers("apply_model", "hotpath_compile")
    assert forwards(flux) == []
    assert torch.equal(sample(flux), before)


def test_the_later_of_two_nodes_replaces_the_earlier(flux, regions):
    twice = compiled(compiled(flux, dynamic="never"), double="none")
    assert_parity(flux, twice)
    assert compiled_blocks(twice).settings.dynamic == "auto"
    assert [region.name for region in regions] == ["single block"]


def test_two_branches_keep_their_own_settings(flux):
    first, second = compiled(flux, double="none"), compiled(flux, single="none", dynamic="always")
    for _ in range(2):
        for model, name in ((first, "single"), (second, "double")):
            assert_parity(flux, model)
            assert list(compiled_blocks(model).compiled) == [name]
    assert {region.settings.dynamic for region in compiled_blocks(second).regions} == {"always"}


def test_blocks_are_those_of_the_model_that_executes(flux, flux_weights):
    """A clone onto another BaseModel, as multi-GPU and non-dynamic clones are, runs its own weights."""
    fast = compiled(flux)
    sample(fast)
    other = load({name: weight * 0.8 for name, weight in flux_weights.items()})
    moved = fast.clone(model_override=other.get_clone_model_override())
    assert moved.model is other.model
    assert_parity(other, moved)
    assert_parity(flux, fast)


def test_weights_are_gone_once_the_model_is(flux_weights):
    model = load({name: weight.clone() for name, weight in flux_weights.items()})
    fast = compiled(model, backend="inductor")
    sample(fast)
    gone = [weakref.ref(parameter) for parameter in model.model.diffusion_model.parameters()]
    gone.append(weakref.ref(model.model))
    del model, fast
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert sum(ref() is not None for ref in gone) == 0


def test_an_exception_in_mid_step_leaves_the_model_usable(flux):
    def fail(args, extra):
        raise RuntimeError("in mid step")

    broken = flux.clone()
    broken.set_model_patch_replace(fail, "dit", "single_block", 1)
    with pytest.raises(RuntimeError, match="in mid step"):
        sample(compiled(broken))
    assert forwards(flux) == []
    assert_parity(flux, compiled(flux))


def test_an_interrupt_in_mid_step_leaves_the_model_usable(flux):
    def interrupt(args, extra):
        comfy.model_management.interrupt_current_processing()
        return extra["original_block"](args)

    stopped = flux.clone()
    stopped.set_model_patch_replace(interrupt, "dit", "double_block", 1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(compiled(stopped))
    comfy.model_management.interrupt_current_processing(False)
    assert forwards(flux) == []
    assert_parity(flux, compiled(flux))


@pytest.mark.parametrize("whole_model_first", [True, False])
def test_beside_the_hosts_whole_model_compile_it_stands_aside(flux, caplog, whole_model_first):
    if whole_model_first:
        both = flux.clone()
        set_torch_compile_wrapper(both, backend="eager")
        both = compiled(both)
    else:
        both = compiled(flux).clone()
        set_torch_compile_wrapper(both, backend="eager")
    assert_parity(flux, both)
    assert compiled_blocks(both).regions == {}
    assert "another node compiles the whole model; remove one of the two" in caplog.text


def test_a_call_that_records_gradients_stays_eager(flux):
    fast = compiled(flux)
    sample(fast)
    block = flux.model.diffusion_model.single_blocks[0]
    hidden = flux.model.diffusion_model.hidden_size
    vec = torch.randn(1, hidden, requires_grad=True)
    with Counting() as counting, swapped(fast):
        block(torch.randn(1, 8, hidden), vec=vec, pe=None, transformer_options={}).sum().backward()
    assert counting.graphs == 0
    assert "gradients are being recorded" in compiled_blocks(fast).summary()
    assert vec.grad.abs().sum() > 0


def test_the_node_tells_what_it_does(flux):
    text = Texts()
    fast = compiled(flux, text=text)
    sample(fast)
    assert text.seen[0] == "compiling double block region (1/2) ..."
    assert text.seen[1] == "compiling single block region (2/2) ..."
    assert text.seen[2].startswith("2 double and 3 single blocks run as 2 regions, compiled in ")
    sample(compiled(flux, text=text))
    assert text.seen[3:] == ["2 double and 3 single blocks run as 2 regions, compiled earlier"]


def test_the_log_has_a_line_a_region(flux, caplog):
    caplog.set_level("INFO", logger="hotpath_pack")
    sample(compiled(flux))
    lines = [record.getMessage() for record in caplog.records if "region compiled in" in record.getMessage()]
    assert [line.partition(" region")[0] for line in lines] == ["double block", "single block"]


def test_a_model_without_such_blocks_is_named():
    config = comfy.supported_models.SDXL(
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=(1, 2),
            transformer_depth=[0, 1],
            transformer_depth_middle=1,
            transformer_depth_output=[0, 0, 1, 1],
            context_dim=64,
            num_head_channels=32,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            num_classes="sequential",
            adm_in_channels=64,
            legacy=False,
            dtype=torch.float32,
        )
    )
    config.manual_cast_dtype = None
    cpu = torch.device("cpu")
    model = ModelPatcher(comfy.model_base.SDXL(config, device=cpu), cpu, cpu)
    with pytest.raises(ValueError, match=r"model: SDXL \(UNetModel\) has no repeated .* Supported are Flux.1"):
        compiled(model)


@pytest.mark.parametrize("version, runs", [("2.6.0+cu124", False), ("2.7.1", True), ("2.10.0a0+git1", True)])
def test_what_is_too_old_is_named(version, runs):
    if runs:
        check_version("PyTorch", version, "2.7.1")
    else:
        with pytest.raises(ImportError, match=r"needs PyTorch 2.7.1 or newer and this is 2.6.0\+cu124. Update PyTorch"):
            check_version("PyTorch", version, "2.7.1")


def test_blocks_outside_the_model_are_named(flux):
    with pytest.raises(ValueError, match=r"single_blocks: block 12 is outside this model, which has 3 \(0-2\)"):
        compiled(flux, single="0-12")
    with pytest.raises(ValueError, match="double_blocks, single_blocks: .* leave no block"):
        compiled(flux, double="none", single="none")


def dev():
    return checkpoints.flux1(2, 2)


def schnell():
    return checkpoints.flux1(2, 2, guidance=False)


def fill():
    return checkpoints.flux1(2, 2, in_features=384)


def flux2():
    return checkpoints.flux2(2, 2)


@pytest.mark.parametrize(
    "weights, conditions",
    [
        (dev, {}),
        (schnell, {}),
        (fill, in_fill()),
        (dev, with_reference(16, "offset")),
        (flux2, {}),
        (flux2, with_reference(128, "index")),
        (flux2, with_reference(128, "index_timestep_zero")),
    ],
    ids=["dev", "schnell", "fill", "kontext", "flux2", "flux2-reference", "flux2-reference-zero-timestep"],
)
@pytest.mark.parametrize("dynamic", ["auto", "always"])
@pytest.mark.sweep(keep=["auto-dev", "auto-flux2-reference-zero-timestep", "always-flux2-reference-zero-timestep"])
def test_variants_match_eager_in_two_graphs(weights, conditions, dynamic):
    model = load(weights())
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        fast = compiled(model, backend="inductor", dynamic=dynamic)
        assert_parity(model, fast, **conditions)
        assert_parity(model, fast, **{**conditions, "width": 96, "tokens": 24})
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert compiled_blocks(fast).eager == {}


def test_chroma_matches_eager_in_two_graphs():
    """Its approximator makes modulation vectors of 3072, so this is one block of each kind at full width."""
    model = load(checkpoints.chroma(1, 1))
    assert type(model.model).__name__ == "Chroma"
    with Counting() as counting:
        fast = compiled(model)
        assert_parity(model, fast, steps=1)
        assert_parity(model, fast, steps=1, width=96)
    assert (counting.graphs, counting.breaks) == (2, 0)
