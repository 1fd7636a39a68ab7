"""A Flux transformer in diffusers' format as a MODEL: finds the folders, checks what is in one and reads it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Size, nn

from .diffusers import FIXED, Place, on_meta, places, require_diffusers, unlike_the_host
from .progress import NodeText

log = logging.getLogger(__name__)

NODE = "Load Diffusers Flux"
CONFIG = "config.json"
# More names than this are counted rather than listed.
_FEW = 3
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Stored:
    """A weight in a file, as the file's header says."""

    file: Path
    shape: Size
    dtype: torch.dtype


def diffusers_folders() -> dict[str, Path]:
    """Transformers by the name to choose them by: all folders with a ``config.json``, or with one in ``transformer/``,
    in the host's paths for diffusers and for diffusion models."""
    roots = [
        *folder_paths.get_folder_paths("diffusers"),
        os.path.join(folder_paths.get_output_directory(), "diffusers"),
        *folder_paths.get_folder_paths("diffusion_models"),
    ]
    found: dict[str, Path] = {}
    for root in roots:
        for folder, names, files in os.walk(root, followlinks=True):
            path = Path(folder)
            transformer = path if CONFIG in files else path / "transformer"
            if transformer is path or (transformer / CONFIG).is_file():
                found.setdefault(path.relative_to(root).as_posix(), transformer)
                # The rest of a pipeline.
                names.clear()
            names[:] = sorted(name for name in names if not name.startswith("."))
    return found


def load_diffusers_flux(name: str, text: NodeText) -> ModelPatcher:
    """The MODEL of one of ``diffusers_folders``, on weights in the dtype that the host chooses for it.

    Files are mapped and copied one at a time into the model's own memory, so that never more than the weights and one
    file of them are resident.

    Raises:
        RuntimeError: diffusers is not installed.
        ValueError: there is no such folder, or what it holds is damaged, incomplete or not a Flux that the host can
            run; the message names the file.
    """
    folders = diffusers_folders()
    if name not in folders:
        raise ValueError(
            f"folder: there is no {name!r} with a {CONFIG} or a transformer/{CONFIG} in models/diffusers. "
            f"There are: {', '.join(list(folders)[:_FEW]) or 'none'}{' ...' if len(folders) > _FEW else ''}"
        )
    return load_folder(folders[name], text)


