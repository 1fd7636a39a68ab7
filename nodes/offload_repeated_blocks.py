"""Offload Repeated Blocks."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.offload import MODULATION, offload_repeated_blocks
from ..host.progress import NodeText


class OffloadRepeatedBlocks(io.ComfyNode):
    """Makes Flux.1 fit a smaller card without changing a pixel: the modulation layers, a quarter of its blocks'
    weights, stay in RAM while it samples.

    What they give depends on the step and the prompt alone, so it is made once for all steps. Goes before or after LoRA
    loaders, Quantize Repeated Blocks and Compile Repeated Blocks.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathOffloadRepeatedBlocks",
            display_name="Offload Repeated Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["offload", "low vram", "flux 24 GB", "modulation", "memory", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux.1, Flux.2 or Chroma model. It is not changed."),
                io.Combo.Input(
                    "modulation",
                    options=list(MODULATION),
                    default="ahead",
                    tooltip="ahead: what the modulation layers give is made once for all steps, and their weights "
                    "(27 % of the blocks of Flux.1) take no memory on the GPU. The image stays the same. in place: "
                    "they are loaded and computed in each block. Flux.2 and Chroma have none in their blocks.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, loaded without what it does not need on the GPU.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, modulation: str) -> io.NodeOutput:
        return io.NodeOutput(offload_repeated_blocks(model, modulation, NodeText(cls.hidden.unique_id)))
