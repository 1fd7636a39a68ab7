import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from hotpath_pack.hotpath.attention import AttentionMismatch, attention_scope, opaque_attention
from hotpath_pack.hotpath.backends import available_backends
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.failures import CompiledCodeFailed, RegionFailed
from hotpath_pack.hotpath.inductor import region_options
from hotpath_pack.hotpath.limits import ANY_SIZE, compiling
from hotpath_pack.hotpath.reasons import THROWN_AWAY
from hotpath_pack.hotpath.region_store import RegionStore
from hotpath_pack.hotpath.settings import MODES, CompileSettings, CompileSettingsError
from hotpath_pack.hotpath.values import input_kinds, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Linear

SETTINGS = CompileSettings(backend="aot_eager")
DIMS = {"x": (1,)}


class Block(nn.Module):
    """Mutates its input, as Flux blocks do."""

    def __init__(self, width=8):
        super().__init__()
        self.linear = Linear(width, width, device="meta")

    def forward(self, x, scale=None):
        x += self.linear(x)
        return x if scale is None else x * scale


def weights(width=8):
    return {"linear.weight": torch.randn(width, width), "linear.bias": torch.randn(width)}


def expected(w, x):
    return x + nn.functional.linear(x, w["linear.weight"], w["linear.bias"])


def region(options=SETTINGS, bind=lambda inputs: inputs, width=8):
    return Region("double block", Block(width), bind, options)


def test_one_graph_for_any_weights_and_token_counts(one_compile_only):
    compiled = region()
    for tokens in (5, 7, 64, 8):
        w, x = weights(), torch.randn(1, tokens, 8)
        want = expected(w, x)
        torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want)
        torch.testing.assert_close(x, want)  # the in-place update reaches the caller, as in eager
    assert (compiled.stats.graphs, compiled.stats.breaks, compiled.stats.recompiles) == (1, [], [])
    assert compiled.stats.peak_growth >= 0
    assert compiled.stats.seconds > 0


def test_equal_sizes_of_two_dimensions_at_first_are_no_promise(one_compile_only):
    class Two(nn.Module):
        def forward(self, x, y):
            return torch.cat((x, y), 1) * 2

    compiled = Region("two", Two(), lambda inputs: inputs, SETTINGS)
    dims = {"x": (1,), "y": (1,)}
    for left, right in ((6, 6), (6, 9), (12, 3)):
        out = compiled({}, {"x": torch.ones(1, left, 8), "y": torch.ones(1, right, 8)}, dims)
        assert out.shape == (1, left + right, 8)


def test_a_new_batch_size_costs_one_graph_then_none_and_says_why():
    compiled = region()
    for batch in (1, 2, 3, 5):
        compiled(weights(), {"x": torch.randn(batch, 4, 8)}, DIMS)
    assert compiled.stats.graphs == 2
    assert compiled.stats.recompiles == ["batch size changed from 1 to 2"]


@pytest.mark.parametrize("batches", [(1, 2, 3, 5), (2, 1, 3), (3, 1)])
def test_always_makes_the_batch_dynamic_from_the_start(batches):
    compiled = region(dataclasses.replace(SETTINGS, dynamic="always"))
    for batch in batches:
        w, x = weights(), torch.randn(batch, 4, 8)
        want = expected(w, x)
        torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want)
    assert compiled.stats.graphs == (1 if ANY_SIZE else 2), compiled.stats.recompiles


def test_always_lets_what_all_images_share_stay_one():
    compiled = region(dataclasses.replace(SETTINGS, dynamic="always"))
    for batch in (2, 3, 1, 2):
        w, x, scale = weights(), torch.randn(batch, 4, 8), torch.randn(1, 1, 8)
        want = expected(w, x) * scale
        torch.testing.assert_close(compiled(w, {"x": x, "scale": scale}, DIMS), want)
    assert compiled.stats.graphs <= 2, compiled.stats.recompiles


def test_code_that_another_pack_has_dropped_is_made_again_and_that_is_said():
    compiled = region()
    for _ in range(2):
        compiled(weights(), {"x": torch.randn(1, 4, 8)}, DIMS)
        torch._dynamo.reset()
    assert compiled.stats.recompiles == [THROWN_AWAY]


class _Own(Exception):
    pass


