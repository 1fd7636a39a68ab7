"""What of this pack would run eager in a ComfyUI, and why: one table, before its tests are run.

    python -m devtools.canary

Each row is a tiny model of random weights through that ComfyUI's own loader and sampler, compiled without generating
code. A new ComfyUI is tried with it first: its blocks may have another structure than all that this pack knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checkpoints, gpu_host
from .cli import run_tool

_SMALL = (64, 64, 1, 16)


@dataclass(frozen=True)
class Row:
    """Of one model: how many blocks of which kind run compiled, and which run eager, by the reason."""

    name: str
    compiled: Mapping[str, int]
    eager: Mapping[str, Sequence[str]]

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """(model, blocks compiled, what runs eager and why), a line for each reason."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.compiled.items()) or "none"
        reasons = [f"{', '.join(sorted(blocks))}: {reason}" for reason, blocks in self.eager.items()]
        for index, reason in enumerate(reasons or ["nothing"]):
            yield (self.name, counts, reason) if index == 0 else ("", "", reason)


def models() -> dict[str, Callable[[], Any]]:
    """A MODEL of each kind that is tried, by name; made when called."""
    flux = checkpoints.flux1(2, 2)
    return {
        "Flux.1": lambda: _load(flux),
        "Flux.2": lambda: _load(checkpoints.flux2(2, 2)),
        "Chroma": lambda: _load(checkpoints.chroma(1, 1)),
        "Flux.1 in fp8": lambda: _load(checkpoints.quantized(flux, "float8_e4m3fn")),
        "Flux.1 in int8": lambda: _load(checkpoints.quantized(flux, "int8_tensorwise")),
        "Flux.1 with a LoRA": lambda: _with_lora(_load(flux), flux),
        "Flux.1 with a patch around attention": lambda: _patched(_load(flux)),
    }


def examine(name: str, make: Callable[[], Any]) -> Row:
    """One step of the MODEL that ``make`` gives; what the host or this pack raises is the reason for all of it."""
    from hotpath_pack.host.compiling.compile import compile_repeated_blocks, compiled_blocks
    from hotpath_pack.host.measuring.synthetic import Inputs, sample
    from hotpath_pack.host.telling.progress import NodeText
    from hotpath_pack.hotpath.compiled import CompileSettings

    try:
        settings = CompileSettings(backend="eager")
        model = compile_repeated_blocks(make(), settings, "all", "all", "eager", NodeText(None))
        sample(model, Inputs(*_SMALL), 1)
    except Exception as error:
        # A host that nobody has tried yet may raise anything.
        told = next(iter(str(error).strip().splitlines()), "")
        return Row(name, {}, {f"{type(error).__name__}: {told}": ["the model"]})
    blocks = compiled_blocks(model)
    assert blocks is not None
    return Row(name, dict(blocks.compiled), {reason: sorted(which) for reason, which in blocks.eager.items()})


def text(lines: Iterable[tuple[str, str, str]]) -> str:
    """``lines`` of one table, aligned."""
    return "\n".join(f"{name:<38}{counts:<22}{reason}" for name, counts, reason in lines)


def main(arguments: Sequence[str]) -> int:
    gpu_host.start(dynamic_vram=False, cpu=True)
    from comfyui_version import __version__

    print(f"ComfyUI {__version__}, PyTorch {torch.__version__}: what would run eager", flush=True)
    print(text([("model", "blocks compiled", "eager, and why")]), flush=True)
    for name, make in models().items():
        print(text(examine(name, make).lines()), flush=True)
    return 0


def _load(weights: Mapping[str, torch.Tensor]) -> Any:
    import comfy.sd

    # As nodes do; and by itself the host would compute in bf16.
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": torch.float32})
    if model is None:
        raise ValueError("this ComfyUI does not recognize the checkpoint")
    return model


def _with_lora(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    from comfy.sd import load_lora_for_models

    return load_lora_for_models(model, None, checkpoints.lora(weights), 1.0, 0)[0]


def _patched(model: Any) -> Any:
    model.set_model_attn1_output_patch(lambda attn, extra_options: attn * 0.5)
    return model


if __name__ == "__main__":
    run_tool(main)
