"""Whatever is raised while code for a block is got leaves the image as eager has it, with the reason told once; what
the host's own computation raises passes through."""

import logging
from contextlib import contextmanager, nullcontext

import comfy.model_management
import pytest
import torch
from hotpath_pack.host.compiling import compile as host_compile
from hotpath_pack.host.compiling import plans, when
from hotpath_pack.host.compiling import regions as host_regions
from hotpath_pack.hotpath import compiled as engine
from hotpath_pack.hotpath.artifacts import Kept, Store
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.failures import RegionFailed, reason_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sampling import Texts, assert_parity, compiled, compiled_blocks, offloaded, sample, swapped
from torch._dynamo import register_backend
from torch._dynamo.exc import InternalTorchDynamoError

# What raises in a seam, and there alone: the caller's module or class, and the name that it calls.
SEAMS = {
    "plan": (plans, "plan_block"),
    "layers": (plans, "plain_layers"),
    "weights": (host_compile, "block_weights"),
    "in place": (host_compile, "in_place"),
    "kinds": (host_regions, "input_kinds"),
    "store": (host_regions, "kept_region"),
    "preflight": (when, "compile_problems"),
    "region": (engine, "call_placed"),
    "options": (engine.torch, "compile"),
    "copies": (engine, "Copies"),
}


class Odd(Exception):
    """An exception whose text is of no use."""

    def __str__(self):
        return ""


ERRORS = st.one_of(
    st.builds(
        lambda kind, text: kind(text),
        st.sampled_from(
            (
                *(RuntimeError, KeyError, AssertionError, TypeError, ValueError, AttributeError, OSError, ImportError),
                *(MemoryError, NotImplementedError, RecursionError, StopIteration, SystemError),
                InternalTorchDynamoError,
            )
        ),
        st.text(max_size=40),
    ),
    st.builds(Odd),
    st.builds(UnicodeDecodeError, st.just("utf-8"), st.binary(max_size=4), st.just(0), st.just(1), st.just("bad")),
    st.builds(OSError, st.just(28), st.just("No space left on device"), st.just("/tmp/x")),
)


class Failing:
    """A backend whose code raises when it runs."""

    error = None

    def __call__(self, graph, inputs):
        def run(*arguments):
            out = graph.forward(*arguments)
            if self.error is not None:
                raise self.error
            return out

        return run


FAILING = Failing()
register_backend(name="hotpath_failing")(lambda graph, inputs, **kwargs: FAILING(graph, inputs))


@contextmanager
def failing(error):
    FAILING.error = error
    try:
        yield
    finally:
        FAILING.error = None


@pytest.mark.parametrize("seam", SEAMS)
@given(error=ERRORS)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_error_in_any_seam_runs_eager_and_is_told_once(flux, regions, caplog, seam, error):
    regions._regions.clear()
    caplog.clear()
    where, name = SEAMS[seam]

    def raises(*args, **kwargs):
        raise error

    text = Texts()
    want = sample(flux)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(where, name, raises)
        cache = "auto" if seam == "store" else "off"
        fast = compiled(flux, backend="eager", on_failure="eager", text=text, cache=cache)
        got = sample(fast)
    counts = compiled_blocks(fast).account.counts
    if seam == "store":
        # It is compiled all the same.
        assert counts["compiled"] == 5 and torch.allclose(want, got, atol=1e-4)
        assert all(reason_of(error) in region.stats.cache for region in compiled_blocks(fast).regions)
        return
    assert torch.equal(want, got), "eager to the bit"
    assert (counts["compiled"], counts["eager"], counts["not_run"]) == (0, 5, 0)
    told = [record for record in caplog.records if "runs without HotPath" in record.getMessage()]
    assert 1 <= len(told) <= 2 and {record.levelno for record in told} == {logging.WARNING}
    assert all(len(line.strip()) < 500 for line in compiled_blocks(fast).eager)
    assert text.last["state"] == "eager"


@given(error=ERRORS)
@settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_code_that_fails_when_it_first_runs_gives_way_to_eager_with_its_inputs_as_they_were(
    flux, regions, fullgraph, error
):
    regions._regions.clear()
    want = sample(flux)
    fast = compiled(flux, backend="hotpath_failing", on_failure="eager", fullgraph=fullgraph)
    with failing(error):
        assert torch.equal(sample(fast), want)
    assert compiled_blocks(fast).account.counts["eager"] == 5
    assert_parity(flux, fast)
    assert compiled_blocks(fast).account.counts["compiled"] == 5, "the next run can"


@pytest.mark.parametrize("on_failure", ["eager", "error"])
def test_memory_that_runs_out_within_a_step_passes_through(flux, on_failure):
    fast = compiled(flux, backend="hotpath_failing", on_failure=on_failure)
    for _ in range(2):
        with failing(no_memory()), pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
            sample(fast)
        assert_parity(flux, fast)


