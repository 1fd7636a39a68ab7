"""Compiled blocks as one file that moves to a machine which is the same: a render farm's, a container's."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher

from ...hotpath.artifacts import Refused, read_bundle, write_bundle
from ...hotpath.environment import difference
from ..models import require_model
from .artifacts import facts, store
from .compile import compiled_blocks
from .when import LATER

log = logging.getLogger(__name__)

FOLDER = "compiled_blocks"
SUFFIX = ".hotpath"


def add_folder() -> None:
    """Let the host look for bundles as it does for models, in the models folder and where the save node puts them."""
    for base in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, str(Path(base) / FOLDER))


def bundle_names() -> list[str]:
    add_folder()
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]


def save_bundle(model: ModelPatcher, filename_prefix: str) -> tuple[str, str]:
    """Write the compiled blocks of ``model`` below the output folder; returns the path and what to tell.

    Raises:
        ValueError: ``model`` is no MODEL, is not compiled, or has nothing that can be kept.
        OSError: the file can't be written.
    """
    require_model(model)
    blocks = compiled_blocks(model)
    if blocks is None:
        raise ValueError(
            "model: it does not pass through Compile Repeated Blocks. Connect the MODEL that comes out of that node."
        )
    LATER.wait()
    kept = [region.kept for region in blocks.regions if region.kept is not None]
    stored = [entry for entry in (each.stored() for each in kept) if entry.graphs]
    if not stored:
        why = sorted({region.stats.cache for region in blocks.regions})
        raise ValueError(
            f"model: nothing of it was compiled in a form that can be saved ({', '.join(why) or 'not sampled yet'}). "
            "Set `cache` of Compile Repeated Blocks to 'auto', and connect the sampler's output to `after`."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
    path = Path(folder) / f"{name}_{counter:05}_{SUFFIX}"
    size = write_bundle(path, stored, store())
    graphs = sum(len(entry.graphs) for entry in stored)
    return str(path), f"{path}: {len(stored)} regions, {graphs} graphs, {size / 2**20:.1f} MiB"


def load_bundle(name: str, trust_foreign: bool) -> str:
    """Put what the bundle ``name`` holds where Compile Repeated Blocks looks; returns what to tell.

    Raises:
        ValueError: there is no such bundle, it is damaged, or it is not this user's own and not trusted.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or not name.endswith(SUFFIX):
        raise ValueError(f"file: {name!r} is not in {FOLDER}. Save it there, or copy it to models/{FOLDER}.")
    if trust_foreign and _reachable_over_http(Path(path)):
        raise ValueError(
            f"file: {name} lies in a folder that clients of ComfyUI's HTTP API can upload to, so that anyone may "
            f"have put it there and `trust_foreign` does not apply. Move it to models/{FOLDER}."
        )
    try:
        entries = read_bundle(Path(path), store(), trust_foreign)
    except Refused as reason:
        raise ValueError(
            f"file: {name} was not loaded: {reason}. A file of compiled blocks is a program that runs with all your "
            "rights. If you trust who made this one, set `trust_foreign`; if it is damaged, save it again."
        ) from reason
    if trust_foreign:
        log.warning("%s: compiled blocks were loaded without a check of who made them", path)
    graphs = sum(len(entry.graphs) for entry in entries)
    now = facts(comfy.model_management.get_torch_device())
    if others := {other for entry in entries if (other := difference(entry.facts, now))}:
        return f"{name} does not fit this machine, and its blocks will be compiled anew: {'; '.join(sorted(others))}"
    return f"{name}: {len(entries)} regions, {graphs} graphs are ready for Compile Repeated Blocks"


def _reachable_over_http(path: Path) -> bool:
    folders = (
        folder_paths.get_output_directory(),
        folder_paths.get_input_directory(),
        folder_paths.get_temp_directory(),
    )
    return any(path.resolve().is_relative_to(Path(folder).resolve()) for folder in folders)