def test_code_that_fails_when_it_first_runs_leaves_the_inputs_as_they_were():
    state = {"error": _Own("no such kernel")}

    def half(graph, inputs):
        def run(*arguments):
            out = graph.forward(*arguments)
            if state["error"] is not None:
                raise state["error"]
            return out

        return run

    torch._dynamo.register_backend(name="hotpath_half")(half)
    compiled = region(dataclasses.replace(SETTINGS, backend="hotpath_half"))
    x = torch.ones(1, 4, 8)
    with pytest.raises(CompiledCodeFailed, match="no such kernel"):
        compiled(weights(), {"x": x}, DIMS)
    assert torch.equal(x, torch.ones(1, 4, 8))
    state["error"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        compiled(weights(), {"x": x}, DIMS)
    state["error"] = None
    compiled(weights(), {"x": x}, DIMS)
    state["error"] = _Own("of the computation")
    with pytest.raises(_Own):
        compiled(weights(), {"x": x}, DIMS)


def test_regions_share_neither_cache_nor_recompile_limit():
    first, second = region(), region()
    with torch._dynamo.config.patch(recompile_limit=1, error_on_recompile=True):
        for compiled in (first, second):
            compiled(weights(), {"x": torch.randn(1, 4, 8)}, DIMS)
    assert first.stats.graphs == second.stats.graphs == 1


def test_another_width_compiled_before_leaves_the_sizes_of_weights_known(one_compile_only):
    for width in (8, 16):
        compiled = region(width=width)
        # Dynamo lets weights of unknown sizes lie no more than they first did: here within a buffer, as streamed ones.
        first = {
            name: torch.cat((weight.new_zeros(2), weight.flatten()))[2:].view_as(weight)
            for name, weight in weights(width).items()
        }
        for w in (first, weights(width)):
            compiled(w, {"x": torch.randn(1, 4, width)}, DIMS)
    assert compiled.stats.graphs == 1


def test_inductor_generates_code_that_agrees_with_eager(one_compile_only):
    compiled = region(CompileSettings())
    for tokens in (16, 40):
        w, x = weights(), torch.randn(1, tokens, 8)
        want = expected(w, x)
        torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want, atol=1e-5, rtol=0)
    assert compiled.stats.graphs == 1


def test_a_region_keeps_no_weights_alive():
    compiled = region()
    w = weights()
    gone = [weakref.ref(weight) for weight in w.values()]
    compiled(w, {"x": torch.randn(1, 4, 8)}, DIMS)
    del w
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert compiled.compiled


def test_the_store_drops_the_least_recently_used():
    store = RegionStore(capacity=2)
    a, b = store.get("a", region), store.get("b", region)
    assert store.get("a", region) is a
    store.get("c", region)
    assert store.get("a", region) is a
    assert store.get("b", region) is not b
    assert len(list(store)) == 2


@pytest.mark.parametrize(
    "choice, names",
    [
        (dict(mode="fast"), "mode: 'fast' is unknown"),
        (dict(dynamic="maybe"), "dynamic: 'maybe' is unknown"),
        (dict(mode="max-autotune", backend="eager"), "mode: 'max-autotune' is a setting of the inductor backend"),
    ],
)
def test_settings_that_cannot_work_are_named(choice, names):
    with pytest.raises(CompileSettingsError, match=names):
        CompileSettings(**choice)


@pytest.mark.parametrize("mode", MODES)
def test_inductor_records_no_cuda_graphs_of_its_own_which_would_copy_weights(mode):
    assert region_options(mode, probe=False)["triton.cudagraphs"] is False


def test_backends_offer_inductor_first_and_only_what_is_installed():
    names = available_backends()
    assert names[0] == "inductor"
    assert {"aot_eager", "eager"} <= set(names)
    assert not {"cudagraphs", "tvm", "openxla"} & set(names)
    for name in names:
        torch._dynamo.lookup_backend(name)


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def test_input_kinds_see_structure_but_sizes_only_when_asked():
    def inputs(tokens, mask=None):
        return {"x": torch.zeros(1, tokens), "vec": (Pair(torch.zeros(2), torch.zeros(2)),), "mask": mask}

    assert input_kinds(inputs(3), shapes=False) == input_kinds(inputs(4), shapes=False)
    assert input_kinds(inputs(3), shapes=True) != input_kinds(inputs(4), shapes=True)
    assert input_kinds(inputs(3), shapes=False) != input_kinds(inputs(3, torch.zeros(1)), shapes=False)
    half = {**inputs(3), "x": torch.zeros(1, 3, dtype=torch.float16)}
    assert input_kinds(inputs(3), shapes=False) != input_kinds(half, shapes=False)
    assert len(tensors_in(inputs(3))) == 3


class Attention(nn.Module):
    def forward(self, q, pe=None):
        return opaque_attention(q, q, q, pe, None, [q.shape[2]]) + 1


def flatten(q, k, v, pe, mask, slices):
    return q.transpose(1, 2).flatten(2) * slices[0]


def test_whatever_attention_is_in_scope_runs_within_the_one_graph(one_compile_only):
    compiled = Region("patched", Attention(), lambda inputs: inputs, SETTINGS)
    for tokens, factor in ((3, 2.0), (5, -1.0)):
        q = torch.randn(1, 2, tokens, 4)
        with attention_scope(lambda *args, factor=factor: flatten(*args) * factor):
            out = compiled({}, {"q": q}, {"q": (2,)})
        torch.testing.assert_close(out, q.transpose(1, 2).flatten(2) * tokens * factor + 1)
    assert compiled.stats.graphs == 1


