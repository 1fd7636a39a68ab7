"""Random graphs beside eager, and that this finds what is wrong."""

from dataclasses import replace

import pytest
from hotpath_pack.devtools.fuzz import fuzz
from hotpath_pack.devtools.graphs import Adapter, Graph, random_graph
from hotpath_pack.host.families import flux


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


def small_graph(seed, number):
    """Of one model and one kind of settings, so that little is compiled."""
    graph = random_graph(seed, number)
    few = dict(model="flux1", steps=1, cfg=1.0, quantize="", offload=None, backend="eager", dynamic="auto")
    adapters = tuple(replace(each, kind="lora", how=each.how.replace("hook", "weights")) for each in graph.adapters[:1])
    return replace(graph, **few, adapters=adapters, references=(), batch=1)


def test_what_is_planted_is_found_and_told_as_a_test_that_fails_with_it_alone(monkeypatch):
    with monkeypatch.context() as planted:
        stale_patch(planted)
        (failure,) = fuzz(seed=1, graphs=200, most_failures=1, tries=6, draw=small_graph).failures
        assert failure.problem.startswith("the image differs from eager")
        told = {}
        exec(failure.as_test(), told)  # noqa: S102
        (test,) = (value for name, value in told.items() if name.startswith("test_"))
        with pytest.raises(AssertionError, match="differs from eager"):
            test()
    test()
