"""A real ComfyUI server with this pack, driven over HTTP and its websocket."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.server import HostServer, Result
from hotpath_pack.devtools.workflows import sampling

TOLERANCE = 1e-4


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
            "breaks": sum(len(region["breaks"]) for region in regions),
            "recompiles": sum(len(region["recompiles"]) for region in regions),
        }


@contextmanager
def serve(base, double, single, hidden=256, archive=None, **env):
    """A server on a tiny Flux.1 of so many blocks, with an empty compiler cache; of the packed pack if one is given."""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(base / "inductor"), **env}
    with HostServer(Path(os.environ["COMFYUI_PATH"]), base=base, env=env, archive=archive) as server:
        weights = checkpoints.flux1(double, single, hidden=hidden)
        path = checkpoints.save(server.diffusion_models / "flux.safetensors", weights)
        checkpoints.save(server.loras / "style.safetensors", checkpoints.lora(weights))
        yield Live(server, path.name, checkpoints.describe(path))
