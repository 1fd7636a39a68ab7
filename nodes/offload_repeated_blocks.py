"""Offload Repeated Blocks."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.residency.budget import Budget
from ..host.residency.offload import MODULATION, OffloadSettings, offload_repeated_blocks
from ..host.telling.progress import NodeText
from ..hotpath.stream import ORDERS


class OffloadRepeatedBlocks(io.ComfyNode):
    """Makes Flux fit a smaller card: what doesn't fit stays in RAM and moves to the GPU one block ahead of the compute.

    The modulation layers of Flux.1, a quarter of its blocks' weights, need not be there at all: what they give is made
    once for all steps. Goes before or after LoRA loaders, Quantize Repeated Blocks and Compile Repeated Blocks.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathOffloadRepeatedBlocks",
            display_name="Offload Repeated Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["offload", "block swap", "low vram", "streaming", "flux 12 GB", "memory", "hotpath"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Flux, Chroma, Qwen-Image, Z-Image, Lumina 2, Wan, LTX-Video 2, Krea 2 or Hunyuan model. "
                    "It is not changed.",
                ),
                io.String.Input(
                    "budget",
                    default="auto",
                    tooltip="How much of the model may stay on the GPU. auto: all that fits beside an image of this "
                    "size. Or a number of GiB such as '10', or a share of the model such as '50 %'.",
                ),
                io.Int.Input(
                    "prefetch_blocks",
                    default=1,
                    min=0,
                    max=8,
                    tooltip="How many blocks arrive ahead of the one that computes. Each takes memory for one block. "
                    "0: a block waits for its weights.",
                ),
                io.Boolean.Input(
                    "pin_memory",
                    default=True,
                    tooltip="Copy what is streamed into pinned RAM once, from where it moves at the full speed of the "
                    "bus. Off: needs no locked RAM, and is slower.",
                ),
                io.Combo.Input(
                    "modulation",
                    options=list(MODULATION),
                    default="ahead",
                    tooltip="ahead: what the modulation layers give is made once for all steps, and their weights "
                    "(27 % of the blocks of Flux.1) take no memory on the GPU. The image stays the same. in place: "
                    "they are loaded and computed in each block. Flux.2 and Chroma have none in their blocks.",
                ),
                io.Combo.Input(
                    "resident",
                    options=list(ORDERS),
                    default="spread",
                    advanced=True,
                    tooltip="Which blocks stay on the GPU. spread: streamed ones lie at even distances, so that each "
                    "has the compute of several others to arrive under. first, last: the first or last blocks stay.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, loaded without what it does not need on the GPU.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, budget: str) -> bool | str:
        # A linked input has no value yet; it is checked when the node runs.
        try:
            if isinstance(budget, str):
                Budget.parse(budget)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        budget: str,
        prefetch_blocks: int,
        pin_memory: bool,
        modulation: str,
        resident: str,
    ) -> io.NodeOutput:
        settings = OffloadSettings(budget, prefetch_blocks, pin_memory, modulation, resident)
        return io.NodeOutput(offload_repeated_blocks(model, settings, NodeText(cls.hidden.unique_id)))
