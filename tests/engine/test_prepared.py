"""Regions compiled before there are weights and inputs, from what those will be like."""

import pytest
import torch
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.artifacts import Kept, Store
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.counters import graphs_so_far
from hotpath_pack.hotpath.environment import environment
from hotpath_pack.hotpath.examples import describe_tensors, example_inputs, example_weights
from hotpath_pack.hotpath.later import Later
from hotpath_pack.hotpath.settings import CompileSettings
from test_graphs import CPU, DIMS, Block, as_they_are, expected, weights

pytestmark = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")


def region(folder, **options):
    kept = Kept(Store(folder), "a block", lambda: environment(CPU))
    return Region("double block", Block(), as_they_are, CompileSettings(), kept=kept, **options)


def examples(batch=1, tokens=64):
    told = describe_tensors((weights(), {"x": torch.randn(batch, tokens, 8)}))
    return example_weights(told[0], CPU), example_inputs(told[1], CPU)


def run(compiled, batch=1, tokens=4):
    w, x = weights(), torch.randn(batch, tokens, 8)
    want = expected(w, x)
    out, cost = compiled.run(w, {"x": x}, DIMS)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    return cost


@pytest.mark.parametrize("inference", [False, True])
def test_what_was_prepared_runs_at_every_size_and_is_stored_after_the_step(tmp_path, inference):
    later = Later()
    with torch.inference_mode(inference):
        compiled = region(tmp_path / "kept", later=later.add)
        before = graphs_so_far()
        compiled.prepare(*examples(), DIMS)
        assert graphs_so_far() - before == 1
        compiled.prepare(*examples(), DIMS)
        assert run(compiled).seconds > 0
        assert run(compiled, tokens=7).seconds == 0
        assert graphs_so_far() - before == 1 and compiled.stats.graphs == 1
        assert not list((tmp_path / "kept").glob("*.graphs"))
        later.wait()
        assert compiled.stats.cache == "miss: nothing was stored yet"
        again = region(tmp_path / "kept")
        again.prepare(*examples(), DIMS)
        cost = run(again, tokens=9)
        assert (again.stats.loaded, again.stats.graphs) == (1, 0) and cost.load_seconds > 0 == cost.seconds


def test_another_variant_than_was_prepared_is_compiled_as_ever(tmp_path):
    compiled = region(tmp_path / "kept")
    compiled.prepare(*examples(), DIMS)
    run(compiled, batch=2)
    run(compiled, batch=3)
    assert compiled.stats.graphs == 2


def test_what_fails_to_be_prepared_leaves_the_region_as_it_was(tmp_path):
    compiled = region(tmp_path / "kept")

    def refuse():
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        compiled.prepare(*examples(), DIMS, refuse)
    assert (compiled.stats.graphs, compiled.compiled) == (0, False)
    run(compiled)
    assert compiled.stats.graphs == 1


def test_what_was_prepared_can_be_stored_without_running(tmp_path):
    compiled = region(tmp_path / "kept")
    compiled.prepare(*examples(), DIMS)
    compiled.keep_prepared()
    again = region(tmp_path / "kept")
    run(again)
    assert again.stats.loaded == 1


def test_example_weights_lie_in_one_piece(tmp_path):
    told = describe_tensors({"a": torch.randn(64, 8), "b": torch.randn(8, 64).T, "c": torch.empty(3, dtype=torch.int8)})
    made = example_weights(told, CPU)
    assert {name: (w.shape, w.stride(), w.dtype) for name, w in made.items()} == {
        "a": ((64, 8), (8, 1), torch.float32),
        "b": ((64, 8), (1, 64), torch.float32),
        "c": ((3,), (1,), torch.int8),
    }
    assert {weight.untyped_storage().data_ptr() for weight in made.values()} == {made["a"].data_ptr()}
    assert made["a"].untyped_storage().nbytes() == 64 * 8 * 4
