"""Warm Up."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..host.compiling.warm_up import warm_up
from ..host.measuring.synthetic import read_batch_sizes, read_sizes
from ..host.telling.progress import NodeText


class WarmUp(io.ComfyNode):
    """Compiles a MODEL for the sizes that prompts will ask for, before the first one does.

    Put it after Compile Repeated Blocks. A server that runs a workflow with this node alone at its start is ready when
    that has ended.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathWarmUp",
            display_name="Warm Up",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["warmup", "precompile", "compile ahead", "server start", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Compile Repeated Blocks. It is not changed."),
                io.String.Input(
                    "sizes",
                    default="1024x1024",
                    tooltip="Width x height in pixels, with commas between: 1024x1024, 832x1216. With dynamic at auto "
                    "one size is enough for all.",
                ),
                io.String.Input(
                    "batch_sizes",
                    default="1",
                    tooltip="Images at once, with commas between. The second batch size compiles once more; any other "
                    "after it is free.",
                ),
                io.Int.Input(
                    "text_tokens",
                    default=256,
                    min=1,
                    max=4096,
                    tooltip="How long the prompt is, in tokens. ComfyUI gives Flux.1 at least 256 and Flux.2 512.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same MODEL, compiled for these sizes.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, sizes: str, batch_sizes: str) -> bool | str:
        # A linked input has no value yet; it is checked when the node runs.
        try:
            if isinstance(sizes, str):
                read_sizes(sizes)
            if isinstance(batch_sizes, str):
                read_batch_sizes(batch_sizes)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: ModelPatcher, sizes: str, batch_sizes: str, text_tokens: int) -> io.NodeOutput:
        told = warm_up(model, sizes, batch_sizes, text_tokens, NodeText(cls.hidden.unique_id))
        return io.NodeOutput(model, ui=ui.PreviewText(told))
