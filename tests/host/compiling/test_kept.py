"""What is kept from one start to the next: of every kind of model, and by what it is found again."""

import comfy.ldm.flux.layers
import comfy.quant_ops
import pytest
import torch
from changes import with_lora
from hotpath_pack.devtools import checkpoints, family_models, gguf_pack
from hotpath_pack.host.compiling import artifacts
from hotpath_pack.host.compiling import regions as host_regions
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.host.compiling.when import LATER
from hotpath_pack.host.families.flux import bind_cudnn, bind_opaque, bind_traced
from hotpath_pack.host.residency.offload import OffloadSettings, offload_repeated_blocks
from hotpath_pack.host.residency.weights import plain_layer
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.fingerprint import NotPortable
from hotpath_pack.hotpath.region_store import RegionStore
from hotpath_pack.hotpath.settings import CompileSettings
from hotpath_pack.hotpath.template import plan_block
from hotpath_pack.hotpath.values import input_kinds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import TOLERANCE, Counting, Texts, compiled_blocks, load, sample
from torch.nn import GELU, Linear, Sequential

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("user_folder")
needs_ahead = pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")


@pytest.fixture
def restart(monkeypatch):
    """As after a start of ComfyUI: no region is known."""

    def start():
        LATER.wait()
        monkeypatch.setattr(host_regions, "REGIONS", RegionStore(capacity=64))

    return start


def kept(model, **settings):
    return compile_repeated_blocks(model, CompileSettings(**settings), "all", "all", "error", Texts(), "auto")


def states(model):
    return {region.stats.cache for region in compiled_blocks(model).regions}


def attention_patch(model):
    patched = model.clone()
    patched.set_model_attn1_output_patch(lambda attn, extra_options: attn * extra_options["block_index"])
    return patched


def int8():
    if "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI has no int8_tensorwise")
    with torch.inference_mode():
        return load(checkpoints.quantized(checkpoints.flux1(1, 1), "int8_tensorwise"), dtype=torch.float32)


def ahead():
    return offload_repeated_blocks(load(checkpoints.flux1(1, 1)), OffloadSettings(), Texts())


MASK = dict(attention_mask=torch.ones(1, 4, 4), attention_mask_img_shape=(4, 4))
REFERENCE = dict(reference_latents=[torch.ones(1, 128, 8, 6)], reference_latents_method="index_timestep_zero")


@needs_ahead
@pytest.mark.parametrize(
    "make, run",
    [
        (lambda: attention_patch(int8()), {}),
        (lambda: load(checkpoints.flux2(1, 1)), REFERENCE),
        (ahead, {}),
        (lambda: gguf_pack.load(checkpoints.flux1(1, 1), lambda name: "Q6_K" if "lin" in name else "IQ4_XS"), {}),
    ],
    ids=["patched int8", "flux2 with spans of tokens", "modulation ahead", "gguf"],
)
@pytest.mark.sweep(keep=["modulation ahead"])
def test_every_kind_of_input_and_operator_is_kept(make, run, restart):
    model = make()
    first = kept(model)
    want = sample(first, **run)
    assert states(first) == {"miss: nothing was stored yet"}
    restart()
    again = kept(model)
    with Counting() as counting:
        for change in ({}, dict(width=96), dict(tokens=5)):
            got, eager = sample(again, **run, **change), sample(model, **run, **change)
            # Between integers a rounding can be a whole step, as between eager and freshly compiled code.
            assert (got - eager).norm() <= 0.01 * eager.norm()
        assert torch.equal(sample(again, **run), want)
    assert states(again) == {"hit"} and counting.graphs == 0
    assert compiled_blocks(again).summary().startswith("1 double and 1 single blocks run as 2 regions, loaded in ")


@needs_ahead
def test_weights_loras_prompts_and_seeds_do_not_matter(restart, flux_weights):
    weights = checkpoints.flux1(1, 1)
    sample(kept(load(dict(weights))))
    restart()
    other = load({name: weight * 0.9 for name, weight in weights.items()})
    with Counting() as counting:
        for strength in (0.3, 1.0):
            patched = with_lora(other, checkpoints.lora(weights), strength)
            fast = kept(patched)
            for run in (dict(seed=3), dict(tokens=30, seed=4), dict(width=128, guidance=1.0)):
                assert (sample(fast, **run) - sample(patched, **run)).abs().max() <= TOLERANCE
    assert counting.graphs == 0


@needs_ahead
def test_compiling_again_is_told_while_it_lasts():
    fast = kept(load(checkpoints.flux1(1, 1)))
    for batch in (1, 2):
        sample(fast, batch=batch, steps=1)
    told = [text for text in compiled_blocks(fast).text.seen if text.startswith("compiling")]
    assert told == [
        "compiling double block region (1/2) ...",
        "compiling single block region (2/2) ...",
        "compiling double block region again ...",
        "compiling single block region again ...",
    ]


@needs_ahead
def test_code_of_the_host_that_another_pack_replaced_is_compiled_anew(restart, monkeypatch):
    model = load(checkpoints.flux1(1, 1))
    before = sample(kept(model))
    restart()

    def apply_mod(tensor, m_mult, m_add=None, modulation_dims=None):
        return tensor * m_mult * 2 if m_add is None else torch.addcmul(m_add, tensor, m_mult)

    monkeypatch.setattr(comfy.ldm.flux.layers, "apply_mod", apply_mod)
    changed = kept(model)
    got = sample(changed)
    assert (got - sample(model)).abs().max() <= TOLERANCE < (got - before).abs().max()
    assert states(changed) == {"miss: comfy.ldm.flux.layers.apply_mod is not what it was"}


