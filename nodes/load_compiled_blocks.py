"""Load Compiled Blocks."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..host.compiling.bundles import bundle_names, load_bundle


class LoadCompiledBlocks(io.ComfyNode):
    """Reads a file of Save Compiled Blocks, so that Compile Repeated Blocks finds its blocks compiled already.

    Put it before Compile Repeated Blocks. Compiled blocks are programs that run as you: a file that somebody else made
    can do anything on this machine that you can. It is refused unless you say that you trust who made it.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathLoadCompiledBlocks",
            display_name="Load Compiled Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["torch compile cache", "import compiled", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL, before Compile Repeated Blocks. It passes unchanged."),
                io.Combo.Input(
                    "file",
                    options=bundle_names(),
                    tooltip="A file in models/compiled_blocks or output/compiled_blocks.",
                ),
                io.Boolean.Input(
                    "trust_foreign",
                    default=False,
                    advanced=True,
                    tooltip="Also read a file that another user or machine made. It holds a program that runs with all "
                    "your rights, and nothing can check what it does: only for files that you made yourself, or "
                    "whose maker you trust as you trust a program that you install.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same MODEL, for Compile Repeated Blocks.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, file: str, trust_foreign: bool) -> io.NodeOutput:
        return io.NodeOutput(model, ui=ui.PreviewText(load_bundle(file, trust_foreign)))
