"""Compile what a MODEL will need, before the first prompt asks for it."""

from __future__ import annotations

import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..measuring.synthetic import Inputs, read_batch_sizes, read_sizes, sample
from ..models import compiled_elsewhere, require_model
from ..telling.progress import NodeText
from .compile import compiled_blocks


def warm_up(model: ModelPatcher, sizes: str, batch_sizes: str, tokens: int, text: NodeText) -> str:
    """Run one step of ``model`` at each of ``sizes`` and ``batch_sizes``; what took how long, a line each.

    Raises:
        ValueError: ``model`` is no MODEL or none of those that this pack speeds up, nothing on it compiles, or a size
            or batch size can't be read.
    """
    require_model(model)
    if compiled_blocks(model) is None and not compiled_elsewhere(model):
        raise ValueError(
            "model: nothing compiles it, so there is nothing to warm up. Put Warm Up after Compile Repeated Blocks."
        )
    runs = [
        Inputs(width, height, batch, tokens)
        for batch in read_batch_sizes(batch_sizes)
        for width, height in read_sizes(sizes)
    ]
    bar = comfy.utils.ProgressBar(len(runs))
    lines = []
    with text.guarded():
        for number, inputs in enumerate(runs, 1):
            text.show(f"warming up {inputs} ({number}/{len(runs)}) ...", "working")
            (seconds,) = sample(model, inputs, 1, lambda: bar.update(1))
            lines.append(f"{inputs}: {seconds:.1f} s")
    text.show(f"ready for {len(runs)} kind{'s' if len(runs) > 1 else ''} of input")
    return "\n".join(lines)
