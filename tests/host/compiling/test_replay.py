"""Blocks replayed from recordings in the host, on a recorder that reads real addresses: the same bits as unrecorded."""

import random

import pytest
import torch
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.reruns import Reruns
from hotpath_pack.host.compiling import compile as host_compile
from hotpath_pack.host.compiling import replay
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.recorded import HELD
from hotpath_pack.hotpath.settings import CompileSettings
from hotpath_pack.hotpath.static import StaticInputs
from sampling import Texts, compiled_blocks, load, sample

pytestmark = [
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
    pytest.mark.usefixtures("user_folder"),
]
DEPTHS = (2, 2)
RUN = dict(steps=3)


@pytest.fixture
def recorder(monkeypatch):
    """The CPU records as a CUDA device does."""
    made = Reruns()
    monkeypatch.setattr(replay, "recorder_for", lambda device: made)
    monkeypatch.setattr(replay, "_RECORDINGS", {})
    return made


@pytest.fixture(scope="module")
def weights():
    return checkpoints.flux1(*DEPTHS)


@pytest.fixture
def model(weights):
    return load({name: weight.clone() for name, weight in weights.items()})


def compiled(model, cuda_graphs="auto", cache="auto", **settings):
    chosen = CompileSettings(**settings)
    made = compile_repeated_blocks(model, chosen, "all", "all", "error", Texts(), cache, cuda_graphs)
    replays_of(made).always = True
    return made


def replays_of(model):
    return compiled_blocks(model).replays


def move(model):
    """What the host does to a model that it unloads and loads again."""
    for block in model.model.diffusion_model.double_blocks:
        for parameter in block.parameters():
            parameter.data = parameter.data.clone()


def keep_outputs(model, kept):
    """A node that keeps what blocks gave, as some that cache do."""

    def replace(args, extra):
        out = extra["original_block"](args)
        kept.append((out["img"], out["img"].clone()))
        return out

    patched = model.clone()
    for index in range(DEPTHS[1]):
        patched.set_model_patch_replace(replace, "dit", "single_block", index)
    return patched


def test_replays_are_the_bits_of_the_same_regions_unrecorded(model, weights, recorder, monkeypatch):
    """Sizes, branches, LoRAs and moved weights in turns; then what keeps outputs, and what patches attention."""
    off, on = compiled(model, "off"), compiled(model)
    runs = [RUN, dict(RUN, width=48), dict(RUN, cfg=2.0), dict(RUN, tokens=5, cfg=2.0), RUN]
    wants = [sample(off, **run) for run in runs]
    assert recorder.recorded == 0 and not replays_of(off).summary()
    for run, want in zip(runs, wants, strict=True):
        assert torch.equal(sample(on, **run), want)
        assert replays_of(on).replayed == {"double": 2, "single": 2} and not replays_of(on).why_not
    assert "2 double and 2 single blocks replayed as CUDA graphs" in compiled_blocks(on).summary()
    before, asked = recorder.recorded, []
    ask = host_compile.block_weights
    with monkeypatch.context() as patch:
        patch.setattr(host_compile, "block_weights", lambda *of: asked.append(of) or ask(*of))
        assert torch.equal(sample(on, **RUN), wants[0]) and recorder.recorded == before
        assert not asked, "the host was asked for weights that are where they were"
        move(model)
        assert torch.equal(sample(on, **RUN), wants[0]) and recorder.recorded == before + 2
        assert asked
    lora = checkpoints.lora(weights)
    patched_on, patched_off = (load_lora_for_models(side, None, lora, 0.5, 0)[0] for side in (on, off))
    want = sample(patched_off, **RUN)
    assert not torch.equal(want, wants[0])
    for _ in range(2):
        assert torch.equal(sample(patched_on, **RUN), want)
    for _ in range(2):
        assert torch.equal(sample(on, **RUN), wants[0])

    choose = random.Random(0)
    for _ in range(12):
        action = choose.choice([move, lambda model: replays_of(on).drop(), lambda model: None])
        action(model)
        side, run = choose.choice([(on, off), (patched_on, patched_off)]), choose.choice(runs)
        assert torch.equal(*(sample(which, **run) for which in side))

    kept = []
    keeping = keep_outputs(on, kept)
    for run, want in zip(runs, wants, strict=True):
        assert torch.equal(sample(keeping, **run), want)
    # What they hold is what ran last in its step, as a block writes over its input.
    for _, (last, copy) in zip(kept[::2], kept[1::2], strict=True):
        assert torch.equal(last, copy)
    assert HELD in replays_of(on).why_not

    unkept = compiled(model, cache="off")
    for _ in range(2):
        assert torch.equal(sample(unkept, **RUN), wants[0])
    assert replays_of(unkept).replayed == {"double": 2, "single": 2}
    assert {region.kept for region in compiled_blocks(unkept).regions} == {None}

    attention = on.clone()
    attention.set_model_attn1_output_patch(lambda attn, extra_options: attn * 0.5)
    without = off.clone()
    without.set_model_attn1_output_patch(lambda attn, extra_options: attn * 0.5)
    assert torch.equal(sample(attention, **RUN), sample(without, **RUN))
    assert not replays_of(on).replayed and set(replays_of(on).why_not) == {replay.OPAQUE}


