"""Benchmark Model."""

from inspect import cleandoc
from time import monotonic
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..host.measuring.benchmark import benchmark_model
from ..host.measuring.synthetic import Inputs
from ..host.telling.progress import NodeText


class BenchmarkModel(io.ComfyNode):
    """Measures how long a step of a MODEL takes, on made-up inputs, and draws it; with a second MODEL beside it.

    All that is on the MODEL acts as in a prompt: LoRAs, patches, offload, compiling. No text encoder or VAE is needed.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathBenchmarkModel",
            display_name="Benchmark Model",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["benchmark", "speed test", "step time", "it/s", "compare models", "hotpath"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Flux, Chroma, Qwen-Image, Z-Image, Lumina 2, Wan, LTX-Video 2, Krea 2 or Hunyuan model. "
                    "It is not changed.",
                ),
                io.Int.Input("width", default=1024, min=16, max=16384, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=16384, step=16, tooltip="Height in pixels."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Images at once."),
                io.Int.Input(
                    "text_tokens",
                    default=256,
                    min=1,
                    max=4096,
                    tooltip="How long the prompt is, in tokens. ComfyUI gives Flux.1 at least 256 and Flux.2 512.",
                ),
                io.Int.Input("steps", default=8, min=2, max=1000, tooltip="Steps of one run, at least 2."),
                io.Int.Input(
                    "rounds",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="Runs of each MODEL after the first, in which it compiles. More show the spread better.",
                ),
                io.Model.Input(
                    "compare_with",
                    optional=True,
                    tooltip="Another MODEL to run in turns with the first, such as the one before Compile Repeated "
                    "Blocks.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The text that the node shows."),
                io.Image.Output(display_name="figure", tooltip="The figure, for Save Image."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        # Queued again, it measures again.
        return monotonic()

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        width: int,
        height: int,
        batch_size: int,
        text_tokens: int,
        steps: int,
        rounds: int,
        compare_with: ModelPatcher | None = None,
    ) -> io.NodeOutput:
        inputs = Inputs(width, height, batch_size, text_tokens)
        text, image = benchmark_model(model, compare_with, inputs, steps, rounds, NodeText(cls.hidden.unique_id))
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(text, image, ui=shown)
