"""What each function relies on in PyTorch, and that its absence costs what is kept and no more."""

from types import SimpleNamespace

import pytest
import torch
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.compiled import CompileSettings, Region
from hotpath_pack.hotpath.inductor import region_options
from hotpath_pack.hotpath.internals import compiler, kept, state
from hotpath_pack.hotpath.internals.kept import NotAhead
from test_graphs import Block, as_they_are, expected, region, run, weights
from torch._dynamo import utils
from torch._inductor import async_compile, codecache, config, cpu_vec_isa
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ahead = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")


@pytest.fixture
def made():
    """A graph as PyTorch makes it, and its arguments."""
    template, x, w = Block(), torch.randn(1, 4, 8), weights()

    def function(weights, inputs):
        return torch.func.functional_call(template, weights, (), dict(as_they_are(inputs)))

    with torch.no_grad():
        return kept.compile_ahead(function, (w, {"x": x}), None, {}), template, w, x


@ahead
@torch.no_grad()
def test_guards_are_asked_by_the_names_of_arguments_and_the_code_runs_without_them(made):
    made, template, w, x = made
    guards, code = kept.guards_and_code(made)
    arguments = {"weights": w, "inputs": {"x": x}, "template": template}
    assert guards.check(arguments)
    told = guards.check_verbose({**arguments, "inputs": {"x": x.double()}})
    assert not told.result and "dtype mismatch" in told.verbose_code_parts[0]
    want = expected(w, x)
    torch.testing.assert_close(code(w, {"x": x}), want)
    # A module of the host, or of this pack, would be refused as one that nobody compares.
    assert "torch" in " ".join(kept.import_sources(made).values())
    assert (Block.__module__, Block.forward.__code__.co_firstlineno) in set(kept.traced_lines(made))


@pytest.mark.parametrize("has", ["nothing", "no guards", "guards that can not be asked"])
def test_guards_in_another_form_are_not_relied_on(has):
    made = SimpleNamespace(fn=print, _artifacts=SimpleNamespace(guard_manager=None if has == "no guards" else object()))
    with pytest.raises(NotAhead, match="not known here"):
        kept.guards_and_code(SimpleNamespace() if has == "nothing" else made)


@ahead
@pytest.mark.parametrize(
    "gone", ["compile_ahead", "guards_and_code", "import_sources", "traced_lines", "write_held", "read_held", "revive"]
)
def test_without_one_of_them_regions_are_compiled_as_ever(tmp_path, monkeypatch, gone):
    reads = gone in ("read_held", "revive")
    if reads:
        run(region(tmp_path / "kept"))

    def fails(*args):
        raise AttributeError(f"PyTorch has no {gone}")

    monkeypatch.setattr(graphs, gone, fails)
    compiled = region(tmp_path / "kept")
    run(compiled)
    run(compiled)
    in_vain = gone in ("guards_and_code", "import_sources", "traced_lines")
    assert compiled.stats.graphs == 1 + in_vain
    state = "miss: " if reads else "off: "
    assert compiled.stats.cache.startswith(state) and gone in compiled.stats.cache


def test_code_of_another_kind_is_not_kept():
    """Inductor's code makes its kernels in one line, which is taken out; the C++ ones are what one call gives."""
    with pytest.raises(NotAhead, match="another kind of code"):
        kept._kernels("def call(args): ...", None)
    with pytest.raises(NotAhead, match="a kernel of kind halide can't be kept"):
        kept._kernels(f"{kept._MAKES_KERNELS}\nkernel = async_compile.halide('', '')", None)


def test_of_a_kernel_only_the_variant_that_was_chosen_is_kept():
    """With stand-ins for Triton's objects; tests/gpu has the kernels."""

    def variant(block):
        return SimpleNamespace(config=SimpleNamespace(kwargs={"XBLOCK": block}, num_warps=4, num_stages=1))

    def kernel(name, *variants):
        return SimpleNamespace(kernel_name=name, kernel=SimpleNamespace(compile_results=list(variants)))

    first, second, other = variant(64), variant(128), variant(256)
    tuned, scaled = kernel("tuned", first, second), kernel("scaled", first, second)
    module = SimpleNamespace(
        tuned=SimpleNamespace(launchers=[variant(128)]), scaled=SimpleNamespace(launchers=[variant(256)])
    )
    kept._leave_quickest(SimpleNamespace(static_autotuners=[tuned, scaled]), module)
    assert tuned.kernel.compile_results == [second]
    assert scaled.kernel.compile_results == [first, second], "none of them was chosen"
    module.tuned.launchers.append(other)
    tuned.kernel.compile_results = [first, second, other]
    kept._leave_quickest(SimpleNamespace(static_autotuners=[tuned]), module)
    assert tuned.kernel.compile_results == [second, other]


