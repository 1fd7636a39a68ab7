"""Each selected block after each call: it ran compiled, ran eager or did not run, and nothing else is claimed."""

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode
from hotpath_pack.host.measuring.eager_steps import EagerSteps, eager_seconds
from hotpath_pack.host.model_call import ModelCall
from sampling import Texts, assert_parity, compiled, compiled_blocks, sample
from torch import nn

ALL = {"selected": 5, "compiled": 5, "eager": 0, "not_run": 0}


def wrapped(model, kind, wrapper, key="another pack"):
    clone = model.clone()
    clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def counts(model):
    return compiled_blocks(model).account.counts


class OneForAll(nn.Module):
    """A first-block cache's: one module that runs all double blocks by itself."""

    def __init__(self, blocks, **how):
        super().__init__()
        self.blocks = blocks

    def forward(self, **inputs):
        for block in self.blocks:
            inputs["img"], inputs["txt"] = block(**inputs)
        return inputs["img"], inputs["txt"]


def first_block_cache(within):
    """Swaps the lists of blocks for one module, and some for none, while the model runs; in our scope or around it."""

    def swap(model, execute):
        double, single = model.double_blocks, model.single_blocks
        model.double_blocks = nn.ModuleList([OneForAll(double)])
        model.single_blocks = nn.ModuleList(single[:1])
        try:
            return execute()
        finally:
            model.double_blocks, model.single_blocks = double, single

    if within:
        return WrappersMP.DIFFUSION_MODEL, lambda executor, *args, **kwargs: swap(
            executor.class_obj, lambda: executor(*args, **kwargs)
        )
    return WrappersMP.APPLY_MODEL, lambda executor, *args, **kwargs: swap(
        executor.class_obj.diffusion_model, lambda: executor(*args, **kwargs)
    )


@pytest.mark.parametrize("within", [True, False], ids=["within", "around"])
@pytest.mark.parametrize("single", ["all", "1-2"])
def test_blocks_that_another_pack_runs_from_its_own_list_run_compiled_and_the_others_are_named(flux, within, single):
    cached = wrapped(flux, *first_block_cache(within))
    text = Texts()
    fast = compiled(cached, single=single, backend="eager", text=text)
    assert_parity(cached, fast)
    left = {"all": 2, "1-2": 2}[single]
    assert counts(fast)["compiled"] == {"all": 3, "1-2": 2}[single] and counts(fast)["not_run"] == left
    assert (
        f"did not run: another node skipped it or ran something else in its place (single block {3 - left}, "
        in (text.seen[-1])
    )
    assert "step_seconds" not in text.last["facts"]


