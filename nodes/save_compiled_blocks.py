"""Save Compiled Blocks."""

from inspect import cleandoc
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..host.compiling.bundles import save_bundle


class SaveCompiledBlocks(io.ComfyNode):
    """Saves what Compile Repeated Blocks compiled for a MODEL as one file, for a machine that is the same.

    Connect the sampler's output to `after`, so that it is compiled by then. Load Compiled Blocks reads the file.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathSaveCompiledBlocks",
            display_name="Save Compiled Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["torch compile cache", "export compiled", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that comes out of Compile Repeated Blocks."),
                io.String.Input(
                    "filename_prefix",
                    default="compiled_blocks/flux",
                    tooltip="Where to save it in the output folder. In compiled_blocks, Load Compiled Blocks finds it.",
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything that is made with the MODEL, such as the sampler's LATENT.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The path of the file.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str, after: Any = None) -> io.NodeOutput:
        path, text = save_bundle(model, filename_prefix)
        return io.NodeOutput(path, ui=ui.PreviewText(text))