@ahead
def test_kernels_are_found_by_their_text_without_reading_all_of_pytorch(monkeypatch):
    """With a stand-in for Triton's objects; tests/gpu has the kernels. Two kernels may have one name."""
    from torch._inductor.triton_bundler import StaticallyLaunchedAutotuner, TritonBundle, TritonBundler

    made, texts = [], ("the first", "another")

    class Kernel:
        compile_results = ()

        def __init__(self, text):
            self.text = text

        def recheck_autotune_cache(self, reload_kernel_from_src):
            made.append(reload_kernel_from_src.args)

        def precompile(self, **how):
            assert how["reload_kernel"].args == ("ours", self.text)

    source = "\n".join(f"ours_{n} = async_compile.triton('ours', {text!r})" for n, text in enumerate(texts))
    told = [
        StaticallyLaunchedAutotuner(async_compile.CompiledTritonKernels.key(text), "ours", Kernel(text))
        for text in texts[::-1]
    ]
    bundle = TritonBundle([], told)
    kept._name_by_text(bundle, source)
    monkeypatch.setattr(async_compile, "torch_key", None)
    TritonBundler.load_autotuners(bundle.static_autotuners)
    found = kept._kernels_by_text({})
    assert [found.triton("ours", text).text for text in texts] == list(texts)
    assert made == [("ours", text) for text in texts]
    with pytest.raises(TypeError), config.patch(compile_threads=1):
        found.triton("ours", "one that was not kept, which is compiled")


@pytest.mark.parametrize("gone", ["supported_vec_isa_list", "valid_vec_isa_list"])
def test_where_instruction_sets_are_kept_otherwise_inductor_finds_them_out(monkeypatch, gone):
    monkeypatch.delattr(cpu_vec_isa, gone)
    compiler.trust_compiler()
    compiler.forget_compiler()


def test_the_compiler_is_not_asked_while_it_is_trusted_and_asked_after(monkeypatch):
    asked = []
    for kind in cpu_vec_isa.supported_vec_isa_list:
        monkeypatch.setattr(type(kind), "check_build", lambda self, code: asked.append(self) or True)
    compiler.forget_compiler()
    compiler.trust_compiler()
    assert asked == [] and cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 1
    assert not any("check_build" in vars(kind) for kind in cpu_vec_isa.supported_vec_isa_list)
    compiler.forget_compiler()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0


def test_what_inductor_remembers_of_files_is_found_by_its_kind(monkeypatch):
    @compiler.lru_cache
    def remembered():
        return object()

    monkeypatch.setattr(codecache, "remembered", remembered, raising=False)
    before = remembered()
    compiler.forget_toolchain()
    assert remembered() is not before


def test_a_pytorch_without_a_device_guard_of_the_process_needs_none(monkeypatch):
    monkeypatch.delattr(torch._C, "_ensureCUDADeviceGuardSet", raising=False)
    state.keep_device_guard.__wrapped__()


def test_guards_on_a_module_of_this_pack_are_not_kept():
    """In another folder it has another name."""
    made = SimpleNamespace(_artifacts=SimpleNamespace(guards_state=b"... hotpath_pack.host.families.flux ..."))
    with pytest.raises(NotAhead, match="another folder"):
        kept.write_held(made, {}, {})


@pytest.mark.parametrize(
    "gone",
    [
        "dynamic_scale_rblock",
        compiler.TRUSTED,
        "static_launch_user_defined_triton_kernels",
        "triton.descriptive_names",
    ],
)
def test_an_option_that_inductor_has_not_is_not_asked_for(monkeypatch, gone):
    """It is found by its name as an attribute, a dotted one too, and makes code quicker alone."""
    if hasattr(config, gone):
        assert gone in region_options("default", probe=False)
        monkeypatch.delitem(config._config, gone)
    options = region_options("default", probe=False)
    assert gone not in options and not options["triton.cudagraphs"]
    # Which refuses any that Inductor has not.
    torch.compile(Block(), options=options)


@pytest.mark.parametrize("gone", [(), ("counters", "graph_break_reasons", "guard_failures")], ids=["has", "has not"])
def test_what_dynamo_does_not_count_is_not_told(monkeypatch, gone):
    """Graphs, breaks and guards that failed are counted from the start of the process."""

    def breaking(inputs):
        torch._dynamo.graph_break()
        return inputs

    for name in gone:
        monkeypatch.delattr(utils, name)
    compiled = Region("double block", Block(), breaking, CompileSettings(backend="eager", fullgraph=False))
    run(compiled)
    run(compiled, tokens=8)
    run(compiled, batch=2)
    stats = compiled.stats
    assert (stats.graphs > 1, len(stats.breaks) > 0) == (not gone, not gone)
    assert stats.recompiles == ([] if gone else ["batch size changed from 1 to 2"])


@pytest.mark.parametrize("gone", [False, True], ids=["has", "has not"])
def test_hooks_around_every_module_are_found_in_older_pytorch_too(monkeypatch, gone):
    if gone:
        monkeypatch.delattr(torch.nn.modules.module, "_has_any_global_hook")
    assert not state.any_global_hook()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: None)
    assert state.any_global_hook()
    handle.remove()
    assert not state.any_global_hook()


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class OperatorMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_around_every_function_are_found_but_a_default_device(monkeypatch):
    with torch.device("cpu"):
        assert not state.any_mode()
    for mode in (Mode, OperatorMode):
        with mode():
            assert state.any_mode()
    monkeypatch.delattr(torch.overrides, "_get_current_function_mode_stack")
    assert state.any_mode()
