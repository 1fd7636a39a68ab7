"""Folders of diffusers, written by diffusers, as MODELs, and MODELs as such folders."""

import json
import subprocess
import sys
from pathlib import Path

import comfy.quant_ops
import folder_paths
import pytest
import torch
from changes import in_low_vram
from comfy.sd import load_lora_for_models
from conditions import in_fill, with_reference
from diffusers import AutoencoderKL, Flux2Transformer2DModel, FluxTransformer2DModel
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.measure import snr
from hotpath_pack.host.diffusers_folders.load import diffusers_folders, load_diffusers_flux, load_folder
from hotpath_pack.host.diffusers_folders.save import save_as_diffusers_flux
from safetensors.torch import load_file
from sampling import TOLERANCE, Counting, Texts, assert_two_graphs, compiled, load, sample

TINY = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=64)
FLUX1 = dict(TINY, pooled_projection_dim=32)
VARIANTS = {
    "dev": (FluxTransformer2DModel, dict(FLUX1, guidance_embeds=True), {}),
    "schnell": (FluxTransformer2DModel, FLUX1, {}),
    "fill": (FluxTransformer2DModel, dict(FLUX1, guidance_embeds=True, in_channels=384, out_channels=64), in_fill()),
    "kontext": (FluxTransformer2DModel, dict(FLUX1, guidance_embeds=True), with_reference(16, "offset")),
    "flux2": (Flux2Transformer2DModel, TINY, {}),
    "flux2-klein": (Flux2Transformer2DModel, dict(TINY, guidance_embeds=False), {}),
    "flux2-reference": (Flux2Transformer2DModel, TINY, with_reference(128, "index")),
}


def lively(kind, **config):
    """diffusers' model with weights of which each changes the result, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    model = kind(**config).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.normal_(1 if "norm_" in name and "linear" not in name else 0, 0.05, generator=generator)
    return model


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Empty folders for models and output."""
    paths = {name: ([str(tmp_path / name)], set()) for name in ("diffusers", "diffusion_models")}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


@pytest.fixture
def dev(models):
    """A Flux.1 dev in three files."""
    kind, config, _ = VARIANTS["dev"]
    folder = models / "diffusers" / "dev" / "transformer"
    lively(kind, **config).save_pretrained(folder, max_shard_size="12MB")
    assert len(list(folder.glob("*-of-00003.safetensors"))) == 3
    return folder


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
def test_saved_it_loads_in_diffusers_with_equal_outputs(models, variant):
    kind, config, run = VARIANTS[variant]
    lively(kind, **config).save_pretrained(models / "diffusers" / variant)
    model = load_diffusers_flux(variant, Texts())
    saved = save_as_diffusers_flux(model, "diffusers/ComfyUI", Texts(), max_shard_size="10MB")
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
    with pytest.raises(ValueError, match=r"folder: there is no .* There are: dev"):
        load_diffusers_flux(name, Texts())


def test_it_tells_what_it_reads(dev):
    text = Texts()
    load_diffusers_flux("dev", text)
    assert text.seen[0] == "reading config.json ..."
    assert text.seen[2] == "reading diffusion_pytorch_model-00002-of-00003.safetensors (2 of 3) ..."
    assert text.seen[-1] == "FluxTransformer2DModel: 112 weights from 3 files"


def change_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def second(folder):
    return folder / "diffusion_pytorch_model-00002-of-00003.safetensors"


def without_first_line(path):
    path.write_bytes(path.read_bytes()[:-100])


def in_another_place(weights):
    weights["proj_out.bias"] = "../../secret.safetensors"


DAMAGE = {
    "a missing shard": (lambda folder: second(folder).unlink(), "00002-of-00003.safetensors is missing; .* lists it"),
    "half downloaded": (
        lambda folder: without_first_line(second(folder)),
        "00002-of-00003.safetensors is damaged or only in part downloaded: .*Download it again",
    ),
    "a pointer of Git LFS": (
        lambda folder: second(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "00002-of-00003.safetensors is damaged",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("diffusion*")],
        "transformer holds no .safetensors file",
    ),
    "another model": (
        lambda folder: change_config(folder, _class_name=AutoencoderKL.__name__),
        "config.json: this is AutoencoderKL, and not FluxTransformer2DModel or Flux2Transformer2DModel",
    ),
    "no class": (lambda folder: change_config(folder, _class_name=None), "config.json: this is no model of diffusers"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json can't be read as a config"),
    "no mapping": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "text for a number": (
        lambda folder: change_config(folder, num_layers="two"),
        "config.json: diffusers can't make a FluxTransformer2DModel of it",
    ),
    "more blocks in the config": (
        lambda folder: change_config(folder, num_layers=3),
        r"lack transformer_blocks.2.norm1.linear.weight, .* and .* more weights of the FluxTransformer2DModel",
    ),
    "fewer blocks in the config": (
        lambda folder: change_config(folder, num_single_layers=1),
        r"00003.safetensors: single_transformer_blocks.1.\S+, .* belong to no FluxTransformer2DModel of config.json",
    ),
    "another width in the config": (
        lambda folder: change_config(folder, joint_attention_dim=96),
        r"00003.safetensors: context_embedder.weight is \[256, 64\], and by config.json \[256, 96\]",
    ),
    "another rotary embedding": (
        lambda folder: change_config(folder, axes_dims_rope=[32, 48, 48]),
        r"config.json: ComfyUI's Flux computes otherwise: axes_dims_rope is \[32, 48, 48\] and ComfyUI has \(16",
    ),
    "quantized": (
        lambda folder: change_config(
            folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "config.json: the weights are quantized by bitsandbytes .* in a layout that ComfyUI has no layers for",
    ),
    "an index that leads elsewhere": (
        lambda folder: change_index(folder, in_another_place),
        r"index.json names '../../secret.safetensors', which is not a file of this folder",
    ),
    "an index of nothing": (
        lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[1]"),
        "index.json is no index of safetensors files",
    ),
    "two sets": (
        lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}"),
        "holds more than one set of weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_with_a_folder_is_named_with_its_file(dev, damage):
    make, message = DAMAGE[damage]
    make(dev)
    with pytest.raises(ValueError, match=message) as failed:
        load_diffusers_flux("dev", Texts())
    assert str(dev) in str(failed.value)


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


# Named as bitsandbytes 0.50.2 and optimum-quanto 0.2.7 (through diffusers 0.42.1) were seen to name them.
INT8 = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda layer, data, scale: {
            f"{layer}.weight": data,
            f"{layer}.SCB": scale.flatten() * 127,
            f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),
        },
    ),
    "quanto": (
        {"quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": None},
        lambda layer, data, scale: {
            f"{layer}.weight._data": data,
            f"{layer}.weight._scale": scale,
            f"{layer}.input_scale": torch.ones(()),
            f"{layer}.output_scale": torch.ones(()),
        },
    ),
}


