"""A MODEL of Flux as a folder that diffusers loads."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..models import require_model
from ..telling.progress import NodeText
from .format import config_of, require_diffusers, transformer_of

log = logging.getLogger(__name__)

NODE = "Save as Diffusers Flux"
_LARGEST_FILE = "10GB"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def save_as_diffusers_flux(model: ModelPatcher, filename_prefix: str, text: NodeText) -> Path:
    """Write ``model``, its LoRAs baked in as the host's ModelSave bakes them, below the host's output folder.

    diffusers' own class writes ``config.json`` and the files, so that its ``from_pretrained`` loads them. The folder
    gets its name once it is complete.

    Args:
        filename_prefix: as of the host's Save nodes.

    Raises:
        RuntimeError: diffusers is not installed.
        ValueError: ``model`` is no MODEL of Flux.1 or Flux.2, or is quantized.
    """
    require_diffusers(NODE)
    require_model(model)
    diffusion_model: Any = model.model.diffusion_model
    config = config_of(diffusion_model)
    for name, weight in diffusion_model.named_parameters():
        if isinstance(weight, QuantizedTensor) or weight.dtype not in _FLOATS:
            raise ValueError(
                f"model: {name} is quantized, and diffusers has no place for the scales of ComfyUI's formats. Save the "
                "MODEL before it is quantized, loaded with weight_dtype 'default'."
            )
    root, filename, counter, _, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    folder = Path(root) / f"{filename}_{counter:05}_"
    unfinished = folder.with_name(f".{folder.name}.part")
    with text.guarded():
        transformer = transformer_of(config, _baked(model, text))
        text.show(f"writing {sum(weight.nbytes for weight in transformer.parameters()) / 2**20:.0f} MiB ...", "working")
        try:
            transformer.save_pretrained(unfinished, max_shard_size=_LARGEST_FILE)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    text.show(f"saved as {folder.relative_to(folder_paths.get_output_directory()).as_posix()}")
    log.info("saved %s to %s", config["_class_name"], folder)
    return folder


def _baked(model: ModelPatcher, text: NodeText) -> dict[str, Tensor]:
    """The diffusion model's weights on the CPU, with all patches applied."""
    text.show("applying patches ...", "working")
    comfy.model_management.load_models_gpu([model])
    # What the host gives here applies a patch that is not yet in the weight when it is moved.
    state = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    progress = comfy.utils.ProgressBar(len(state))
    baked = {}
    for name, weight in state.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        baked[name] = weight.to("cpu")
        progress.update(1)
    return baked
