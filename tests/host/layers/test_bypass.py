"""LoRAs in bypass mode, by the host's own loader: understood, compiled, and what eager gives."""

import comfy.sd
import comfy.weight_adapter
import folder_paths
import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.adapters import adapter
from hotpath_pack.host.compiling import regions as host_regions
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.host.compiling.when import LATER
from hotpath_pack.host.quantizing.quantize import quantize_repeated_blocks
from hotpath_pack.host.residency.offload import OffloadSettings, offload_repeated_blocks
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.region_store import RegionStore
from hotpath_pack.hotpath.settings import CompileSettings
from sampling import TOLERANCE, Counting, Texts, assert_parity, compiled, compiled_blocks, load, sample

EXACT = dict(backend="eager")


def bypass(model, weights, kind="lora", strength=1.0, layers=None, **made):
    file = adapter(weights, kind, layers, **made)
    patched, _ = comfy.sd.load_bypass_lora_for_models(model, None, file, strength, 0)
    assert patched.injections
    return patched


@pytest.fixture(scope="module")
def flux_weights():
    return checkpoints.flux1(1, 2, hidden=128)


ALL = {"double": 1, "single": 2}


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr_full"])
@pytest.mark.sweep(keep=["lora", "lokr_full"])
def test_two_graphs_whatever_the_strength_alpha_and_rank(flux, flux_weights, kind):
    plain, changed = sample(flux, steps=1), []
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for strength, rank in ((1.0, 4), (-1.5, 8)):
            model = bypass(flux, flux_weights, kind, strength, rank=rank)
            fast = compiled(model, **EXACT)
            assert_parity(model, fast, steps=1)
            changed.append((sample(model, steps=1) - plain).abs().max())
            assert (compiled_blocks(fast).eager, dict(compiled_blocks(fast).compiled)) == ({}, ALL)
    assert min(changed) > 1e-3, "the LoRA does nothing"
    assert (counting.graphs, counting.breaks) == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_bit_where_no_compiler_reorders(flux_weights, dtype):
    weights = {name: weight.to(dtype) for name, weight in flux_weights.items()}
    model = bypass(load(weights, dtype=dtype), flux_weights, "lora", 0.3, rank=3)
    assert torch.equal(sample(model), sample(compiled(model, **EXACT)))


def test_each_rank_and_alpha_of_its_own_in_one_file(flux, flux_weights):
    layers = [
        name.removesuffix(".weight") for name in flux_weights if "_blocks." in name and flux_weights[name].ndim == 2
    ]
    file = {}
    for number, layer in enumerate(name for name in layers if not name.endswith(".bias")):
        file.update(adapter(flux_weights, "lora", [layer], rank=2 + number % 5, seed=number))
        file[f"diffusion_model.{layer}.alpha"] = torch.tensor(1.0 + number)
    model, _ = comfy.sd.load_bypass_lora_for_models(flux, None, file, 0.5, 0)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, compiled(model, **EXACT))
    assert counting.graphs <= 4


@pytest.mark.sweep
def test_some_layers_alone_then_all_then_none(flux, flux_weights):
    fast = []
    for layers in (["single_blocks.1.linear1", "double_blocks.0.img_mlp.0"], None):
        model = bypass(flux, flux_weights, layers=layers)
        fast.append(compiled(model))
        assert_parity(model, fast[-1])
        assert compiled_blocks(fast[-1]).eager == {}
        assert_parity(flux, compiled(flux))
    plain = compiled(flux)
    assert_parity(flux, plain)
    assert (compiled_blocks(plain).eager, dict(compiled_blocks(plain).compiled)) == ({}, ALL)


def test_two_adapters_on_a_layer_and_a_lora_in_the_weights(flux_weights):
    def twice():
        # The host can't take two from one layer and put them back.
        model = bypass(load({name: weight.clone() for name, weight in flux_weights.items()}), flux_weights, "lora", 0.5)
        other = adapter(flux_weights, "lokr", seed=5)
        manager = comfy.weight_adapter.BypassInjectionManager()
        for key, value in comfy.lora.load_lora(other, comfy.lora.model_lora_keys_unet(model.model, {})).items():
            manager.add_adapter(key, value, strength=0.6)
        model.set_injections("another", manager.create_injections(model.model))
        return comfy.sd.load_lora_for_models(model, None, adapter(flux_weights, "lora", seed=7), 0.4, 0)[0]

    fast = compiled(twice(), **EXACT)
    assert (sample(twice()) - sample(fast)).abs().max() <= TOLERANCE
    assert compiled_blocks(fast).eager == {}
    with pytest.raises(RecursionError):
        sample(fast)


