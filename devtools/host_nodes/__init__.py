"""Nodes for HotPath's own demo, bench and tests. The development host loads them; they are not part of the pack."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from zlib import crc32

import comfy.model_management
import torch
from aiohttp import web
from comfy.model_base import BaseModel
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import ComfyExtension, io
from server import PromptServer
from torch import Tensor, nn
from torch._dynamo import register_backend

import nodes


def random_text(tokens: int, text_width: int, pooled_width: int, seed: int) -> list[Any]:
    """One entry of the host's CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, text_width, generator=generator)
    return [text, {"pooled_output": torch.randn(1, pooled_width, generator=generator)} if pooled_width else {}]


class HotPathDevConditioning(io.ComfyNode):
    """Random text conditioning of a given size, in place of text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathDevConditioning",
            category="_for_testing/hotpath",
            inputs=[
                io.Int.Input("tokens", default=16, min=1, max=4096),
                io.Int.Input("text_width", default=64, min=1, max=65536),
                io.Int.Input("pooled_width", default=32, min=0, max=65536, tooltip="0: no pooled output."),
                io.Float.Input("guidance", default=3.5, min=0.0, max=100.0),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens: int, text_width: int, pooled_width: int, guidance: float, seed: int) -> io.NodeOutput:
        text, extras = random_text(tokens, text_width, pooled_width, seed)
        return io.NodeOutput([[text, {**extras, "guidance": guidance}]])


class RandomClip:
    """As much of the host's CLIP as its text nodes use; another text gives other random numbers."""

    def __init__(self, tokens: int, text_width: int, pooled_width: int) -> None:
        self.size = (tokens, text_width, pooled_width)

    def tokenize(self, text: str) -> int:
        return crc32(text.encode())

    def encode_from_tokens_scheduled(self, tokens: int) -> list[Any]:
        return [random_text(*self.size, tokens)]


class HotPathDevTextEncoder(io.ComfyNode):
    """A text encoder of a given size, where the host's own are of fixed ones of gigabytes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathDevTextEncoder",
            category="_for_testing/hotpath",
            inputs=[
                io.Int.Input("tokens", default=16, min=1, max=4096),
                io.Int.Input("text_width", default=64, min=1, max=65536),
                io.Int.Input("pooled_width", default=32, min=0, max=65536, tooltip="0: no pooled output."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, tokens: int, text_width: int, pooled_width: int) -> io.NodeOutput:
        return io.NodeOutput(RandomClip(tokens, text_width, pooled_width))


def attn1_patch(model: Any, strength: float) -> None:
    def scale_query(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> dict[str, Tensor]:
        return {"q": q * strength, "k": k, "v": v}

    model.set_model_attn1_patch(scale_query)


def attn1_output_patch(model: Any, strength: float) -> None:
    model.set_model_attn1_output_patch(lambda attn, extra_options: attn * strength)


def patches_replace(model: Any, strength: float) -> None:
    """Scale what the first block of each kind returns."""

    def replace(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * strength}

    model.set_model_patch_replace(replace, "dit", "double_block", 0)
    model.set_model_patch_replace(replace, "dit", "single_block", 0)


def attention_override(model: Any, strength: float) -> None:
    def override(func: Callable[..., Tensor], q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return func(q * strength, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


class ForeignLinear(nn.Module):
    """A Linear of a class that HotPath doesn't know."""

    def __init__(self, linear: nn.Module, strength: float) -> None:
        super().__init__()
        self.linear = linear
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.strength


@contextmanager
def forward_hook(block: nn.Module, name: str, strength: float) -> Iterator[None]:
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, out: out * strength)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def inner_forward(block: nn.Module, name: str, strength: float) -> Iterator[None]:
    layer = block.get_submodule(name)
    original = layer.forward
    layer.forward = lambda x: original(x) * strength
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def foreign_linear(block: nn.Module, name: str, strength: float) -> Iterator[None]:
    layer = block.get_submodule(name)
    block.set_submodule(name, ForeignLinear(layer, strength))
    try:
        yield
    finally:
        block.set_submodule(name, layer)


