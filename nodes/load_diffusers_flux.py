"""Load Diffusers Flux."""

from inspect import cleandoc

from comfy_api.latest import io

from ..host.diffusers_folders.load import diffusers_folders, load_diffusers_flux
from ..host.telling.progress import NodeText


class LoadDiffusersFlux(io.ComfyNode):
    """Loads the transformer of a Flux.1 or Flux.2 in diffusers' format, in one file or many, as a MODEL like any other.

    Put the folder, a whole pipeline or its transformer alone, into models/diffusers. Needs the package diffusers.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathLoadDiffusersFlux",
            display_name="Load Diffusers Flux",
            category="model/loaders",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["diffusers", "from_pretrained", "huggingface folder", "sharded", "flux loader", "hotpath"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(diffusers_folders()),
                    tooltip="A folder in models/diffusers, or in another registered path for diffusers or diffusion "
                    "models, with a transformer/config.json or a config.json.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL, in the precision that ComfyUI chooses.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        return io.NodeOutput(load_diffusers_flux(folder, NodeText(cls.hidden.unique_id)))