def load_folder(folder: Path, text: NodeText | None = None, disable_dynamic: bool = False) -> ModelPatcher:
    """As ``load_diffusers_flux``. The host calls it again for a second copy (multi-GPU, without dynamic VRAM)."""
    text = text or NodeText(None)
    text.show(f"reading {CONFIG} ...")
    config, shapes = _read_config(folder)
    files = _weight_files(folder)
    stored = _stored(folder, files)
    _check(folder, config, shapes, stored)
    table = {key: place for key, place in places(config).items() if key in shapes}
    model = _without_weights(folder, table, stored, disable_dynamic)
    weights = _own_memory(model.model.diffusion_model)
    progress = comfy.utils.ProgressBar(len(stored))
    for number, file in enumerate(files, 1):
        text.show(f"reading {file.name} ({number} of {len(files)}) ...")
        _read(file, table, weights, progress)
    text.show(f"{config['_class_name']}: {len(stored)} weights from {len(files)} file{'s' * (len(files) > 1)}")
    log.info("loaded %s from %s", config["_class_name"], folder)
    model.cached_patcher_init = (load_folder, (folder, None))
    return model


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Size]]:
    """The config with diffusers' defaults filled in, and the shapes of the weights that go with it."""
    diffusers, path = require_diffusers(NODE), folder / CONFIG
    try:
        given = diffusers.FluxTransformer2DModel.load_config(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a config of diffusers: {error}") from error
    kind: Any = given.get("_class_name") if isinstance(given, dict) else None
    if kind not in FIXED:
        raise ValueError(f"{path}: this is {kind or 'no model of diffusers'}, and not {' or '.join(FIXED)}.")
    if quantization := given.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        raise ValueError(
            f"{path}: the weights are quantized by {method}, in a layout that ComfyUI has no layers for. Take the "
            "full-precision folder; Quantize Repeated Blocks makes it as small."
        )
    try:
        transformer = on_meta(getattr(diffusers, kind), given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: diffusers can't make a {kind} of it: {error}") from error
    config = {**transformer.config, "_class_name": kind}
    if other := list(unlike_the_host(config)):
        raise ValueError(f"{path}: ComfyUI's Flux computes otherwise: {'; '.join(other)}.")
    return config, {name: tensor.shape for name, tensor in transformer.state_dict().items()}


def _weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors: those of its index, or its only one."""
    indices, files = sorted(folder.glob("*.safetensors.index*.json")), sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _shards(indices[0])
    if not indices and len(files) == 1:
        return files
    if not indices and not files:
        raise ValueError(f"{folder} holds no .safetensors file. Download the weights again, in that format.")
    names = ", ".join(path.name for path in indices or files)
    raise ValueError(f"{folder} holds more than one set of weights ({names}). Leave the one to use.")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}). Download it again.") from error
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of this folder.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing; {index.name} lists it. Download it again.")
    return [index.parent / name for name in names]


def _stored(folder: Path, files: Sequence[Path]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in files:
        try:
            # Maps the file and reads its header alone.
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    tensor = file.get_tensor(key)
                    if key in stored:
                        raise ValueError(f"{path}: {key} is in {stored[key].file.name} too.")
                    stored[key] = Stored(path, tensor.shape, tensor.dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or only in part downloaded: {error}. Download it again.") from error
    return stored


def _check(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Size], stored: Mapping[str, Stored]) -> None:
    """Raise ValueError, which names the file, unless the files hold the model's weights and nothing else."""
    files = ", ".join(dict.fromkeys(weight.file.name for weight in stored.values()))
    if missing := [key for key in shapes if key not in stored]:
        raise ValueError(f"{folder}: {files} lack {_some(missing)} of the {config['_class_name']} of {CONFIG}.")
    for key, weight in stored.items():
        if key not in shapes:
            unknown = [name for name in stored if name not in shapes]
            raise ValueError(f"{weight.file}: {_some(unknown)} belong to no {config['_class_name']} of {CONFIG}.")
        if weight.shape != shapes[key]:
            raise ValueError(f"{weight.file}: {key} is {list(weight.shape)}, and by {CONFIG} {list(shapes[key])}.")
        if weight.dtype not in _FLOATS:
            raise ValueError(f"{weight.file}: {key} is {weight.dtype}, which ComfyUI's Flux does not compute with.")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest} more weights" if rest > 0 else "")


def _without_weights(
    folder: Path, table: Mapping[str, Place], stored: Mapping[str, Stored], disable_dynamic: bool
) -> ModelPatcher:
    """The host's loader, on stand-ins of the right shapes and dtypes that take no memory."""
    shapes: dict[str, tuple[Size, torch.dtype]] = {}
    for key, place in table.items():
        shape, dtype = stored[key].shape, stored[key].dtype
        if place.rows is not None:
            shape = Size((max(sum(place.rows), shapes.get(place.name, (Size([0]),))[0][0]), *shape[1:]))
        shapes[place.name] = shape, dtype
    stand_ins = {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in shapes.items()}
    model = comfy.sd.load_diffusion_model_state_dict(stand_ins, disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError(f"{folder}: this ComfyUI does not know a Flux of these shapes. Update ComfyUI.")
    return model


def _own_memory(diffusion_model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's weights by name, with memory of their own where the host kept a stand-in."""
    for name, weight in list(diffusion_model.named_parameters()):
        if weight.untyped_storage().nbytes() < weight.nbytes:
            own = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            comfy.utils.set_attr_param(diffusion_model, name, own)
    return dict(diffusion_model.named_parameters())


@torch.no_grad()
def _read(
    path: Path, table: Mapping[str, Place], weights: Mapping[str, nn.Parameter], progress: comfy.utils.ProgressBar
) -> None:
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            comfy.model_management.throw_exception_if_processing_interrupted()
            place, tensor = table[key], file.get_tensor(key)
            place.within(weights).copy_(tensor if place.convert is None else place.convert(tensor))
            progress.update(1)
