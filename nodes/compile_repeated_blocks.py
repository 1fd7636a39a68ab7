"""Compile Repeated Blocks."""

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.compiling.artifacts import CACHE
from ..host.compiling.compile import compile_repeated_blocks
from ..host.compiling.replay import CHOICES
from ..host.compiling.when import WHEN
from ..host.telling.progress import NodeText
from ..hotpath.backends import available_backends
from ..hotpath.selection import check_selection
from ..hotpath.settings import DYNAMIC, MODES, CompileSettings


class CompileRepeatedBlocks(io.ComfyNode):
    """Makes Flux faster: compiles one double-stream and one single-stream block with torch.compile and reuses them
    for all the others.

    The first step takes some seconds longer while it compiles; other resolutions, prompts and LoRAs after that
    compile nothing again. Put it last, after LoRA loaders and other patches, right before the sampler.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathCompileRepeatedBlocks",
            display_name="Compile Repeated Blocks",
            category="model/patch/hotpath",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["torch compile", "torch.compile", "flux speed", "hotpath", "inductor", "faster"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Flux, Chroma, Qwen-Image, Z-Image, Lumina 2, Wan, LTX-Video 2, Krea 2 or Hunyuan model. "
                    "It is not changed.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    tooltip="How much time torch.compile spends on choosing kernels. The max-autotune modes take "
                    "minutes; 'reduce-overhead' and 'max-autotune' also use CUDA graphs wherever that is safe.",
                ),
                io.Combo.Input(
                    "backend",
                    options=available_backends(),
                    default="inductor",
                    advanced=True,
                    tooltip="What generates the code. 'aot_eager' and 'eager' generate none: they help to find out "
                    "where a problem lies.",
                ),
                io.Boolean.Input(
                    "fullgraph",
                    default=True,
                    advanced=True,
                    tooltip="Compile each block as one graph or fail with the reason. Off: a block may be split where "
                    "it can't be traced, which is slower.",
                ),
                io.Combo.Input(
                    "dynamic",
                    options=list(DYNAMIC),
                    default="auto",
                    advanced=True,
                    tooltip="auto: any resolution and prompt length with one compilation, once more when the batch "
                    "size first changes. always: any batch size too. never: compile for each size; a little faster "
                    "where only one size is used.",
                ),
                io.String.Input(
                    "double_blocks",
                    default="all",
                    advanced=True,
                    tooltip="Which double-stream blocks to compile: all, none, or ranges such as 0-9,12.",
                ),
                io.String.Input(
                    "single_blocks",
                    default="all",
                    advanced=True,
                    tooltip="Which single-stream blocks to compile: all, none, or ranges such as 0-9,12.",
                ),
                io.Combo.Input(
                    "on_failure",
                    options=["eager", "error"],
                    default="eager",
                    advanced=True,
                    tooltip="When something can't be compiled. eager: go on without, slower, and say why on the node "
                    "and in the log. error: end the prompt with the reason.",
                ),
                io.Combo.Input(
                    "cache",
                    options=list(CACHE),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto: keep what is compiled, so that the next start of ComfyUI loads it in about a "
                    "second instead of compiling. off: compile at each start.",
                ),
                io.Combo.Input(
                    "cuda_graphs",
                    options=list(CHOICES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto: on NVIDIA cards a block is launched all at once, as a CUDA graph, where that is "
                    "safe: in the modes that ask for it, and in 'default' where launching takes longer than computing, "
                    "as at small sizes. The same image. off: never.",
                ),
                io.Combo.Input(
                    "when",
                    options=list(WHEN),
                    default="wait",
                    optional=True,
                    advanced=True,
                    tooltip="wait: compile while other models load, or for other models than Flux start the compiler; "
                    "the first step waits for the rest. background: another process compiles while prompts sample "
                    "without, and prompts that begin after it is done run compiled.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    optional=True,
                    advanced=True,
                    tooltip="Which blocks of models without double-stream and single-stream blocks (Qwen-Image, "
                    "Z-Image, Lumina 2, Wan, LTX-Video 2, Krea 2) to compile: all, none, or ranges such as 0-9,12.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, with its repeated blocks compiled while it samples.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, double_blocks: str, single_blocks: str, blocks: str = "all") -> bool | str:
        # A linked input has no value yet; it is checked when the node runs.
        given = {"double_blocks": double_blocks, "single_blocks": single_blocks, "blocks": blocks}
        try:
            for name, text in given.items():
                if isinstance(text, str):
                    check_selection(name, text)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        mode: str,
        backend: str,
        fullgraph: bool,
        dynamic: str,
        double_blocks: str,
        single_blocks: str,
        on_failure: str,
        cache: str = "auto",
        cuda_graphs: str = "auto",
        when: str = "wait",
        blocks: str = "all",
    ) -> io.NodeOutput:
        settings = CompileSettings(mode, backend, fullgraph, dynamic)
        text = NodeText(cls.hidden.unique_id)
        return io.NodeOutput(
            compile_repeated_blocks(
                model, settings, double_blocks, single_blocks, on_failure, text, cache, cuda_graphs, when, blocks
            )
        )
