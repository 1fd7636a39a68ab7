"""Save as Diffusers Flux."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.diffusers_folders.save import save_as_diffusers_flux
from ..host.telling.progress import NodeText


class SaveAsDiffusersFlux(io.ComfyNode):
    """Writes a Flux.1 or Flux.2 MODEL, LoRAs baked in, as a folder that diffusers' from_pretrained loads.

    Load Diffusers Flux lists it once ComfyUI's page is refreshed. Needs the package diffusers.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathSaveAsDiffusersFlux",
            display_name="Save as Diffusers Flux",
            category="model/merging",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["diffusers", "save_pretrained", "export", "bake lora", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux.1 or Flux.2 model in full precision. It is not changed."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusers/ComfyUI",
                    tooltip="Where in the output folder, and how the new folder's name begins; a number follows.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str) -> io.NodeOutput:
        save_as_diffusers_flux(model, filename_prefix, NodeText(cls.hidden.unique_id))
        return io.NodeOutput()
