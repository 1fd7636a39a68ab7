"""Compile Report."""

from inspect import cleandoc
from time import monotonic
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..host.telling.progress import NodeText
from ..host.telling.report import describe


class CompileReport(io.ComfyNode):
    """Tells what Compile Repeated Blocks did with a MODEL: regions, graphs, seconds, recompiles with their reason, and
    what runs eager and why.

    Connect the sampler's output to `after`, so that the report is made once sampling is done.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathCompileReport",
            display_name="Compile Report",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["torch compile report", "recompile", "graph break", "hotpath"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that comes out of Compile Repeated Blocks."),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything that is made with the MODEL, such as the sampler's LATENT.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The text that the node shows.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        # What it tells changes without its inputs changing.
        return monotonic()

    @classmethod
    def execute(cls, model: ModelPatcher, after: Any = None) -> io.NodeOutput:
        text = describe(model)
        NodeText(cls.hidden.unique_id).show(text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
