"""One side of the comparison in a process of its own: runs single steps that it is asked for on its standard input.

    python -m benchmarks.sides SIDE FOLDER BACKEND

A line of JSON, the fields of ``Step``, gets a line back, the fields of ``Done``. The first line, written once the
weights are loaded, has the versions of all that is compared.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from devtools import gpu_host

SIDES = ("eager", "whole model", "per block", "diffusers", "ours")
CHECKPOINT, LORA = "flux.safetensors", "lora.safetensors"
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Step:
    """``lora`` is its strength, ``resident`` the share of the weights that stays in memory; None: all, as loaded."""

    width: int = 256
    height: int = 256
    tokens: int = 32
    batch: int = 1
    lora: float = 0.0
    resident: float | None = None


@dataclass(frozen=True)
class Done:
    """``start``: CPU seconds that the compiler took to start as the side does, before the first step and no part of it.

    ``cpu``: CPU seconds of the step, in this process and its compilers. ``wall``: seconds on the clock. ``graphs``: all
    so far. ``memory``: bytes above what was resident before, where the system tells.
    """

    start: float
    cpu: float
    wall: float
    graphs: int
    memory: int | None
    output: str


def latent_and_text(step: Step, text_width: int, pooled_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for each side: noise of (batch, 16, height / 8, width / 8), text of (1, tokens, width), pooled text."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(step.batch, 16, step.height // 8, step.width // 8, generator=generator)
    text = torch.randn(1, step.tokens, text_width, generator=generator)
    return noise, text, torch.randn(1, pooled_width, generator=generator)


class HostSide:
    """The host's own model, sampled as its KSampler does, with the nodes that a workflow would have."""

    def __init__(self, folder: Path, compiled: Callable[[Any], Any]) -> None:
        import comfy.sd

        # As nodes do.
        with torch.inference_mode():
            self._base = comfy.sd.load_diffusion_model(str(folder / CHECKPOINT))
        self._lora = load_file(folder / LORA)
        self._compiled = compiled
        # Nodes run again when what goes into them changes.
        self._made: tuple[Any, Any] = (None, None)

    def prepare(self, step: Step) -> Callable[[Callable[[Callable[[], Tensor]], Tensor]], Tensor]:
        """A function that samples one step and passes the call of the model to its argument."""
        import comfy.sample

        inputs = step.lora, step.resident
        if self._made[0] != inputs:
            self._made = inputs, self._compiled(self._model(*inputs))
        model = self._made[1].clone()
        params = model.model.diffusion_model.params
        noise, text, pooled = latent_and_text(step, params.context_in_dim, params.vec_in_dim)
        condition = [[text, {"guidance": 3.5, "pooled_output": pooled}]]

        def run(timed: Callable[[Callable[[], Tensor]], Tensor]) -> Tensor:
            seen: list[Tensor] = []

            def wrapper(apply_model: Callable[..., Tensor], args: Mapping[str, Any]) -> Tensor:
                seen.append(timed(lambda: apply_model(args["input"], args["timestep"], **args["c"])))
                return seen[0]

            model.set_model_unet_function_wrapper(wrapper)
            with torch.inference_mode():
                comfy.sample.sample(
                    model, noise, 1, 1.0, "euler", "simple", condition, condition, noise * 0, seed=0, disable_pbar=True
                )
            return seen[0]

        return run

    def _model(self, lora: float, resident: float | None) -> Any:
        import comfy.sd
        from comfy.patcher_extension import CallbacksMP

        model = self._base
        if lora:
            model, _ = comfy.sd.load_lora_for_models(model, None, self._lora, lora, 0)
        if resident is not None:
            model = model.clone()

            def offload(patcher: Any) -> None:
                patcher.unpatch_model(patcher.offload_device)
                patcher.patch_model(patcher.load_device, lowvram_model_memory=int(resident * patcher.model_size()))

            model.add_callback(CallbacksMP.ON_PRE_RUN, offload)
        return model