def save_int8(method, folder, skip=()):
    """A Flux.1 dev whose Linear layers are int8; returns diffusers' model of the same dequantized weights."""
    kind, config, _ = VARIANTS["dev"]
    transformer = lively(kind, **config)
    given, stored_as = INT8[method]
    weights = dict(transformer.state_dict())
    for layer, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and layer not in skip:
            weight = weights.pop(f"{layer}.weight")
            scale = weight.abs().amax(1, keepdim=True) / 127
            data = (weight / scale).round().to(torch.int8)
            weights.update(stored_as(layer, data, scale))
            module.weight = torch.nn.Parameter(data * scale, requires_grad=False)
    transformer.save_config(folder)
    change_config(folder, quantization_config=given)
    checkpoints.save(folder / "diffusion_pytorch_model.safetensors", weights)
    return transformer


has_int8 = "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS
needs_int8 = pytest.mark.skipif(not has_int8, reason="this ComfyUI has no such layers")


def test_int8_in_a_comfyui_without_such_layers(models, monkeypatch):
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "int8_tensorwise", raising=False)
    save_int8("quanto", models / "diffusers" / "small")
    with pytest.raises(ValueError, match="config.json: the weights are quantized by quanto in int8, .* Update ComfyUI"):
        load_diffusers_flux("small", Texts())


@needs_int8
@pytest.mark.parametrize("method", INT8)
def test_int8_weights_are_loaded_as_they_are(models, method):
    transformer = save_int8(method, models / "diffusers" / "small")
    # As nodes do; the host needs it for quantized weights.
    with torch.inference_mode():
        model = load_diffusers_flux("small", Texts())
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert layer.quant_format == "int8_tensorwise"
    want = [transformer.transformer_blocks[0].attn.get_submodule(name).weight for name in ("to_q", "to_k", "to_v")]
    assert (layer.weight.dequantize().float() - torch.cat(want)).abs().max() < 1e-2
    full = load_folder(save_full(transformer, models))
    assert snr(sample(full), sample(model)) > 35
    assert_two_graphs(model)


def change_weights(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    checkpoints.save(path, weights)


@needs_int8
@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("bitsandbytes", {"proj_out.SCB": torch.ones(3)}, "proj_out has 3 scales for 64 rows of torch.int8"),
        (
            "bitsandbytes",
            {"proj_out.weight": torch.ones(64, 256)},
            "proj_out has 64 scales for 64 rows of torch.float32",
        ),
        ("bitsandbytes", {"proj_out.weight_format": torch.tensor(1)}, "proj_out.weight_format is not 0"),
        ("quanto", {"proj_out.input_scale": torch.tensor(0.5)}, "proj_out.input_scale is not 1"),
        ("quanto", {"stray.weight._scale": torch.ones(3)}, "stray.weight._scale belong to no FluxTransformer2DModel"),
    ],
)
def test_int8_that_the_hosts_layers_cannot_express(models, method, change, message):
    save_int8(method, models / "diffusers" / "odd")
    change_weights(models / "diffusers" / "odd", lambda weights: weights.update(change))
    with pytest.raises(ValueError, match=message):
        load_diffusers_flux("odd", Texts())


def save_full(transformer, models):
    transformer.save_pretrained(models / "full")
    return models / "full"


@needs_int8
def test_half_of_a_merged_layer_quantized(models):
    save_int8("quanto", models / "diffusers" / "mixed", skip=["transformer_blocks.1.attn.to_k"])
    with pytest.raises(
        ValueError, match=r"mixed: transformer_blocks.1.attn.to_q.weight, .* not all of them are quantized"
    ):
        load_diffusers_flux("mixed", Texts())


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            r"bitsandbytes \(bnb_4b.*nf4\)",
        ),
        ({"quant_method": "torchao", "quant_type": "int4wo"}, r"torchao \(quant_type int4wo\)"),
        ({"quant_method": "quanto", "weights_dtype": "float8"}, r"quanto \(weights_dtype float8\)"),
        ({"quant_method": "gguf"}, "gguf"),
        ({"bits": 3}, "an unknown method"),
    ],
)
def test_other_quantization_is_refused_with_the_reason(dev, quantization, told):
    change_config(dev, quantization_config=quantization)
    with pytest.raises(
        ValueError, match=f"config.json: the weights are quantized by {told}.* ComfyUI has no layers for"
    ):
        load_diffusers_flux("dev", Texts())


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
