"""Regions compiled ahead of time: what they accept, what they refuse, and in another process."""

import functools
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.artifacts import FIRST_TIME, Kept, Store
from hotpath_pack.hotpath.compiled import CompileSettings, Region, RegionFailed
from hotpath_pack.hotpath.counters import graphs_so_far
from hotpath_pack.hotpath.environment import environment
from hotpath_pack.hotpath.rowwise import computed_once
from torch import autocast, nn
from torch.nn import Linear

ROOT = Path(__file__).resolve().parent.parent.parent
DIMS = {"x": (1,)}
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")


def twice(x):
    return x * 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = Linear(8, 8, device="meta")

    def forward(self, x, scale=None):
        x += nn.functional.gelu(computed_once(self.linear(twice(x))))
        return x if scale is None else x * scale


def as_they_are(inputs):
    return inputs


def weights():
    return {"linear.weight": torch.randn(8, 8), "linear.bias": torch.randn(8)}


def expected(w, x):
    return x + nn.functional.gelu(nn.functional.linear(x * 2, w["linear.weight"], w["linear.bias"]))


def region(folder, **settings):
    kept = Kept(Store(folder), "a block", lambda: environment(CPU))
    return Region("double block", Block(), as_they_are, CompileSettings(**settings), kept=kept)


def run(compiled, batch=1, tokens=4):
    w, x = weights(), torch.randn(batch, tokens, 8)
    want = expected(w, x)
    torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(x, want, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one region left: a graph for one image, and one for any number."""
    folder = tmp_path_factory.mktemp("user") / "kept"
    compiled = region(folder)
    assert not compiled.loads(weights(), {"x": torch.randn(1, 4, 8)})
    assert compiled.stats.cache == "miss: nothing was stored yet"
    for batch, tokens in ((1, 4), (1, 9), (2, 4), (3, 9)):
        run(compiled, batch, tokens)
    assert compiled.stats.graphs == 2
    assert compiled.stats.recompiles == ["batch size changed from 1 to 2"]
    return folder


def loaded(folder):
    compiled = region(folder)
    assert compiled.loads(weights(), {"x": torch.randn(1, 4, 8)}), compiled.stats
    assert (compiled.stats.cache, compiled.stats.loaded) == ("hit", 2)
    return compiled


def test_the_next_region_compiles_nothing(folder):
    compiled, before = loaded(folder), graphs_so_far()
    for batch, tokens in ((1, 4), (1, 9), (2, 4), (3, 9)):
        run(compiled, batch, tokens)
    assert (graphs_so_far() - before, compiled.stats.graphs, compiled.stats.seconds) == (0, 0, 0)


def test_what_the_guards_do_not_accept_is_compiled_and_kept_too(tmp_path):
    """Here a weight that lies in memory in another order."""
    run(region(tmp_path / "kept"))
    for compiled, made in ((region(tmp_path / "kept"), 1), (region(tmp_path / "kept"), 0)):
        w, x = weights(), torch.randn(1, 4, 8)
        w["linear.weight"] = w["linear.weight"].t()
        assert compiled.loads(w, {"x": x}) is (made == 0)
        want = expected(w, x)
        torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want, atol=1e-5, rtol=0)
        run(compiled)
        assert compiled.stats.graphs == made


def in_inference_mode(make):
    with torch.inference_mode():
        return make()


def test_no_graph_is_for_weights_or_inputs_of_another_kind(folder):
    """The host goes by that where it looks no region up for a block."""
    compiled, w, x = loaded(folder), weights(), torch.randn(1, 4, 8)
    assert compiled.graph_for(w, {"x": x}) is not None
    for other in (x.double(), x[0], x.to("meta"), [x], None, in_inference_mode(x.clone)):
        assert compiled.graph_for(w, {"x": other}) is None
    for inputs in ({"x": x, "scale": x}, {}, {"y": x}):
        assert compiled.graph_for(w, inputs) is None
    for name, weight in w.items():
        for other in (weight.double(), nn.Parameter(weight), weight.to("meta"), in_inference_mode(weight.clone)):
            assert compiled.graph_for({**w, name: other}, {"x": x}) is None


def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tf32():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


def mixed_precision():
    with autocast("cpu", torch.bfloat16):
        yield


def no_grad():
    with torch.no_grad():
        yield


def device():
    with torch.device("meta"):
        yield


def replaced_function():
    module = sys.modules[__name__]
    original = module.twice
    module.twice = lambda x: x * 3
    yield
    module.twice = original


def replaced_in_torch():
    original = nn.functional.gelu
    nn.functional.gelu = nn.functional.relu
    yield
    nn.functional.gelu = original


def global_hook():
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: out)
    yield
    hook.remove()


CHANGES = [
    deterministic,
    default_dtype,
    tf32,
    threads,
    mixed_precision,
    no_grad,
    device,
    replaced_function,
    replaced_in_torch,
    global_hook,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_switch_or_function_that_the_graph_was_traced_with(folder, change):
    """Each makes the graphs unfit for as long as it holds, and only so long."""
    compiled = loaded(folder)
    arguments = weights(), {"x": torch.randn(1, 4, 8)}
    changed = change()
    next(changed)
    try:
        accepted = [graph.accepts(*arguments) for graph in compiled._graphs]
    finally:
        next(changed, None)
    assert not any(accepted)
    assert any(graph.accepts(*arguments) for graph in compiled._graphs)


def test_code_replaced_before_loading_is_named(folder):
    changed = replaced_function()
    next(changed)
    try:
        compiled = region(folder)
        assert not compiled.loads(weights(), {"x": torch.randn(1, 4, 8)})
    finally:
        next(changed, None)
    assert compiled.stats.cache == f"miss: {__name__}.twice is not what it was"


def test_a_damaged_file_costs_a_compilation_and_a_line(folder, tmp_path, caplog):
    damaged = shutil.copytree(folder, tmp_path / "kept")
    (path,) = damaged.glob("*.graphs")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    compiled = region(damaged)
    assert not compiled.loads(weights(), {"x": torch.randn(1, 4, 8)})
    assert [record.message for record in caplog.records] == ["stored compiled blocks are not used: the file is damaged"]
    run(compiled)
    assert compiled.stats.graphs == 1
    assert region(damaged).loads(weights(), {"x": torch.randn(1, 4, 8)})


def test_a_region_keeps_no_weights_alive(folder, tmp_path):
    for compiled in (loaded(folder), region(tmp_path / "new")):
        w = weights()
        gone = [weakref.ref(weight) for weight in w.values()]
        compiled(w, {"x": torch.randn(1, 4, 8)}, DIMS)
        del w
        gc.collect()
        assert [ref() for ref in gone] == [None, None]


def test_settings_for_each_size_and_for_any_batch(tmp_path):
    for dynamic, made in (("never", 2), ("always", 1)):
        compiled = region(tmp_path / dynamic, dynamic=dynamic)
        run(compiled, 2, 4)
        run(compiled, 3, 4)
        assert compiled.stats.graphs == made
        again = region(tmp_path / dynamic, dynamic=dynamic)
        assert again.loads(weights(), {"x": torch.randn(2, 4, 8)})
        run(again, 3, 4)
        assert again.stats.graphs == 0


def test_what_cannot_be_traced_is_the_same_failure_as_without(tmp_path):
    def breaking(inputs):
        torch._dynamo.graph_break()
        return inputs

    kept = Kept(Store(tmp_path / "kept"), "a block", lambda: environment(CPU))
    compiled = Region("double block", Block(), breaking, CompileSettings(), kept=kept)
    with pytest.raises(RegionFailed, match="the double block region could not be compiled: .*test_graphs.py:"):
        compiled(weights(), {"x": torch.ones(1, 4, 8)}, DIMS)


REGISTRY = {Block: torch.tensor(2.0)}


def test_what_cannot_be_kept_runs_as_without_and_says_so(tmp_path, caplog):
    """Here a tensor that is no input: Dynamo would bake nothing in, but another process has not got it."""

    def reads_a_tensor(inputs):
        return {"x": inputs["x"] * REGISTRY[Block]}

    kept = Kept(Store(tmp_path / "kept"), "a block", lambda: environment(CPU))
    compiled = Region("double block", Block(), reads_a_tensor, CompileSettings(), kept=kept)
    for _ in range(2):
        w, x = weights(), torch.randn(1, 4, 8)
        want = expected(w, x * 2)
        torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want, atol=1e-5, rtol=0)
    assert compiled.stats.cache.startswith("off: ")
    assert caplog.text.count("double block region can't be kept for the next start") == 1
    assert not list((tmp_path / "kept").glob("*.graphs"))


def test_what_cannot_be_written_is_not_compiled_again(tmp_path, caplog, monkeypatch):
    def fails(*args):
        raise TypeError("no pickle for it")

    monkeypatch.setattr(graphs, "write_held", fails)
    compiled = region(tmp_path / "kept")
    for tokens in (4, 9):
        run(compiled, 1, tokens)
    assert compiled.stats.graphs == 1 and compiled.stats.cache == "off: no pickle for it"
    assert caplog.text.count("no pickle for it") == 1


OTHER_PROCESS = """
    import sys, types
    pack = types.ModuleType("hotpath_pack")
    pack.__path__ = [{root!r}]
    sys.modules["hotpath_pack"] = pack
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import test_graphs
    from hotpath_pack.hotpath.counters import graphs_so_far

    w, x = test_graphs.weights(), test_graphs.torch.randn(1, 4, 8)
    assert not test_graphs.region(Path({folder!r} + " of nobody")).find(w, {{"x": x}})
    # What the block's code imports where it is used, and the graph depends on.
    assert not {{"torch._inductor.codecache", "torch._inductor.inductor_prims"}} & {{*sys.modules}}
    compiled = test_graphs.loaded(Path({folder!r}))
    for batch, tokens in ((1, 4), (1, 9), (2, 4), (3, 9)):
        test_graphs.run(compiled, batch, tokens)
    assert graphs_so_far() == 0
    # More than a second of imports.
    assert not {{"torch._functorch.aot_autograd", "torch._inductor.compile_fx"}} & {{*sys.modules}}
    unkept = test_graphs.Region("a block", test_graphs.Block(), test_graphs.as_they_are, test_graphs.CompileSettings())
    unkept.prepare(w, {{"x": x}}, test_graphs.DIMS)
    assert "torch._functorch.aot_autograd" in sys.modules, "the first step would import it"
    import torch._dynamo.utils as utils
    assert not utils.counters["frames"] and not utils.counters["stats"], utils.counters
"""


def test_another_process_without_a_compiler_loads_it(tmp_path):
    folder = tmp_path / "kept"
    compiled = region(folder)
    run(compiled, 1)
    run(compiled, 2)
    code = textwrap.dedent(OTHER_PROCESS.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(folder)))
    empty = tmp_path / "inductor"
    tools = {"CXX": "/nonexistent", "PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(empty)}
    env = {**os.environ, **tools}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not empty.exists() or not [path for path in empty.rglob("*") if path.is_file()]


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        # Dynamo tells of the generator the line of the function that it stands in, and of that the decorator's.
        return function(*(arg * 2 for arg in args))

    return wrapper


@decorated
def twice_each(x):
    return x


class Decorated(Block):
    def forward(self, x):
        return nn.functional.gelu(self.linear(twice_each(x)))


def test_a_generator_in_a_decorated_function_is_seen(tmp_path):
    kept = Kept(Store(tmp_path / "kept"), "a block", lambda: environment(CPU))
    compiled = Region("double block", Decorated(), as_they_are, CompileSettings(backend="inductor"), kept=kept)
    w, x = weights(), torch.randn(1, 4, 8)
    assert not compiled.loads(w, {"x": x})
    want = nn.functional.gelu(nn.functional.linear(x * 2, w["linear.weight"], w["linear.bias"]))
    torch.testing.assert_close(compiled(w, {"x": x}, DIMS), want, atol=1e-5, rtol=0)
    assert compiled.stats.cache == FIRST_TIME