def test_scopes_nest():
    q = torch.ones(1, 1, 1, 1)
    with attention_scope(lambda q, *rest: q.flatten(2) * 2):
        with attention_scope(lambda q, *rest: q.flatten(2) * 3):
            assert opaque_attention(q, q, q, None, None, []).item() == 3
        assert opaque_attention(q, q, q, None, None, []).item() == 2


def test_an_attention_that_hands_its_input_back_gets_a_copy():
    q = torch.ones(1, 1, 2, 4)
    with attention_scope(lambda q, *rest: q.view(1, 2, 4)):
        out = opaque_attention(q, q, q, None, None, [])
    out.zero_()
    assert q.sum() == 8


@pytest.mark.parametrize("bad", [lambda q: q.flatten(2)[:, :1, :1], lambda q: q.transpose(1, 2).flatten(2).double()])
def test_an_attention_of_another_shape_or_dtype_is_an_error(bad):
    q = torch.ones(1, 2, 3, 4)
    with attention_scope(lambda q, *rest: bad(q)), pytest.raises(AttentionMismatch, match="but the block needs"):
        opaque_attention(q, q, q, None, None, [])


def test_what_cannot_be_one_graph_is_named_and_nothing_has_run():
    def breaking(inputs):
        torch._dynamo.graph_break()
        return inputs

    compiled = region(bind=breaking)
    x = torch.ones(1, 4, 8)
    with pytest.raises(RegionFailed, match="the double block region could not be compiled: .*test_compiled.py:"):
        compiled(weights(), {"x": x}, DIMS)
    assert torch.equal(x, torch.ones(1, 4, 8))
    assert not compiled.compiled


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_recompile_limit_that_is_reached_is_an_error_not_a_silent_fall_to_eager(fullgraph):
    compiled = region(dataclasses.replace(SETTINGS, fullgraph=fullgraph, dynamic="never"))
    before = torch._dynamo.config.recompile_limit
    for tokens in (2, 3):
        compiled(weights(), {"x": torch.randn(1, tokens, 8)}, DIMS)
    said = "the double block region could not be compiled: the limit of 2 graphs was reached; last size 1 of x changed"
    with pytest.raises(RegionFailed, match=said):
        compiled(weights(), {"x": torch.randn(1, 4, 8)}, DIMS)
    assert compiled.stats.limit_reached
    assert torch._dynamo.config.recompile_limit == before


TWO_STREAMS = st.lists(st.tuples(*[st.sampled_from((1, 2, 3, 5))] * 3), min_size=1, max_size=12)


@pytest.mark.parametrize("dynamic", ["auto", "always"])
@given(shapes=TWO_STREAMS)
@settings(max_examples=10)
def test_no_order_of_batches_and_token_counts_reaches_the_limit(dynamic, shapes):
    class Two(nn.Module):
        def forward(self, x, y):
            return torch.cat((x, y), 1) * 2

    options = CompileSettings(backend="eager", dynamic=dynamic)
    compiled = Region("two", Two(), lambda inputs: inputs, options, streams=2)
    for batch, left, right in shapes:
        inputs = {"x": torch.ones(batch, left, 8), "y": torch.ones(batch, right, 8)}
        assert compiled({}, inputs, {"x": (1,), "y": (1,)}).shape == (batch, left + right, 8)
    assert compiled.stats.graphs * 2 <= options.graph_limit(streams=2), compiled.stats.recompiles


def test_one_thread_compiles_at_a_time_under_a_limit_that_ends_with_it():
    config, inside, seen = torch._dynamo.config, threading.Event(), []
    before = config.recompile_limit, config.fail_on_recompile_limit_hit, config.suppress_errors

    def other():
        with compiling(24):
            seen.append((inside.is_set(), config.recompile_limit, config.fail_on_recompile_limit_hit))

    thread = threading.Thread(target=other)
    with compiling(12), compiling():
        assert (config.recompile_limit, config.fail_on_recompile_limit_hit) == (12, True)
        thread.start()
        inside.set()
    thread.join()
    assert seen == [(True, 24, True)]
    assert (config.recompile_limit, config.fail_on_recompile_limit_hit, config.suppress_errors) == before


def test_without_fullgraph_breaks_are_named_with_their_line_and_the_result_is_right():
    def breaking(inputs):
        torch._dynamo.graph_break()
        return inputs

    compiled = region(dataclasses.replace(SETTINGS, fullgraph=False), breaking)
    w, x = weights(), torch.randn(1, 4, 8)
    want = expected(w, x)
    torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want)
    line = breaking.__code__.co_firstlineno + 1
    assert f"(test_compiled.py:{line})" in compiled.stats.breaks[0]
    assert "graph_break" in compiled.stats.breaks[0]