def test_without_what_it_takes_it_says_why(flux, monkeypatch):
    monkeypatch.setattr(artifacts, "supported", lambda: False)
    fast = kept(flux, backend="aot_eager")
    sample(fast)
    assert states(fast) == {f"off: PyTorch {torch.__version__} can't keep what it compiles; 2.11 and newer can"}


# The key of a region. Each part is drawn alone, so that some pairs differ in one and some in none.
HIDDEN = (128, 256)
PARTS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["double block", "patched double block"]),
        "hidden": st.sampled_from(HIDDEN),
        "bias": st.booleans(),
        "mode": st.sampled_from(["default", "max-autotune-no-cudagraphs"]),
        "dynamic": st.sampled_from(["auto", "always", "never"]),
        "bind": st.sampled_from([bind_traced, bind_cudnn, bind_opaque]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "weights": st.sampled_from([torch.float32, torch.int8]),
        "mask": st.booleans(),
        "inference": st.booleans(),
    }
)


def key_of(parts, seed):
    """The key, with weights, activations and token counts of ``seed``, which are no part of it."""
    torch.manual_seed(seed)
    block = Sequential(Linear(parts["hidden"], 8, parts["bias"]), GELU())
    template = plan_block(block, plain_layer).template
    tokens = 4 if parts["dynamic"] == "never" else 2 + seed
    inputs = {"img": torch.randn(1, tokens, 8, dtype=parts["dtype"]), "mask": torch.ones(2) if parts["mask"] else None}
    kinds = input_kinds(inputs, shapes=parts["dynamic"] == "never")
    chosen = CompileSettings(mode=parts["mode"], dynamic=parts["dynamic"])
    with torch.inference_mode(parts["inference"]):
        entry = artifacts.kept_region(parts["name"], template, parts["bind"], chosen, kinds, (parts["weights"],), CPU)
    return entry.region


@needs_ahead
@given(one=PARTS, change=PARTS, which=st.sets(st.sampled_from(["name", "hidden", "bias", "mode", "dtype", "mask"])))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_change_of_any_part_misses_and_of_none_hits(one, change, which):
    other = {**one, **{name: change[name] for name in which}}
    assert (key_of(one, 0) == key_of(other, 1)) == (one == other)
    for name, value in change.items():
        assert (key_of(one, 2) == key_of({**one, name: value}, 3)) == (one[name] == value)


@pytest.mark.parametrize("chosen", [dict(backend="aot_eager"), dict(fullgraph=False)])
@needs_ahead
def test_settings_that_cannot_be_kept(chosen):
    with pytest.raises(NotPortable):
        artifacts.kept_region("a", Linear(1, 1), bind_traced, CompileSettings(**chosen), (), (), CPU)


class Pass:
    def __call__(self, graph):
        return None


def set_to(owner, name, value):
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


SWITCHES = {
    "PyTorch": set_to(torch, "__version__", "2.12.0"),
    "Python": lambda monkeypatch: monkeypatch.setattr("platform.python_version", lambda: "3.99"),
    "ComfyUI": set_to(artifacts, "comfyui_version", "0.99.0"),
    "HotPath": set_to(artifacts, "_pack_version", "other"),
    "threads": lambda monkeypatch: monkeypatch.setattr(torch, "get_num_threads", lambda: 99),
    "CPU": lambda monkeypatch: monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024"),
    "settings of PyTorch": lambda monkeypatch: monkeypatch.setattr(
        torch.backends.cuda, "flash_sdp_enabled", lambda: not torch.backends.cuda.math_sdp_enabled()
    ),
}


@pytest.mark.parametrize("fact", SWITCHES)
def test_each_fact_is_told_by_its_name(fact, monkeypatch):
    before = artifacts.facts(CPU)
    SWITCHES[fact](monkeypatch)
    assert {name for name, value in artifacts.facts(CPU).items() if value != before[name]} == {fact}


@pytest.mark.parametrize(
    "change",
    [
        dict(max_autotune=True),
        {"cpp.simdlen": 1},
        dict(freezing=True),
        dict(post_grad_custom_pre_pass=Pass()),
        dict(post_grad_custom_post_pass=lambda graph: None),
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_of_inductor_and_passes_of_other_packs(change):
    before = artifacts.facts(CPU)
    with torch._inductor.config.patch(change):
        other = artifacts.facts(CPU)
    assert {name for name, value in other.items() if value != before[name]} == {"settings of torch.compile"}
    with torch._inductor.config.patch({"cpp.cxx": (None, "other-compiler"), "compile_threads": 17}):
        assert artifacts.facts(CPU) == before


@needs_ahead
@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan_t2v", "krea2", "ltx2"])
@pytest.mark.sweep(keep=["qwen_image"])
def test_other_families_are_kept(name, restart):
    model = family_models.build(name, 2 if name in ("z_image", "krea2") else 1, 1, 64)
    want = sample(model)
    assert (sample(kept(model)) - want).abs().max() <= TOLERANCE
    restart()
    again = kept(model)
    with Counting() as counting:
        assert (sample(again) - want).abs().max() <= TOLERANCE
    assert counting.graphs == 0 and states(again) == {"hit"}