def while_it_runs(change: Callable[[nn.Module, str, float], Any]) -> Callable[[Any, float], None]:
    """A patch that changes one layer in the first block of each kind for the length of a model call."""

    def patch(model: Any, strength: float) -> None:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            diffusion_model = executor.class_obj.diffusion_model
            with (
                change(diffusion_model.double_blocks[0], "img_attn.proj", strength),
                change(diffusion_model.single_blocks[0], "linear2", strength),
            ):
                return executor(*args, **kwargs)

        model.add_wrapper(WrappersMP.APPLY_MODEL, wrapper)

    return patch


def low_vram(model: Any, strength: float) -> None:
    """Sample with every weight offloaded: the host casts it, and applies its LoRA, at each use."""

    def offload(patcher: Any) -> None:
        patcher.unpatch_model(patcher.offload_device)
        patcher.patch_model(patcher.load_device, lowvram_model_memory=1)

    model.add_callback(CallbacksMP.ON_PRE_RUN, offload)


KINDS: dict[str, Callable[[Any, float], None]] = {
    "attn1_patch": attn1_patch,
    "attn1_output_patch": attn1_output_patch,
    "patches_replace": patches_replace,
    "attention_override": attention_override,
    "forward_hook": while_it_runs(forward_hook),
    "inner_forward": while_it_runs(inner_forward),
    "foreign_linear": while_it_runs(foreign_linear),
    "low_vram": low_vram,
}


def faulty_backend(graph: Any, inputs: Any, **options: Any) -> Any:
    raise RuntimeError("no such kernel")


def out_of_memory_backend(graph: Any, inputs: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory while autotuning")


def slow_backend(graph: Any, inputs: Any, **options: Any) -> Any:
    """Takes long enough to be looked at."""
    for _ in range(15):
        time.sleep(0.1)
        comfy.model_management.throw_exception_if_processing_interrupted()
    return graph.forward


register_backend(faulty_backend, name="hotpath_dev_faulty")
register_backend(slow_backend, name="hotpath_dev_slow")
register_backend(out_of_memory_backend, name="hotpath_dev_out_of_memory")


class HotPathDevPatch(io.ComfyNode):
    """Patches a Flux the way that other packs do. Strength 1 leaves the result as it is; ``low_vram`` always does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathDevPatch",
            category="_for_testing/hotpath",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("kind", options=list(KINDS)),
                io.Float.Input("strength", default=1.5, min=-10.0, max=10.0, step=0.01),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, strength: float) -> io.NodeOutput:
        patched = model.clone()
        KINDS[kind](patched, strength)
        return io.NodeOutput(patched)


class HotPathDevQuantize(io.ComfyNode):
    """Quantize Repeated Blocks in a format that this machine has no products for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HotPathDevQuantize",
            category="_for_testing/hotpath",
            inputs=[io.Model.Input("model"), io.String.Input("format"), io.String.Input("skip")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, format: str, skip: str) -> io.NodeOutput:
        node = nodes.NODE_CLASS_MAPPINGS["HotPathQuantizeRepeatedBlocks"]
        host = sys.modules[sys.modules[node.__module__].quantize_repeated_blocks.__module__]
        formats = sys.modules[host.require_format.__module__].FORMATS
        with patch.object(type(formats[format]), "missing", return_value=None):
            return io.NodeOutput(host.quantize_repeated_blocks(model, format, skip, host.NodeText(None)))


def count_models() -> int:
    """Models that are in memory, once what is only waiting for the collector is gone."""
    gc.collect()
    return sum(isinstance(thing, BaseModel) for thing in gc.get_objects())


class HotPathDevExtension(ComfyExtension):
    async def on_load(self) -> None:
        @PromptServer.instance.routes.get("/hotpath_dev/models")
        async def get_models(request: web.Request) -> web.Response:
            return web.json_response(count_models())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [HotPathDevConditioning, HotPathDevTextEncoder, HotPathDevPatch, HotPathDevQuantize]


async def comfy_entrypoint() -> HotPathDevExtension:
    return HotPathDevExtension()
