"""The host's model code in this process, set up as its main.py does, and the pack beside it."""

from __future__ import annotations

import logging
import os
import runpy
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .checkpoints import flux1, quantized

ROOT = Path(__file__).resolve().parent.parent


def start(dynamic_vram: bool = True, cpu: bool = False) -> None:
    """Make ``comfy`` and ``hotpath_pack`` importable; with ``dynamic_vram`` the host's default on NVIDIA cards.

    ``cpu``: without a CUDA device, with the attention that is the default on one.

    Raises:
        RuntimeError: dynamic VRAM can't be had.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if "hotpath_pack" not in sys.modules:
        pack = types.ModuleType("hotpath_pack")
        pack.__path__ = [str(ROOT)]
        sys.modules["hotpath_pack"] = pack
    # As main.py does: the host's nodes.py puts comfy/ first on the path, whose utils.py would shadow this package.
    import utils.extra_config  # noqa: F401

    logging.getLogger().setLevel(logging.WARNING)
    from comfy.cli_args import args

    if cpu:
        args.cpu = args.use_pytorch_cross_attention = True
    elif torch.cuda.is_available():
        # By it the host decides where weights from RAM are put.
        args.cuda_malloc = torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    if not dynamic_vram:
        return
    import comfy_aimdo.control as aimdo

    aimdo.init()
    aimdo.set_log_error()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = [(device.index, 0) for device in comfy.model_management.get_all_torch_devices()]
    if not aimdo.init_devices(devices):
        raise RuntimeError("dynamic VRAM did not start")
    aimdo.set_log_error()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def imitated_devices(count: int) -> Any:
    """A scope, a patch to start and to stop, in which the host finds so many devices, which are all the CPU."""
    import comfy.model_management

    devices = [torch.device("cpu", number) if number else torch.device("cpu") for number in range(count)]
    return patch.object(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: list(devices))


def about() -> dict[str, str]:
    """What a result must tell beside its numbers: the card, the versions and the command."""
    host = runpy.run_path(os.path.join(os.environ["COMFYUI_PATH"], "comfyui_version.py"))
    spec, arguments = sys.modules["__main__"].__spec__, sys.argv[1:]
    if "--json" in arguments:
        # Where it is written says nothing of it, and names a path of the machine.
        at = arguments.index("--json")
        del arguments[at : at + 2]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "allocator": torch.cuda.get_allocator_backend() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "ComfyUI": host["__version__"],
        "command": f"python -m {shlex.join([spec.name if spec else sys.argv[0], *arguments])}",
    }


def load(
    double: int, single: int, dtype: torch.dtype, format: str | None = None, dynamic: bool = True, **shape: Any
) -> Any:
    """A MODEL of a Flux.1 with random weights made on the GPU, computing in ``dtype``, quantized to ``format``.

    ``dynamic``: with dynamic VRAM, where ``start`` started it.
    """
    import comfy.sd

    weights = flux1(double, single, dtype=dtype, device="cuda", **shape)
    if format is not None:
        weights = quantized(weights, format)
    weights = {name: weight.cpu() for name, weight in weights.items()}
    # As nodes do; and by itself the host would compute in bf16.
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(
            weights, model_options={"dtype": dtype}, disable_dynamic=not dynamic
        )
    torch.cuda.empty_cache()
    return model


def gguf_layers() -> str:
    """Of whose layers a MODEL of ``load_gguf`` is."""
    from . import gguf_pack

    return gguf_pack.pack_name()


def load_gguf(double: int, single: int, kind: str, **shape: Any) -> Any:
    """A MODEL of a Flux.1 whose blocks' matrices are random ones of ``kind``, a type of ggml, as a GGUF file's."""
    from . import gguf_pack

    # In bf16 as the other models, though of it all but the matrices is kept in float32.
    weights = flux1(double, single, dtype=torch.bfloat16, device="cuda", **shape)
    with torch.inference_mode():
        model = gguf_pack.load(weights, lambda name: kind, compute=torch.bfloat16)
    torch.cuda.empty_cache()
    return model


def compiled(model: Any, cache: str = "off", cuda_graphs: str = "auto", **settings: Any) -> Any:
    """``model`` as Compile Repeated Blocks with ``settings`` returns it; what can't be compiled is an error."""
    from hotpath_pack.host.compiling.compile import compile_repeated_blocks
    from hotpath_pack.host.telling.progress import NodeText
    from hotpath_pack.hotpath.settings import CompileSettings

    chosen = CompileSettings(**settings)
    return compile_repeated_blocks(model, chosen, "all", "all", "error", NodeText(None), cache, cuda_graphs)


