"""Random graphs beside eager, and that this finds what is wrong."""

from dataclasses import replace

import pytest
from hotpath_pack.devtools.fuzz import fuzz, replay
from hotpath_pack.devtools.graphs import Adapter, Graph, random_graph
from hotpath_pack.host.families import flux
from hotpath_pack.host.layers import bypass
from hotpath_pack.host.residency import weights


@pytest.mark.parametrize("seed, shared", [(0, False), (23, True)], ids=["another family", "Flux over devices"])
def test_a_minute_of_random_graphs(seed, shared):
    seen = fuzz(seed, seconds=30, graphs=6, most_failures=1)
    assert not seen.failures, seen.failures[0].as_test()
    assert seen.graphs > 2 * seen.refused.total(), seen
    assert bool(seen.shared) == shared


def test_a_layer_that_was_left_alone_in_a_quantized_model_has_no_format():
    """Seed 1 found it."""
    replay(Graph(quantize="int8_dynamic", seed=16))


def test_a_seed_gives_the_same_graphs_and_another_gives_others():
    graphs = [random_graph(3, number) for number in range(60)]
    assert graphs == [random_graph(3, number) for number in range(60)]
    assert len(set(graphs)) == 60 and not set(graphs) & {random_graph(4, number) for number in range(60)}
    for graph in graphs:
        assert eval(repr(graph), {"Graph": Graph, "Adapter": Adapter}) == graph  # noqa: S307


def plant_in_interface(monkeypatch, name, make):
    """Have blocks of Flux called in another way; the dataclass of ways is frozen."""
    ways = vars(flux._INTERFACE)
    monkeypatch.setitem(ways, name, make(ways[name]))


def stale_patch(monkeypatch):
    """The first patches around attention are kept, whatever comes later."""
    kept = []

    def make(real):
        def attention_for(*args):
            kept[:] = kept or [attend for attend in [real(*args)] if attend is not None]
            return kept[0] if kept else None

        return attention_for

    plant_in_interface(monkeypatch, "attention_for", make)


def dropped_mask(monkeypatch):
    def make(real):
        return lambda inputs, *args: real({**inputs, "attn_mask": None}, *args)

    plant_in_interface(monkeypatch, "region_inputs", make)


def wrong_strength_in_bypass(monkeypatch):
    """A strength that is not read again."""
    real, first = bypass.bypass_weights, {}

    def bypass_weights(path, layer, like):
        inner, added = real(path, layer, like)
        return inner, {
            name: first.setdefault(name, tensor) if name.endswith("strength") else tensor
            for name, tensor in added.items()
        }

    monkeypatch.setattr(weights, "bypass_weights", bypass_weights)


def small_graph(seed, number):
    """Of one model and one kind of settings, so that little is compiled."""
    graph = random_graph(seed, number)
    few = dict(model="flux1", steps=1, cfg=1.0, quantize="", offload=None, backend="eager", dynamic="auto")
    adapters = tuple(replace(each, kind="lora", how=each.how.replace("hook", "weights")) for each in graph.adapters[:1])
    return replace(graph, **few, adapters=adapters, references=(), batch=1)


@pytest.mark.parametrize("plant", [stale_patch, dropped_mask, wrong_strength_in_bypass])
@pytest.mark.sweep
def test_what_is_planted_is_found_and_told_as_a_test_that_fails_with_it_alone(monkeypatch, plant):
    with monkeypatch.context() as planted:
        plant(planted)
        (failure,) = fuzz(seed=2, graphs=200, most_failures=1, tries=6, draw=small_graph).failures
        assert failure.problem.startswith("the image differs from eager")
        told = {}
        exec(failure.as_test(), told)  # noqa: S102
        (test,) = (value for name, value in told.items() if name.startswith("test_"))
        with pytest.raises(AssertionError, match="differs from eager"):
            test()
    test()
