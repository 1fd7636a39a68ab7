"""Folders of diffusers, written by diffusers, as MODELs, and MODELs as such folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from changes import in_low_vram
from comfy.sd import load_lora_for_models
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from folders import VARIANTS, lively
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.diffusers_folders import save
from hotpath_pack.host.diffusers_folders.load import diffusers_folders, load_diffusers_flux, load_folder
from hotpath_pack.host.diffusers_folders.save import save_as_diffusers_flux
from sampling import TOLERANCE, Counting, Texts, compiled, load, sample


def positions(rows, columns, axes, first):
    """(first, row, column) for each token, 0 in further axes."""
    ids = torch.zeros(rows, columns, axes)
    ids[..., 0] = first
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1)


def tokens_of(latent, flux2):
    """(batch, tokens, features) as diffusers' pipelines pack a latent."""
    if flux2:
        return latent.flatten(2).transpose(1, 2)
    return latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def latent_of(tokens, rows, columns, flux2):
    grid = tokens.unflatten(1, (rows, columns))
    if flux2:
        return grid.permute(0, 3, 1, 2)
    return grid.unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@torch.inference_mode()
def in_diffusers(transformer, x, timestep, context, y, guidance, ref_latents):
    """What diffusers computes of what the host gives its own model."""
    flux2 = isinstance(transformer, Flux2Transformer2DModel)
    axes, side = (4, 1) if flux2 else (3, 2)
    images = [x, *(ref_latents or ())]
    # The host's reference images begin at 10 in Flux.2.
    ids = [
        positions(image.shape[2] // side, image.shape[3] // side, axes, index * (10 if flux2 else 1))
        for index, image in enumerate(images)
    ]
    text_ids = torch.zeros(context.shape[1], axes)
    inputs = {}
    if flux2:
        text_ids[:, 3] = torch.arange(context.shape[1])
    else:
        inputs["pooled_projections"] = y
    if transformer.config.guidance_embeds or flux2:
        inputs["guidance"] = guidance
    (out,) = transformer(
        hidden_states=torch.cat([tokens_of(image, flux2) for image in images], dim=1),
        encoder_hidden_states=context,
        timestep=timestep,
        img_ids=torch.cat(ids),
        txt_ids=text_ids,
        return_dict=False,
        **inputs,
    )
    rows, columns = x.shape[2] // side, x.shape[3] // side
    return latent_of(out[:, : rows * columns], rows, columns, flux2)


def assert_like_diffusers(model, transformer, **run):
    """Sampled with ``run``, each call of the host's model gives what diffusers does with the same inputs."""
    calls = []

    def keep(module, args, kwargs, out):
        names = ("x", "timestep", "context", "y", "guidance", "ref_latents")
        given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
        calls.append(({name: given[name] for name in names}, out))

    handle = model.model.diffusion_model.register_forward_hook(keep, with_kwargs=True)
    try:
        sample(model, **run)
    finally:
        handle.remove()
    assert calls
    for inputs, out in calls:
        want = in_diffusers(transformer, **inputs)
        assert want.isfinite().all() and want.std() > 0.1
        assert (out - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.sweep(keep=["dev", "flux2-reference"])
def test_gives_what_diffusers_gives_eager_and_compiled(models, variant):
    kind, config, run = VARIANTS[variant]
    transformer = lively(kind, **config)
    transformer.save_pretrained(models / "diffusers" / variant)
    model = load_diffusers_flux(variant, Texts())
    # Generated once for each of the two; what else differs is traced.
    fast = compiled(model, backend="inductor" if variant in ("dev", "flux2") else "aot_eager")
    with Counting() as counting:
        for change in ({}, {"width": 96, "tokens": 7}):
            assert_like_diffusers(model, transformer, **{**run, **change})
            assert_like_diffusers(fast, transformer, **{**run, **change})
    assert (counting.graphs, counting.breaks) == (2, 0)


@pytest.mark.parametrize("variant", ["dev", "schnell", "fill", "flux2", "flux2-klein"])
@pytest.mark.sweep(keep=["dev", "flux2-klein"])
def test_saved_it_loads_in_diffusers_with_equal_outputs(models, variant, monkeypatch):
    monkeypatch.setattr(save, "_LARGEST_FILE", "10MB")
    kind, config, run = VARIANTS[variant]
    lively(kind, **config).save_pretrained(models / "diffusers" / variant)
    model = load_diffusers_flux(variant, Texts())
    saved = save_as_diffusers_flux(model, "diffusers/ComfyUI", Texts())
    assert saved == models / "output" / "diffusers" / "ComfyUI_00001_"
    assert len(list(saved.glob("*.safetensors"))) > 1, "in more than one file"
    transformer = kind.from_pretrained(saved)
    want = kind.from_pretrained(models / "diffusers" / variant).state_dict()
    assert all(weight.equal(want[name]) for name, weight in transformer.state_dict().items())
    assert_like_diffusers(model, transformer, **run)
    again = load_diffusers_flux("ComfyUI_00001_", Texts())
    assert sample(again, **run).equal(sample(model, **run))
    assert save_as_diffusers_flux(model, "diffusers/ComfyUI", Texts()).name == "ComfyUI_00002_"


@pytest.mark.parametrize("place", [lambda model: model, in_low_vram], ids=["resident", "offloaded"])
def test_a_lora_is_baked_in_and_the_model_stays_as_it_is(models, flux, flux_weights, place):
    plain = sample(flux)
    patched = place(load_lora_for_models(flux, None, checkpoints.lora(flux_weights), 0.7, 0)[0])
    want = sample(patched)
    assert (want - plain).abs().max() > 0.01
    saved = save_as_diffusers_flux(patched, "diffusers/styled", Texts())
    assert_like_diffusers(patched, FluxTransformer2DModel.from_pretrained(saved))
    again = load_folder(saved)
    assert (sample(again) - want).abs().max() <= TOLERANCE
    assert sample(flux).equal(plain) and sample(patched).equal(want)


def test_a_lora_on_a_loaded_folder_is_the_one_of_a_checkpoint(models, flux, flux_weights):
    again = load_folder(save_as_diffusers_flux(flux, "diffusers/plain", Texts()))
    lora = checkpoints.lora(flux_weights)
    with_it = [load_lora_for_models(model, None, lora, 0.7, 0)[0] for model in (flux, again)]
    assert sample(with_it[0]).equal(sample(with_it[1]))


def test_a_second_copy_is_read_from_the_folder_again(dev):
    with torch.inference_mode():
        model = load_diffusers_flux("dev", Texts())
        copy = model.clone(force_deepcopy=True)
    assert copy.model is not model.model
    assert sample(copy).equal(sample(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(models, dtype):
    kind, config, _ = VARIANTS["dev"]
    lively(kind, **config).to(dtype).save_pretrained(models / "diffusers" / "half")
    model = load_diffusers_flux("half", Texts())
    twin = load({name: weight.detach().clone() for name, weight in model.model.diffusion_model.state_dict().items()})
    assert model.model.get_dtype() == twin.model.get_dtype()
    assert sample(model).equal(sample(twin))


def test_all_folders_that_hold_a_transformer_are_found_by_name(models, dev):
    kind, config, _ = VARIANTS["schnell"]
    lively(kind, **config).save_pretrained(models / "diffusion_models" / "mine" / "schnell")
    for other in ("text_encoder", "vae"):
        (dev.parent / other).mkdir()
        (dev.parent / other / "config.json").write_text("{}")
    (models / "diffusers" / ".unfinished").mkdir()
    (models / "diffusers" / ".unfinished" / "config.json").write_text("{}")
    assert diffusers_folders() == {"dev": dev, "mine/schnell": models / "diffusion_models" / "mine" / "schnell"}


@pytest.mark.parametrize("name", ["../output", "/etc", "dev/transformer", "dev/../dev", "", ".", "nul\0"])
def test_a_name_that_is_not_listed_is_refused(dev, name):
    with pytest.raises(ValueError, match=r"folder: there is no .* choose another: dev"):
        load_diffusers_flux(name, Texts())


def test_it_tells_what_it_reads(dev):
    text = Texts()
    load_diffusers_flux("dev", text)
    assert text.seen[0] == "reading config.json ..."
    assert text.seen[2] == "reading diffusion_pytorch_model-00002-of-00003.safetensors (2 of 3) ..."
    assert text.seen[-1] == "FluxTransformer2DModel: 112 weights from 3 files"


@pytest.mark.parametrize("make", ["quantized", "chroma"])
@pytest.mark.sweep(keep=["quantized"])
def test_what_diffusers_has_no_class_for_is_not_saved(models, flux_weights, make):
    if make == "chroma":
        model, message = load(checkpoints.chroma()), "model: this is Chroma, and only Flux.1 and Flux.2"
    else:
        model = load(dict(flux_weights), dtype=torch.float8_e4m3fn)
        message = "model: .* is quantized, and diffusers has no place"
    with pytest.raises(ValueError, match=message):
        save_as_diffusers_flux(model, "diffusers/no", Texts())
    assert not (models / "output").exists()


def test_a_failed_save_leaves_nothing(models, flux, monkeypatch):
    def full(self, folder, **options):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FluxTransformer2DModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_as_diffusers_flux(flux, "diffusers/full", Texts())
    assert list((models / "output" / "diffusers").iterdir()) == []


def test_without_diffusers_the_error_says_what_to_install(dev, flux, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for what, run in (
        ("Load Diffusers Flux", lambda: load_diffusers_flux("dev", Texts())),
        ("Save as Diffusers Flux", lambda: save_as_diffusers_flux(flux, "diffusers/x", Texts())),
    ):
        with pytest.raises(RuntimeError, match=f"{what} needs the package diffusers .* pip install 'diffusers>="):
            run()


HOST_TESTS = Path(__file__).resolve().parents[1]
READ_IN_A_NEW_PROCESS = """
import importlib.util
import sys
from pathlib import Path

for folder in Path(sys.argv[1]).parent, Path(sys.argv[1]):
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"conftest_of_{folder.name}", folder / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
from hotpath_pack.host.diffusers_folders.load import load_folder


def size(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

load_folder(Path(sys.argv[2]))
before = size("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_folder(Path(sys.argv[3]))
print(size("VmHWM") - before, model.model_size())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_reading_takes_the_weights_and_one_file_of_them(dev, tmp_path):
    """After a small one was read, so that what is imported is no part of it."""
    kind, config, _ = VARIANTS["dev"]
    large = tmp_path / "large"
    kind(**{**config, "num_attention_heads": 8, "num_single_layers": 6}).save_pretrained(large, max_shard_size="64MB")
    files = [path.stat().st_size for path in large.glob("*.safetensors")]
    assert len(files) >= 8
    command = [sys.executable, "-c", READ_IN_A_NEW_PROCESS, str(HOST_TESTS), str(dev), str(large)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split()[-2:])
    assert weights > 400 * 2**20
    assert peak <= weights + max(files) + 16 * 2**20, "16 MiB for what Python and the allocator hold"


def test_with_dynamic_vram_the_weights_get_memory_of_their_own(dev, monkeypatch):
    """The host then makes layers without weights, and keeps the tensors that it is given; as far as a CPU shows it."""
    import comfy.memory_management
    from comfy.model_patcher import ModelPatcher

    want = load_folder(dev)
    with monkeypatch.context() as patched:
        patched.setattr(comfy.memory_management, "aimdo_enabled", True)
        patched.setattr(ModelPatcher, "is_dynamic", lambda self: True)
        model = load_folder(dev)
    for name, weight in model.model.diffusion_model.named_parameters():
        assert weight.is_contiguous() and weight.equal(want.model.diffusion_model.get_parameter(name)), name
    assert sample(model).equal(sample(want))
