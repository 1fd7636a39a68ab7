"""A MODEL with its tokens over imitated devices."""

import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.quantizing.quantize import quantize_repeated_blocks
from hotpath_pack.host.splitting.split import split_repeated_blocks
from hotpath_pack.host.telling.progress import NodeText
from sampling import Texts

DEVICES = [torch.device("cpu"), torch.device("cpu", 1), torch.device("cpu", 2)]
MODELS = {"flux1": checkpoints.flux1, "flux2": checkpoints.flux2, "chroma": checkpoints.chroma}
SILENT = NodeText(None)


@torch.inference_mode()
def split(model, devices="0, 1", text=None):
    return split_repeated_blocks(model, devices, text or Texts())


@torch.inference_mode()
def quantized(model):
    return quantize_repeated_blocks(model, "int8_weight_only", "", SILENT)


def blocks_of(model):
    (wrapper,) = model.get_wrappers("apply_model", "hotpath_split")
    return wrapper


def assert_shared(model, steps=2):
    assert (blocks_of(model).why_not, blocks_of(model).steps) == ("", steps)


def other_copy(model):
    """The diffusion model of the last device."""
    return model.get_additional_models_with_key("hotpath_split")[-1].model.diffusion_model