class DiffusersSide:
    """diffusers' model of the same weights. A LoRA is fused into them in place, which compiles nothing again."""

    def __init__(self, folder: Path, backend: str) -> None:
        import comfy.sd
        from hotpath_pack.host.diffusers_folders.format import config_of, places, transformer_of

        flux = comfy.sd.load_diffusion_model(str(folder / CHECKPOINT)).model.diffusion_model
        config = config_of(flux)
        shared = transformer_of(config, dict(flux.named_parameters()))
        own = {name: weight.clone() for name, weight in shared.state_dict().items()}
        self._model: Any = shared
        self._model.load_state_dict(own, assign=True)
        self._places, self._params = places(config), flux.params
        self._deltas = lora_deltas(load_file(folder / LORA))
        self._lora = 0.0
        self._model.compile_repeated_blocks(fullgraph=True, backend=backend)

    def prepare(self, step: Step) -> Callable[[Callable[[Callable[[], Tensor]], Tensor]], Tensor]:
        if step.resident is not None:
            raise ValueError("diffusers has no budget of its own")
        self._fuse(step.lora - self._lora)
        self._lora = step.lora
        noise, text, pooled = latent_and_text(step, self._params.context_in_dim, self._params.vec_in_dim)
        rows, columns = step.height // 16, step.width // 16
        patches = noise.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        inputs = dict(
            hidden_states=patches.flatten(3).flatten(1, 2),
            encoder_hidden_states=text.expand(step.batch, -1, -1),
            pooled_projections=pooled.expand(step.batch, -1),
            timestep=torch.ones(step.batch),
            guidance=torch.full((step.batch,), 3.5),
            img_ids=ids,
            txt_ids=torch.zeros(step.tokens, 3),
            return_dict=False,
        )

        def run(timed: Callable[[Callable[[], Tensor]], Tensor]) -> Tensor:
            with torch.inference_mode():
                (out,) = timed(lambda: self._model(**inputs))
            velocity = out.unflatten(2, (16, 2, 2)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
            return noise - velocity.flatten(4).flatten(2, 3)

        return run

    @torch.no_grad()
    def _fuse(self, strength: float) -> None:
        for name, weight in self._model.named_parameters():
            if name in self._places and self._places[name].name in self._deltas:
                weight += strength * self._places[name].within(self._deltas)


def lora_deltas(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the LoRA of ``devtools.checkpoints`` adds at strength 1, by the name of the host's weight."""
    up, down = ".lora_up.weight", ".lora_down.weight"
    layers = [name.removesuffix(up) for name in lora if name.endswith(up)]
    return {
        f"{layer.removeprefix('diffusion_model.')}.weight": lora[layer + up] @ lora[layer + down] for layer in layers
    }


def make_side(name: str, folder: Path, backend: str) -> HostSide | DiffusersSide:
    if name == "diffusers":
        return DiffusersSide(folder, backend)
    return HostSide(folder, _compilers(backend)[name])


def _compilers(backend: str) -> dict[str, Callable[[Any], Any]]:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return {
        "eager": lambda model: model,
        "whole model": lambda model: TorchCompileModel.execute(model, backend).args[0],
        "per block": lambda model: gpu_host.compiled_per_block(model, backend),
        "ours": lambda model: gpu_host.compiled(model, cache="auto", backend=backend),
    }


def cpu_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _status(name: str) -> int | None:
    """A size of this process in bytes, from Linux."""
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def start_compiler(name: str, backend: str) -> float:
    """CPU seconds for the least there is to compile, as the side ``name`` compiles: imports, C++ headers, and the
    instruction sets that Inductor probes."""
    before = cpu_seconds()
    options = None
    if name == "ours" and backend == "inductor":
        from hotpath_pack.hotpath.inductor import region_options
        from hotpath_pack.hotpath.internals.compiler import trust_compiler

        trust_compiler()
        options = region_options("default", probe=False)
    torch.compile(lambda x: x + 1, backend=backend, options=options)(torch.zeros(8))
    # Its graph is none of the side's.
    torch._dynamo.utils.counters.clear()
    return cpu_seconds() - before


def run_step(
    side: HostSide | DiffusersSide, step: Step, output: Path, start: Callable[[], float] | None = None
) -> Done:
    """``start``: starts the compiler first; None where it has started, or none is used."""
    from hotpath_pack.hotpath.counters import graphs_so_far

    run = side.prepare(step)
    started = 0.0 if start is None else start()
    before = _status("VmRSS")
    if before is not None:
        # Linux measures the peak anew from here.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    took: list[float] = []

    def timed(call: Callable[[], Tensor]) -> Tensor:
        cpu, wall = cpu_seconds(), time.perf_counter()
        out = call()
        took.extend((cpu_seconds() - cpu, time.perf_counter() - wall))
        return out

    out = run(timed)
    peak = _status("VmHWM")
    save_file({"out": out.contiguous().clone()}, output)
    memory = None if before is None or peak is None else peak - before
    cpu, wall = took
    return Done(started, cpu, wall, graphs_so_far(), memory, str(output))


def main(name: str, folder: Path, backend: str) -> None:
    # What the host prints must not come between.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    gpu_host.start(dynamic_vram=False, cpu=True)
    import folder_paths

    # Nothing was compiled before, as after installing.
    folder_paths.set_user_directory(tempfile.mkdtemp())
    logging.getLogger().setLevel(logging.ERROR)
    from comfyui_version import __version__ as comfyui

    side = make_side(name, folder, backend)
    versions = {"torch": torch.__version__, "ComfyUI": comfyui, "diffusers": version("diffusers")}
    print(json.dumps(versions), file=answers, flush=True)
    start = partial(start_compiler, name, backend)
    to_start = None if name == "eager" else start
    for number, line in enumerate(sys.stdin):
        output = folder / f"{name} {os.getpid()} {number}.safetensors"
        done, to_start = run_step(side, Step(**json.loads(line)), output, to_start), None
        print(json.dumps(asdict(done)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
