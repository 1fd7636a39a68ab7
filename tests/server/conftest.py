"""A real ComfyUI server with this pack, driven over HTTP and its websocket."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.server import HostServer, Result
from hotpath_pack.devtools.workflows import sampling


@dataclass
class Live:
    """A server, and the checkpoint and LoRA that its prompts use."""

    server: HostServer
    checkpoint: str
    flux: checkpoints.FluxFile

    def sample(self, **options) -> Result:
        return self.server.run(sampling(self.checkpoint, self.flux, **options))

    def latent(self, **options):
        return self.server.latent(self.sample(**options))

    def difference(self, compiled=None, **options) -> float:
        """Largest difference of the latents, compiled and eager, which must not be trivial."""
        eager = self.latent(**options)
        assert eager.isfinite().all() and eager.std() > 0.1
        return (eager - self.latent(compiled=compiled or {}, **options)).abs().max().item()

    def counts(self) -> dict[str, int]:
        """Totals over all regions of the server."""
        regions = self.server.report()["regions"]
        return {
            "graphs": sum(region["graphs"] for region in regions),
            "breaks": sum(region["breaks"] for region in regions),
            "recompiles": sum(len(region["recompiles"]) for region in regions),
        }


def live(tmp_path_factory, double, single):
    base = tmp_path_factory.mktemp("host")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(base / "inductor")}
    with HostServer(Path(os.environ["COMFYUI_PATH"]), base=base, env=cache) as server:
        weights = checkpoints.flux1(double, single)
        path = checkpoints.save(server.diffusion_models / "flux.safetensors", weights)
        checkpoints.save(server.loras / "style.safetensors", checkpoints.lora(weights))
        yield Live(server, path.name, checkpoints.describe(path))


@pytest.fixture(scope="module")
def whole_flux(tmp_path_factory):
    """19 double and 38 single blocks, and an empty compiler cache."""
    yield from live(tmp_path_factory, 19, 38)


@pytest.fixture(scope="module")
def small_flux(tmp_path_factory):
    yield from live(tmp_path_factory, 2, 3)
