"""Runs the host's own model code in this process, on the CPU."""

import importlib.util
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HOST = os.environ.get("COMFYUI_PATH")
if not HOST:
    pytest.exit("Set COMFYUI_PATH to a ComfyUI folder, or run `python dev.py test`, which does.", returncode=2)
sys.path.insert(0, str(Path(HOST).resolve()))
# As main.py does: the host's nodes.py puts comfy/ first on the path, whose utils.py would shadow this package.
import utils.extra_config  # noqa: E402, F401
from comfy.cli_args import args  # noqa: E402

args.cpu = True
args.use_pytorch_cross_attention = True

# Its assertions are read by pytest as those of tests are.
pytest.register_assert_rewrite("sampling")
import sampling  # noqa: E402
import sweeps  # noqa: E402
import torch  # noqa: E402
from comfy.ops import CastWeightBiasOp  # noqa: E402
from hotpath_pack.devtools import checkpoints  # noqa: E402
from hotpath_pack.host.compiling import regions as host_regions  # noqa: E402
from hotpath_pack.hotpath.region_store import RegionStore  # noqa: E402
from sampling import load  # noqa: E402


@pytest.fixture(scope="session")
def flux_weights():
    return checkpoints.flux1(2, 3)


@pytest.fixture
def flux(flux_weights):
    """A tiny Flux.1 dev through the host's loader, on its own copy of the weights."""
    return load({name: weight.clone() for name, weight in flux_weights.items()})


@pytest.fixture(autouse=True, scope="module")
def traced_by_autograd_too(request):
    """Graphs go through AOTAutograd, as the compiler's do, in the files whose turn it is."""
    with pytest.MonkeyPatch.context() as patched:
        if sweeps.has_its_turn(request.config, request.path.name):
            patched.setattr(sampling, "SETTINGS", replace(sampling.SETTINGS, backend="aot_eager"))
        yield


@pytest.fixture(autouse=True)
def regions(monkeypatch):
    """Regions of this test alone."""
    store = RegionStore(capacity=64)
    monkeypatch.setattr(host_regions, "REGIONS", store)
    return store


@pytest.fixture(autouse=True)
def functions_of_one_layer_are_of_no_other():
    """Layers that the host has not loaded yet share the lists of their class."""
    yield
    assert CastWeightBiasOp.weight_function == CastWeightBiasOp.bias_function == []


@pytest.fixture
def fp8_product(monkeypatch):
    """PyTorch multiplies fp8 on the CPU, though not by the newer name that the host asks for first."""
    monkeypatch.setattr(sys.modules["comfy_kitchen.scaled_mm_v2"], "_HAS_SCALED_MM_V2", False)


@pytest.fixture(autouse=True)
def quiet_loading(caplog):
    logging.getLogger("root").setLevel(logging.WARNING)
    with torch.random.fork_rng():
        yield


@pytest.fixture
def host_module(tmp_path, monkeypatch):
    """Makes a module of the host's models that the host has not, by its name and source."""

    def host_module(name, source):
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return host_module


@pytest.fixture
def newer(host_module):
    """A file of the host that this pack has never seen."""
    return host_module("comfy.ldm.newer", (HERE / "newer.py").read_text(encoding="utf-8"))