@pytest.mark.parametrize("on_failure", ["eager", "error"])
def test_where_weights_only_arrive_a_block_without_memory_runs_a_layer_at_a_time(flux, monkeypatch, on_failure):
    """It may have updated its inputs by half."""
    want = sample(flux)
    fast = compiled(flux, backend="hotpath_failing", on_failure=on_failure)
    assert_parity(flux, fast)
    monkeypatch.setattr(host_compile, "in_place", lambda *_: nullcontext(True))
    for _ in range(2):
        with failing(no_memory()):
            if on_failure == "eager":
                assert torch.equal(sample(fast), want)
                told = compiled_blocks(fast).account
                assert told.counts["eager"] == 5 and set(told.eager) == {
                    "the GPU has no memory left to run it compiled"
                }
            else:
                with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
                    sample(fast)
        assert_parity(flux, fast)
        assert compiled_blocks(fast).account.counts["compiled"] == 5, "the next run can"


@pytest.mark.parametrize("offload", [False, True])
def test_that_weights_are_copied_at_each_step_is_told_with_what_to_do_about_it(flux, monkeypatch, offload):
    text = Texts()
    fast = compiled(offloaded(flux, "in place") if offload else flux, text=text)
    sample(fast)
    assert compiled_blocks(fast).account.copied == 0
    monkeypatch.setattr(host_compile, "in_place", lambda *_: nullcontext(True))
    sample(fast)
    assert compiled_blocks(fast).account.copied == (0 if offload else 5)
    told = [reason for reason, advice in text.last["reasons"] if "Offload Repeated Blocks" in advice]
    assert told == ([] if offload else ["weights of 5 blocks are copied to the device at each step"])
    assert text.last["state"] == "compiled" and all(reason in text.seen[-1] for reason in told)


def no_memory():
    return torch.OutOfMemoryError("CUDA out of memory")


class Raising:
    def __init__(self, error):
        self.error = error

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ValueError("of the patch"), torch.OutOfMemoryError("of the patch"), RegionFailed("other", "of the patch")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_patch_around_attention_raises_passes_through(flux, error):
    patched = flux.clone()
    patched.set_model_attn1_patch(Raising(error))
    fast = compiled(patched, on_failure="eager")
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            sample(fast)
        assert raised.value is error
    assert compiled_blocks(fast)._source._failed == {}


@pytest.mark.parametrize("on_failure", ["eager", "error"])
def test_bad_input_is_told_in_the_words_of_the_model(flux, on_failure):
    """Here a mask for another number of tokens."""

    def wrong(executor, x, t, context, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[-1]
        options["patches"] = {}
        kwargs["attention_mask"] = torch.zeros(1, 1, 3, 3)
        return executor(x, t, context, *args, **kwargs)

    bad = flux.clone()
    bad.add_wrapper_with_key("diffusion_model", "bad", wrong)
    with pytest.raises(Exception) as eager:
        sample(bad)
    with pytest.raises(type(eager.value)) as ours:
        sample(compiled(bad, on_failure=on_failure))
    assert str(ours.value) == str(eager.value)


def test_an_interrupt_in_any_seam_ends_the_prompt(flux, monkeypatch):
    def interrupted(*args, **kwargs):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(host_compile, "block_weights", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(compiled(flux, on_failure="eager"))


def test_spans_that_end_in_none_run(flux):
    """HunyuanVideo image-to-video gives its blocks such spans."""
    block = flux.model.diffusion_model.single_blocks[0]
    hidden = flux.model.diffusion_model.hidden_size
    fast = compiled(flux, on_failure="eager")
    arguments = dict(vec=torch.randn(1, hidden), pe=None, modulation_dims=[(0, None, 0)], transformer_options={})
    x = torch.randn(1, 8, hidden)
    with torch.inference_mode():
        want = block(x.clone(), **arguments)
        with swapped(fast):
            got = block(x.clone(), **arguments)
    assert torch.allclose(want, got, atol=1e-5)


class Refusing(Kept):
    def __init__(self, folder, error):
        super().__init__(Store(folder), "a", self.facts)
        self.error = error

    def read(self):
        raise self.error

    def facts(self):
        raise self.error


@given(error=ERRORS)
@example(error=InternalTorchDynamoError(""))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_store_that_fails_costs_what_is_kept_and_no_more(tmp_path, error):
    from torch import nn
    from torch.nn import Linear

    template = Linear(4, 4, device="meta")
    region = Region(
        "a", template, lambda inputs: inputs, engine.CompileSettings(backend="eager"), kept=Refusing(tmp_path, error)
    )
    x = torch.randn(2, 4)
    weights = {"weight": torch.randn(4, 4), "bias": torch.zeros(4)}
    torch.testing.assert_close(region(weights, {"input": x}, {}), nn.functional.linear(x, **weights))
    assert region.stats.cache.startswith("off: ") and region.kept is None