def until_ready() -> None:
    """Wait until all that Compile Repeated Blocks has compiled ahead, in this process, is ready."""
    from hotpath_pack.host.compiling import warming

    warming._WORKER.submit(lambda: None).result()


def compiled_per_block(model: Any, backend: str = "inductor") -> Any:
    """``model`` with each block compiled by the host's own wrapper, as other packs do it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    from hotpath_pack.host.families import named_blocks

    clone = model.clone()
    keys = [f"diffusion_model.{path}" for path, _ in named_blocks(model.model.diffusion_model)]
    set_torch_compile_wrapper(clone, backend=backend, keys=keys, options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


def quantize(model: Any, format: str) -> Any:
    """``model`` as Quantize Repeated Blocks returns it."""
    from hotpath_pack.host.quantizing.quantize import quantize_repeated_blocks
    from hotpath_pack.host.telling.progress import NodeText

    with torch.inference_mode():
        return quantize_repeated_blocks(model, format, "", NodeText(None))


def offload(model: Any, **settings: Any) -> Any:
    """``model`` as Offload Repeated Blocks with ``settings`` returns it."""
    from hotpath_pack.host.residency.offload import OffloadSettings, offload_repeated_blocks
    from hotpath_pack.host.telling.progress import NodeText

    return offload_repeated_blocks(model, OffloadSettings(**settings), NodeText(None))


def sample(
    model: Any, size: tuple[int, int] = (256, 256), tokens: int = 32, steps: int = 2, cfg: float = 1.0
) -> Tensor:
    """A latent of one image of ``size`` pixels with ``tokens`` of random text, the same at each call; with a ``cfg``
    other than 1 of two branches."""
    import comfy.sample

    width, height = size
    generator = torch.Generator().manual_seed(0)
    params = model.model.diffusion_model.params
    noise = torch.randn(1, 16, height // 8, width // 8, generator=generator)
    text = torch.randn(1, tokens, params.context_in_dim, generator=generator)
    pooled = torch.randn(1, params.vec_in_dim, generator=generator)
    condition = [[text, {"guidance": 3.5, "pooled_output": pooled}]]
    try:
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "simple", condition, condition, noise * 0, seed=0, disable_pbar=True
            )
    finally:
        _end_node()


def _end_node() -> None:
    """What the host's execution.py does after each node, without which dynamic VRAM keeps less with each run."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_prefetch

    if comfy.memory_management.aimdo_enabled:
        import comfy_aimdo.model_vbar

        comfy.model_management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def milliseconds(work: Callable[[], Any]) -> float:
    """The median of ``work`` on the device, by events."""
    times = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[3:])


def calling(model: Any, around: Callable[[Callable[[], Tensor]], Tensor]) -> Any:
    """A clone of ``model`` whose calls are each made by ``around(call)``."""

    def wrapper(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        return around(lambda: apply_model(args["input"], args["timestep"], **args["c"]))

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def timed(model: Any) -> tuple[Any, Callable[[], list[float]]]:
    """A clone of ``model``, and what gives the milliseconds of each of its calls so far, by events.

    The clone is to be kept for as long as is measured: with it goes what the host pinned of weights in RAM.
    """
    events = []

    def around(call: Callable[[], Tensor]) -> Tensor:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = call()
        end.record()
        events.append((start, end))
        return out

    def took() -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return calling(model, around), took


def time_steps(model: Any, size: tuple[int, int], tokens: int, steps: int) -> tuple[Tensor, list[float]]:
    """The latent of ``sample`` and the milliseconds of each call of the model, by events."""
    clone, took = timed(model)
    latent = sample(clone, size, tokens, steps)
    return latent, took()


def predict_streaming(model: Any, resident: float, bandwidth: float) -> tuple[int, float] | None:
    """The bytes that ``model`` streams in a step, and the step in milliseconds that the model of the bus predicts from
    that of a MODEL with all blocks ``resident`` and a ``bandwidth`` in bytes a millisecond; None if it streams none."""
    from hotpath_pack.host.residency.offload import LeavesOut
    from hotpath_pack.hotpath.stream import predict

    if not isinstance(model, LeavesOut):
        return None
    blocks = model.get_wrappers("apply_model", "hotpath_offload")[0]
    sizes = model._block_sizes()
    streamed = [turn for turn, path in enumerate(sizes) if path in blocks.residency.streamed]
    if not streamed:
        return None
    each = [resident / len(sizes)] * len(sizes)
    predicted = predict(list(sizes.values()), each, bandwidth, streamed, blocks.prefetch_blocks, steps=5)
    return blocks.residency.streamed_bytes, predicted
