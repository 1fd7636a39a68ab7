"""Quantize Repeated Blocks."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.quantizing.formats import node_formats, require_format_here
from ..host.quantizing.quantize import quantize_repeated_blocks
from ..host.telling.progress import NodeText


class QuantizeRepeatedBlocks(io.ComfyNode):
    """Makes Flux smaller, and compiled also faster where the card multiplies in 8 bits: keeps the weights of its
    double-stream and single-stream blocks in 8 or 4 bits.

    Works on any loaded full-precision model, before or after LoRA loaders and before Compile Repeated Blocks. The model
    that comes in stays as it is.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        formats = node_formats()
        return io.Schema(
            node_id="HotPathQuantizeRepeatedBlocks",
            display_name="Quantize Repeated Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["quantize", "fp8", "int8", "int4", "convrot", "nvfp4", "mxfp8", "flux low vram", "hotpath"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Flux, Chroma, Qwen-Image, Z-Image, Lumina 2, Wan, LTX-Video 2, Krea 2 or Hunyuan model "
                    "in full precision. It is not changed.",
                ),
                io.Combo.Input(
                    "format",
                    options=formats,
                    default=formats[0],
                    tooltip="Those that this machine can run; auto: the first of them. int8_dynamic: the most accurate "
                    "in 8 bits; fp8_e4m3_rowwise: fastest on H100 and the like; fp8_e4m3: the host's own; "
                    "int8_weight_only and int4_weight_only: save memory alone, on any card; convrot_w4a4: 4 bits, "
                    "weights and activations, RTX 20 series and newer; asym_w4a8_int8: weights in 4 bits "
                    "and activations in int8, RTX 30 series and newer; nvfp4: 4 bits, RTX 50 series; mxfp8: RTX 50 "
                    "series.",
                ),
                io.String.Input(
                    "skip",
                    default="",
                    advanced=True,
                    tooltip="Layers to leave in full precision: names or patterns with commas between, such as "
                    "img_mlp.2, *.proj, single_blocks.37.*.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, with the Linear layers of its blocks quantized.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, format: str) -> bool | str:
        # A linked input has no value yet; it is checked when the node runs.
        try:
            if format is not None:
                require_format_here(format)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: ModelPatcher, format: str, skip: str) -> io.NodeOutput:
        return io.NodeOutput(quantize_repeated_blocks(model, format, skip, NodeText(cls.hidden.unique_id)))
