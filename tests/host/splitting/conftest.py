import functools

import comfy.sd
import pytest
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.gpu_host import imitated_devices
from shared_out import DEVICES, MODELS


@pytest.fixture(scope="module")
def devices():
    with imitated_devices(len(DEVICES)):
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """(name) -> the file of a tiny model."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name):
        blocks = (1, 1) if name == "chroma" else (2, 3)
        return str(checkpoints.save(folder / f"{name}.safetensors", MODELS[name](*blocks)))

    return make


@pytest.fixture
def filed(file):
    """A tiny Flux from a file, which the host can load again."""
    return comfy.sd.load_diffusion_model(file("flux1"))