def test_with_offload_and_quantized_layers(flux, flux_weights):
    with torch.inference_mode():
        model = load({name: weight.clone() for name, weight in flux_weights.items()})
        quantized = quantize_repeated_blocks(model, "int8_weight_only", "", Texts())
    model = bypass(quantized, flux_weights, "lora", 0.5)
    fast = compiled(model, **EXACT)
    assert_parity(model, fast)
    assert compiled_blocks(fast).eager == {}
    model = bypass(flux, flux_weights, "lora", 0.5)
    fast = compiled(offload_repeated_blocks(model, OffloadSettings("0 %"), Texts()), **EXACT)
    assert_parity(model, fast)
    assert compiled_blocks(fast).eager == {}


def test_quantize_after_it_would_lose_it_and_says_so(flux, flux_weights):
    with pytest.raises(ValueError, match=r"bypass_lora.*Put Quantize Repeated Blocks before that node"):
        quantize_repeated_blocks(bypass(flux, flux_weights), "int8_weight_only", "", Texts())


def hooks(model):
    return model.injections["bypass_lora"][0].inject.__closure__[0].cell_contents.hooks


def test_an_adapter_that_is_not_known_runs_eager_and_the_words_help(flux, flux_weights):
    class OtherAdapter(comfy.weight_adapter.LoRAAdapter):
        pass

    model = bypass(flux, flux_weights, layers=["single_blocks.0.linear1"])
    hooks(model)[0].adapter.__class__ = OtherAdapter
    fast = compiled(model)
    assert_parity(model, fast)
    (reason,) = compiled_blocks(fast).eager
    assert "OtherAdapter in bypass mode is not known to HotPath" in reason and "without bypass" in reason
    assert dict(compiled_blocks(fast).compiled) == {"double": 1, "single": 1}


@pytest.mark.parametrize("what", ["adapter", "class", "hook"])
@pytest.mark.sweep(keep=["hook"])
def test_an_adapter_or_hook_altered_by_another_pack_runs_eager(flux, flux_weights, monkeypatch, what):
    model = bypass(flux, flux_weights)
    assert_parity(model, compiled(model))
    kind, hook = comfy.weight_adapter.LoRAAdapter, comfy.weight_adapter.BypassForwardHook
    plain, own, forward = sample(model), kind.h, hook._bypass_forward
    altered = lambda self, x, out: own(self, x, out) * 2  # noqa: E731
    if what == "class":
        monkeypatch.setattr(kind, "h", altered)
    elif what == "hook":
        monkeypatch.setattr(hook, "_bypass_forward", lambda self, x: forward(self, x) * 0.9)
        model = bypass(flux, flux_weights)
    else:
        changed = hooks(model)[0].adapter
        changed.h = altered.__get__(changed)
    assert (sample(model) - plain).abs().max() > 1e-3
    fast = compiled(model)
    assert_parity(model, fast)
    assert compiled_blocks(fast).eager


@pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11")
def test_kept_graphs_serve_another_lora_in_the_next_start(flux, flux_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))

    def kept(model):
        return compile_repeated_blocks(model, CompileSettings(), "all", "all", "error", Texts(), "auto")

    model = bypass(flux, flux_weights, "lora", 0.5)
    assert_parity(model, kept(model))
    LATER.wait()
    monkeypatch.setattr(host_regions, "REGIONS", RegionStore(capacity=64))
    other = bypass(flux, flux_weights, "lora", 0.9, rank=6, seed=4)
    with Counting() as counting:
        fast = kept(other)
        assert_parity(other, fast)
    assert counting.graphs == 0
    assert {region.stats.cache for region in compiled_blocks(fast).regions} == {"hit"}
