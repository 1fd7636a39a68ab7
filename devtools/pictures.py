"""dev.py pictures: remakes docs/'s pictures of the canvas, which are what a browser shows of prompts that run.

Needs Playwright's Python package, Pillow and a Chromium of the machine.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from playwright.sync_api import Browser

from .browser import PANEL, Canvas, canvas, chromium
from .checkpoints import FluxFile, describe, flux1, lora, save
from .cli import comfyui_folder, run_tool
from .server import ROOT, HostServer
from .workflows import Workflow, sampling

DOCS = ROOT / "docs"
CHECKPOINT = "flux1-dev.safetensors"
# The MODEL's line, which is pictured; the rest is below the page.
_LINE = ("model", "lora0", "quantize", "compile", "sampler")
_LEFT, _TOP, _STEP, _BELOW = 100, 200, 320, 900
_GAP = 12
# Seconds between the frames of the animation, in the browser and when it is played.
_EVERY, _SHOWN = 0.5, 0.12
_BACKGROUNDS = ("#141414", "#f0f0f0")


def main(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="dev.py pictures", description=__doc__).parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as cache,
        # An empty one, so that it compiles as at the first time.
        HostServer(comfyui_folder(), env={"TORCHINDUCTOR_CACHE_DIR": cache}) as server,
        chromium() as browser,
    ):
        weights = flux1(4, 8)
        flux = describe(save(server.diffusion_models / CHECKPOINT, weights))
        save(server.loras / "style.safetensors", lora(weights))
        picture_graph(browser, server, flux)
        picture_states(browser, server, flux)
    return 0


def picture_graph(browser: Browser, server: HostServer, flux: FluxFile) -> None:
    """docs/compiling.gif while a graph compiles, and docs/graph.png when it has run."""
    workflow = _workflow(flux, "inductor", loras=[("style.safetensors", 0.8)], quantized="int8_dynamic", steps=8)
    with canvas(browser, server, vue=True, size=(1800, 700), density=1.5) as page:
        ids = _show(page, workflow)
        page.queue()
        page.panel("compiling").wait_for(timeout=120_000)
        node = page.page.locator(f'[data-node-id="{ids["compile"]}"]')
        frames = []
        while page.panel("compiling").count():
            frames.append(_image(node.screenshot()))
            time.sleep(_EVERY)
        page.wait_for_queue()
        page.reads("compiled")
        frames += [_image(node.screenshot())] * 12
        _animate(frames)
        boxes = [page.page.locator(f'[data-node-id="{ids[name]}"]').bounding_box() for name in _LINE]
        found = [box for box in boxes if box is not None]
        left, top = min(box["x"] for box in found) - _GAP, min(box["y"] for box in found) - _GAP
        right = max(box["x"] + box["width"] for box in found) + _GAP
        bottom = max(box["y"] + box["height"] for box in found) + _GAP
        clip: Any = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        page.page.screenshot(path=DOCS / "graph.png", clip=clip)


def picture_states(browser: Browser, server: HostServer, flux: FluxFile) -> None:
    """docs/panel.png: what the panel of Compile Repeated Blocks can say, in both themes."""
    shots: list[list[Image.Image]] = []
    with canvas(browser, server, vue=True, density=2) as page:

        def shoot(state: str) -> None:
            page.panel(state).wait_for(timeout=60_000)
            both = []
            for palette in ("dark", "light"):
                page.page.evaluate(
                    "name => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette
                )
                page.page.wait_for_timeout(300)
                both.append(_image(page.page.locator(PANEL).first.screenshot()))
            shots.append(both)

        ids = _show(page, _workflow(flux, "inductor"))
        shoot("idle")
        page.queue()
        shoot("compiling")
        page.wait_for_queue()
        shoot("compiled")
        page.set(ids["empty"], batch_size=2)
        page.queue()
        page.wait_for_queue()
        shoot("recompiled")
        _show(page, _workflow(flux, "hotpath_dev_slow", patches=[("forward_hook", 1.5)]))
        page.queue()
        page.wait_for_queue()
        shoot("eager")
        _show(page, _workflow(flux, "hotpath_dev_faulty", on_failure="error"))
        page.queue()
        page.wait_for_queue()
        shoot("stopped")
    _sheet(shots)


def _workflow(flux: FluxFile, backend: str, on_failure: str = "eager", **options: Any) -> Workflow:
    return sampling(
        CHECKPOINT, flux, compiled={"backend": backend, "on_failure": on_failure, "cache": "off"}, **options
    )


def _show(page: Canvas, workflow: Workflow) -> dict[str, int]:
    line = [name for name in _LINE if name in workflow]
    places = {name: (_LEFT + _STEP * number, _BELOW) for number, name in enumerate(workflow)}
    places |= {name: (_LEFT + _STEP * number, _TOP) for number, name in enumerate(line)}
    return page.load(workflow, places, scale=1.0)


def _image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _animate(frames: Sequence[Image.Image]) -> None:
    """Frames of the highest one's size, each shown for as long as it stayed."""
    width, height = max(frame.width for frame in frames), max(frame.height for frame in frames)
    shown = []
    for frame in frames:
        canvas = Image.new("RGB", (width, height), _BACKGROUNDS[0])
        canvas.paste(frame, (0, 0))
        shown.append(canvas.quantize(64, dither=Image.Dither.NONE))
    shown[0].save(
        DOCS / "compiling.gif",
        save_all=True,
        append_images=shown[1:],
        duration=round(_SHOWN * 1000),
        loop=0,
        optimize=True,
    )


def _sheet(shots: Sequence[Sequence[Image.Image]]) -> None:
    """Dark panels beside the same light ones, one state a row in two columns."""
    width = max(shot.width for both in shots for shot in both)
    half = -(-len(shots) // 2)
    columns = [shots[:half], shots[half:]]
    heights = [sum(max(shot.height for shot in both) + _GAP for both in column) + _GAP for column in columns]
    sheet = Image.new("RGB", (4 * (width + 2 * _GAP), max(heights)))
    for theme, background in enumerate(_BACKGROUNDS):
        for column, rows in enumerate(columns):
            left, top = (2 * theme + column) * (width + 2 * _GAP), _GAP
            sheet.paste(background, (left, 0, left + width + 2 * _GAP, sheet.height))
            for both in rows:
                sheet.paste(both[theme], (left + _GAP, top))
                top += max(shot.height for shot in both) + _GAP
    sheet.save(DOCS / "panel.png", optimize=True)


if __name__ == "__main__":
    run_tool(main)