def test_blocks_whose_weights_stayed_run_without_the_host_being_asked(model, monkeypatch):
    """Whatever becomes of recordings; and those whose weights moved or changed are asked for anew."""
    asked, ask = [], host_compile.block_weights
    monkeypatch.setattr(host_compile, "block_weights", lambda *args: asked.append(1) or ask(*args))
    fast = compiled(model, cuda_graphs="off")
    want = sample(model, **RUN)
    assert sample(fast, **RUN).equal(first := sample(fast, **RUN))
    assert (first - want).abs().max() < 1e-4
    asked.clear()
    assert sample(fast, **RUN).equal(first) and not asked
    move(model)
    assert sample(fast, **RUN).equal(first)
    assert len(asked) == DEPTHS[0], "of the double blocks, and once"
    with torch.inference_mode():
        for block in model.model.diffusion_model.single_blocks:
            block.linear2.weight.data.mul_(0.5)
    asked.clear()
    changed = sample(fast, **RUN)
    assert not asked and not changed.equal(first)
    assert (changed - sample(model, **RUN)).abs().max() < 1e-4


@pytest.fixture
def deep():
    return load(checkpoints.flux1(4, 4))


@pytest.fixture
def found_here(monkeypatch):
    """Whether an input was where an earlier block of the same step had it brought, for each that was asked for."""
    seen, own = [], StaticInputs._is_here

    def asked(*args):
        seen.append(own(*args))
        return seen[-1]

    monkeypatch.setattr(StaticInputs, "_is_here", asked)
    return seen


def test_what_all_blocks_read_is_brought_once_a_step(deep, recorder, found_here):
    off, on = compiled(deep, "off"), compiled(deep)
    for run in (RUN, dict(RUN, width=48), dict(RUN, cfg=2.0)):
        assert torch.equal(sample(on, **run), sample(off, **run))
    assert any(found_here)


def that_writes(model):
    """A patch of a block that writes over what all blocks read."""

    def replace(args, extra):
        args["vec"].mul_(1.5)
        args["pe"].mul_(0.9)
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(replace, "dit", "double_block", 2)
    return patched


def with_own_forward(model):
    """As packs do that run blocks by code of their own, which may write as much."""
    diffusion_model, steps = model.model.diffusion_model, []

    def forward(*args, **kwargs):
        steps.append(None)
        return type(diffusion_model).forward_orig(diffusion_model, *args, **kwargs)

    model.add_object_patch("diffusion_model.forward_orig", forward)
    return model


def assert_brought_for_each_block(model, recorder, found_here):
    off, on = compiled(model, "off"), compiled(model)
    assert torch.equal(sample(on, **RUN), sample(off, **RUN))
    assert recorder.replays and not found_here


@pytest.mark.parametrize("change", [that_writes, with_own_forward])
def test_where_other_code_may_run_between_blocks_all_is_brought_for_each(deep, recorder, found_here, change):
    assert_brought_for_each_block(change(deep), recorder, found_here)


def test_after_a_block_that_runs_eager_all_is_brought_anew(deep, recorder, found_here):
    on = compile_repeated_blocks(deep, CompileSettings(), "0, 2-3", "all", "error", Texts(), "auto")
    replays_of(on).always = True
    off = compiled(deep, "off")
    assert (sample(on, **RUN) - sample(off, **RUN)).abs().max() < 1e-4
    assert recorder.replays and not found_here
