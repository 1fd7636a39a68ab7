"""A Flux transformer in diffusers' format as a MODEL: finds the folders, checks what is in one and reads it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from torch import Size, Tensor, nn

from ..telling.progress import NodeText
from .format import FIXED, Place, on_meta, places, require_diffusers, unlike_the_host
from .int8 import Int8Rows, int8_layout

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
            f"folder: there is no {name!r} with a {CONFIG} or a transformer/{CONFIG} in models/diffusers, "
            "models/diffusion_models or output/diffusers. Put it there and refresh the page, or choose another: "
            f"{', '.join(list(folders)[:_FEW]) or 'none'}{' ...' if len(folders) > _FEW else ''}"
        )
    with text.guarded():
        return load_folder(folders[name], text)


def load_folder(folder: Path, text: NodeText | None = None, disable_dynamic: bool = False) -> ModelPatcher:
    """As ``load_diffusers_flux``. The host calls it again for a second copy (multi-GPU, without dynamic VRAM)."""
    text = text or NodeText(None)
    text.show(f"reading {CONFIG} ...", "working")
    config, shapes, layout = _read_config(folder)
    files = _weight_files(folder)
    stored = _stored(files)
    dtypes = _FLOATS if layout is None else (*_FLOATS, torch.int8)
    _check(folder, config, shapes, stored if layout is None else layout.weights(stored), dtypes)
    table = {key: place for key, place in places(config).items() if key in shapes}
    tensors = _tensors(files, len(stored), text)
    if layout is None:
        model = _host_model(folder, _stand_ins(table, stored), disable_dynamic)
        _fill(model.model.diffusion_model, tensors, table)
    else:
        model = _host_model(folder, layout.state_dict(folder, dict(tensors), table), disable_dynamic)
    text.show(f"{config['_class_name']}: {len(stored)} weights from {len(files)} file{'s' * (len(files) > 1)}")
    log.info("loaded %s from %s", config["_class_name"], folder)
    model.cached_patcher_init = (load_folder, (folder, None))
    return model


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Size], Int8Rows | None]:
    """The config with diffusers' defaults filled in, the shapes of the weights that go with it, and how they are
    quantized."""
    diffusers, path = require_diffusers(NODE), folder / CONFIG
    try:
        given = diffusers.FluxTransformer2DModel.load_config(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a config of diffusers: {error}") from error
    kind: Any = given.get("_class_name") if isinstance(given, dict) else None
    if kind not in FIXED:
        raise ValueError(
            f"{path}: this is {kind or 'no model of diffusers'}, and not {' or '.join(FIXED)}. Choose a Flux.1 or "
            "Flux.2."
        )
    quantization = given.get("quantization_config")
    layout = int8_layout(path, quantization) if quantization else None
    try:
        transformer = on_meta(getattr(diffusers, kind), given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: diffusers can't make a {kind} of it: {error}") from error
    config = {**transformer.config, "_class_name": kind}
    if other := list(unlike_the_host(config)):
        raise ValueError(f"{path}: ComfyUI's Flux computes otherwise: {'; '.join(other)}. Use it with diffusers.")
    return config, {name: tensor.shape for name, tensor in transformer.state_dict().items()}, layout


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
            raise ValueError(f"{index} names {name!r}, which is not a file of this folder. Download it again.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing; {index.name} lists it. Download it again.")
    return [index.parent / name for name in names]


def _stored(files: Sequence[Path]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in files:
        try:
            # Maps the file and reads its header alone.
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    tensor = file.get_tensor(key)
                    if key in stored:
                        raise ValueError(f"{path}: {key} is in {stored[key].file.name} too. Download it again.")
                    stored[key] = Stored(path, tensor.shape, tensor.dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or only in part downloaded: {error}. Download it again.") from error
    return stored


def _check(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, Size],
    stored: Mapping[str, Stored],
    dtypes: Collection[torch.dtype],
) -> None:
    """Raise ValueError, which names the file, unless the files hold the model's weights and nothing else."""
    files = ", ".join(dict.fromkeys(weight.file.name for weight in stored.values()))
    if missing := [key for key in shapes if key not in stored]:
        what = f"{_some(missing)} of the {config['_class_name']} of {CONFIG}"
        raise ValueError(f"{folder}: {files} lack {what}. Download it again.")
    for key, weight in stored.items():
        if key not in shapes:
            unknown = [name for name in stored if name not in shapes]
            what = f"{_some(unknown)} belong to no {config['_class_name']} of {CONFIG}"
            raise ValueError(f"{weight.file}: {what}. Download it again.")
        if weight.shape != shapes[key]:
            what = f"{key} is {list(weight.shape)}, and by {CONFIG} {list(shapes[key])}"
            raise ValueError(f"{weight.file}: {what}. Download it again.")
        if weight.dtype not in dtypes:
            what = f"{key} is {weight.dtype}, which ComfyUI's Flux does not compute with"
            raise ValueError(f"{weight.file}: {what}. Take a folder in bf16, fp16 or fp32.")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest} more weights" if rest > 0 else "")


def _tensors(files: Sequence[Path], count: int, text: NodeText) -> Iterator[tuple[str, Tensor]]:
    """All weights by diffusers' name, each mapped from its file and read when it is used."""
    progress = comfy.utils.ProgressBar(count)
    for number, path in enumerate(files, 1):
        text.show(f"reading {path.name} ({number} of {len(files)}) ...", "working")
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                comfy.model_management.throw_exception_if_processing_interrupted()
                yield key, file.get_tensor(key)
                progress.update(1)


def _stand_ins(table: Mapping[str, Place], stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The host's state dict with the right shapes and dtypes, which takes no memory."""
    shapes: dict[str, tuple[Size, torch.dtype]] = {}
    for key, place in table.items():
        shape, dtype = stored[key].shape, stored[key].dtype
        if place.rows is not None:
            rows = shapes[place.name][0][0] if place.name in shapes else 0
            shape = Size((max(rows, sum(place.rows)), *shape[1:]))
        shapes[place.name] = shape, dtype
    return {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in shapes.items()}


def _host_model(folder: Path, state_dict: dict[str, Tensor], disable_dynamic: bool) -> ModelPatcher:
    model = comfy.sd.load_diffusion_model_state_dict(state_dict, disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError(f"{folder}: this ComfyUI does not know a Flux of these shapes. Update ComfyUI.")
    return model


@torch.no_grad()
def _fill(diffusion_model: nn.Module, tensors: Iterator[tuple[str, Tensor]], table: Mapping[str, Place]) -> None:
    for name, weight in list(diffusion_model.named_parameters()):
        # With dynamic VRAM the host keeps a stand-in as it is.
        if weight.untyped_storage().nbytes() < weight.nbytes:
            own = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            comfy.utils.set_attr_param(diffusion_model, name, own)
    weights = dict(diffusion_model.named_parameters())
    for key, tensor in tensors:
        place = table[key]
        place.within(weights).copy_(tensor if place.convert is None else place.convert(tensor))