def test_a_forward_that_another_pack_puts_in_the_place_of_ours_is_told(flux):
    def theirs(executor, *args, **kwargs):
        blocks = [*executor.class_obj.double_blocks, *executor.class_obj.single_blocks]
        before = [block.__dict__.get("forward") for block in blocks]
        for block in blocks:
            block.forward = lambda *args, block=block, **kwargs: type(block).forward(block, *args, **kwargs)
        try:
            return executor(*args, **kwargs)
        finally:
            for block, forward in zip(blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    replaced = wrapped(flux, WrappersMP.DIFFUSION_MODEL, theirs)
    text = Texts()
    fast = compiled(replaced, backend="eager", text=text)
    assert_parity(replaced, fast)
    assert counts(fast) == {**ALL, "compiled": 0, "not_run": 5}
    assert text.last["state"] == "skipped" and "step_seconds" not in text.last["facts"]
    assert "another node gave this step's result without it (another pack)" in text.seen[-1]
    assert not [block for block in flux.model.diffusion_model.modules() if "forward" in block.__dict__]


def test_a_step_that_a_cache_answers_is_neither_compiled_nor_timed(flux):
    (cached,) = EasyCacheNode.execute(
        flux, reuse_threshold=10.0, start_percent=0.0, end_percent=1.0, verbose=False
    ).args
    states, facts = [], []

    class Each(Texts):
        def show(self, text, state="done", reasons=(), **told):
            super().show(text, state, reasons, **told)
            if "ran" in told:
                states.append(state)
                facts.append(told)

    fast = compiled(cached, backend="eager", text=Each())
    sample(fast, steps=8)
    assert "skipped" in states and "compiled" in states
    for state, told in zip(states, facts, strict=True):
        ran = told["ran"].startswith("5 of 5 blocks compiled")
        assert ran == (state == "compiled") and ("step_seconds" in told) <= ran
    assert f"{states.count('skipped')} of 8 steps ran none of them" in compiled_blocks(fast).summary()

    eager = wrapped(cached, WrappersMP.APPLY_MODEL, EagerSteps())
    sample(eager, steps=8)
    timed = {told["step_seconds"] for told in facts if "step_seconds" in told}
    assert timed and all(seconds > 0 for seconds in timed)


def test_eager_steps_are_timed_only_where_all_blocks_ran(flux):
    def skips(executor, x, *args, **kwargs):
        return torch.zeros_like(x)

    known = []
    for model in (wrapped(flux, WrappersMP.DIFFUSION_MODEL, skips), flux):
        timed = wrapped(model, WrappersMP.APPLY_MODEL, EagerSteps(), "benchmark")
        kinds = []

        def note(*args, kinds=kinds, **kwargs):
            call = ModelCall.read(*args, **kwargs)
            kinds.append(call.structure)
            return call.run()

        sample(wrapped(timed, WrappersMP.APPLY_MODEL, note, "note"))
        known.append(eager_seconds(flux.model, kinds[-1]))
    assert known[0] is None and known[1] > 0


def test_a_patch_in_the_place_of_a_block_is_told(flux):
    patched = flux.clone()
    patched.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 1)
    fast = compiled(patched, backend="eager")
    assert_parity(patched, fast)
    assert counts(fast) == {**ALL, "compiled": 4, "not_run": 1}
    assert compiled_blocks(fast).not_run == {"a patch of another node stands in its place": {"single block 1"}}


@pytest.mark.parametrize("theirs_first", [True, False])
def test_a_pack_that_compiles_single_blocks_is_named_as_that(flux, theirs_first):
    keys = ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.2"]
    both = flux.clone() if theirs_first else compiled(flux, backend="eager").clone()
    set_torch_compile_wrapper(both, backend="eager", keys=keys)
    both = compiled(both, backend="eager") if theirs_first else both
    assert_parity(flux, both)
    assert counts(both) == {**ALL, "compiled": 3, "eager": 2}
    reason = "another node compiles this block by itself; remove one of the two"
    assert compiled_blocks(both).eager == {reason: {"double block 0", "single block 2"}}


def test_an_optimized_block_in_the_list_is_named_as_that(flux):
    other = flux.clone()
    name = "diffusion_model.double_blocks.0"
    other.add_object_patch(name, torch.compile(flux.get_model_object(name), backend="eager"))
    fast = compiled(other, backend="eager")
    assert_parity(other, fast)
    assert counts(fast) == {**ALL, "compiled": 4, "eager": 1}
    assert list(compiled_blocks(fast).eager) == ["another node compiles this block by itself; remove one of the two"]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_suppressed_errors_do_not_pass_for_compiled(flux, fullgraph):
    """Other packs set ``suppress_errors``, after which PyTorch runs what it can't compile as it is."""
    from test_failures import FAULTY

    FAULTY.error = RuntimeError("no such kernel")
    try:
        with torch._dynamo.config.patch(suppress_errors=True):
            fast = compiled(flux, backend="hotpath_faulty", on_failure="eager", fullgraph=fullgraph)
            assert_parity(flux, fast)
    finally:
        FAULTY.error = None
    assert counts(fast) == {**ALL, "compiled": 0, "eager": 5}
    assert "no such kernel" in compiled_blocks(fast).summary()
