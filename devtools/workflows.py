"""API-format workflows of the host's own nodes, with node ids that say what the node is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .checkpoints import FluxFile

Workflow = dict[str, dict[str, Any]]


def sampling(
    checkpoint: str,
    flux: FluxFile,
    *,
    width: int = 256,
    height: int = 256,
    batch: int = 1,
    steps: int = 4,
    seed: int = 1,
    tokens: int = 16,
    weight_dtype: str = "default",
    loras: Sequence[tuple[str, float]] = (),
    patches: Sequence[tuple[str, float]] = (),
    quantized: str | None = None,
    offload: Mapping[str, Any] | None = None,
    compiled: Mapping[str, Any] | None = None,
    report: bool = False,
) -> Workflow:
    """Sample a latent and save it.

    The MODEL goes through nodes ``model``, ``lora0``..., ``patch0``..., ``quantize``, ``offload``, ``compile``; the
    rest are ``text``, ``empty``, ``sampler`` and ``save``.

    Args:
        checkpoint: file name in the host's ``diffusion_models`` folder; ``flux`` describes it.
        loras: (file name, strength) for each LoraLoaderModelOnly.
        patches: (kind, strength) for each HotPathDevPatch.
        quantized: format of Quantize Repeated Blocks; None leaves the node out.
        offload: inputs of Offload Repeated Blocks other than its defaults; None leaves the node out.
        compiled: inputs of Compile Repeated Blocks other than its defaults; None leaves the node out.
        report: end in a Compile Report, node ``report``.
    """
    nodes: Workflow = {}

    def add(name: str, class_type: str, **inputs: Any) -> list[Any]:
        nodes[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    model = add("model", "UNETLoader", unet_name=checkpoint, weight_dtype=weight_dtype)
    for index, (name, strength) in enumerate(loras):
        model = add(f"lora{index}", "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
    for index, (kind, strength) in enumerate(patches):
        model = add(f"patch{index}", "HotPathDevPatch", model=model, kind=kind, strength=strength)
    if quantized is not None:
        model = add("quantize", "HotPathQuantizeRepeatedBlocks", model=model, format=quantized, skip="")
    if offload is not None:
        model = add("offload", "HotPathOffloadRepeatedBlocks", model=model, **{**OFFLOAD_DEFAULTS, **offload})
    if compiled is not None:
        model = add("compile", "HotPathCompileRepeatedBlocks", model=model, **{**COMPILE_DEFAULTS, **compiled})
    text = add(
        "text",
        "HotPathDevConditioning",
        tokens=tokens,
        text_width=flux.text_width,
        pooled_width=flux.pooled_width,
        guidance=3.5,
        seed=0,
    )
    empty_latent = "EmptyFlux2LatentImage" if flux.flux2 else "EmptySD3LatentImage"
    samples = add(
        "sampler",
        "KSampler",
        model=model,
        seed=seed,
        steps=steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=text,
        negative=text,
        latent_image=add("empty", empty_latent, width=width, height=height, batch_size=batch),
        denoise=1.0,
    )
    add("save", "SaveLatent", samples=samples, filename_prefix="latent")
    if report:
        add("report", "HotPathCompileReport", model=model, after=samples)
    return nodes


COMPILE_DEFAULTS: Mapping[str, Any] = {
    "mode": "default",
    "backend": "inductor",
    "fullgraph": True,
    "dynamic": "auto",
    "double_blocks": "all",
    "single_blocks": "all",
    "on_failure": "error",
}

OFFLOAD_DEFAULTS: Mapping[str, Any] = {
    "budget": "auto",
    "prefetch_blocks": 1,
    "pin_memory": True,
    "modulation": "ahead",
    "resident": "spread",
}
