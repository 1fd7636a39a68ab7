"""Split Repeated Blocks."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.splitting.split import split_repeated_blocks
from ..host.telling.progress import NodeText


class SplitRepeatedBlocks(io.ComfyNode):
    """Makes one image with several GPUs: each computes a part of the image, and all see the whole at attention.

    Each GPU needs memory for the whole model. Goes after Quantize Repeated Blocks and before Compile Repeated Blocks.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathSplitRepeatedBlocks",
            display_name="Split Repeated Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["multi gpu", "sequence parallel", "context parallel", "two gpus", "split", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux or Chroma model. It is not changed."),
                io.String.Input(
                    "devices",
                    default="all",
                    tooltip="Which GPUs compute: all, or their numbers with commas between, such as '0, 1'. The one "
                    "that the model is loaded for always takes part. With one GPU the node changes nothing.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, which samples on all of these GPUs at once.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, devices: str) -> io.NodeOutput:
        return io.NodeOutput(split_repeated_blocks(model, devices, NodeText(cls.hidden.unique_id)))
