"""HotPath: compile the hot path of Flux inside ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .host import structure
from .host.telling import report
from .nodes.benchmark_model import BenchmarkModel
from .nodes.compile_repeated_blocks import CompileRepeatedBlocks
from .nodes.compile_report import CompileReport
from .nodes.load_compiled_blocks import LoadCompiledBlocks
from .nodes.load_diffusers_flux import LoadDiffusersFlux
from .nodes.offload_repeated_blocks import OffloadRepeatedBlocks
from .nodes.quantize_repeated_blocks import QuantizeRepeatedBlocks
from .nodes.save_as_diffusers_flux import SaveAsDiffusersFlux
from .nodes.save_compiled_blocks import SaveCompiledBlocks
from .nodes.split_repeated_blocks import SplitRepeatedBlocks
from .nodes.warm_up import WarmUp

WEB_DIRECTORY = "./js"


class HotPathExtension(ComfyExtension):
    async def on_load(self) -> None:
        report.add_routes()
        structure.tell_unknown_structure()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            CompileRepeatedBlocks,
            QuantizeRepeatedBlocks,
            OffloadRepeatedBlocks,
            CompileReport,
            WarmUp,
            BenchmarkModel,
            SaveCompiledBlocks,
            LoadCompiledBlocks,
            LoadDiffusersFlux,
            SaveAsDiffusersFlux,
            SplitRepeatedBlocks,
        ]


async def comfy_entrypoint() -> HotPathExtension:
    return HotPathExtension()
