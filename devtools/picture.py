"""Remakes the README's picture: our nodes in a graph, after it ran in a real ComfyUI and browser.

Needs Playwright's Python package and a Chromium, whose path is the argument.
"""

from __future__ import annotations

from collections.abc import Sequence

from playwright.sync_api import sync_playwright

from .checkpoints import describe, flux1, save
from .cli import comfyui_folder, run_tool
from .server import ROOT, HostServer
from .workflows import sampling

PICTURE = ROOT / "docs" / "graph.png"
# Node -> column and row of the picture.
PLACES = {
    "model": (0, 0),
    "lora0": (1, 0),
    "quantize": (2, 0),
    "compile": (3, 0),
    "sampler": (4, 0),
    "text": (0, 1),
    "empty": (1, 1),
    "save": (5, 0),
}
ARRANGE = """
async ([workflow, places]) => {
    const app = window.app;
    await app.loadApiJson(workflow, "Flux");
    const names = Object.keys(workflow);
    app.graph._nodes.forEach((node, index) => {
        const [column, row] = places[names[index]] ?? [0, 2];
        node.size = [Math.max(node.size[0], 270), node.size[1]];
        node.pos = [60 + column * 330, 120 + row * 420];
    });
    app.canvas.ds.scale = 0.84;
    app.canvas.ds.offset = [20, 90];
    app.graph.setDirtyCanvas(true, true);
}
"""


def main(arguments: Sequence[str]) -> int:
    with HostServer(comfyui_folder()) as server:
        weights = flux1(4, 8)
        checkpoint = save(server.diffusion_models / "flux1-dev.safetensors", weights)
        save(server.loras / "style.safetensors", weights)
        workflow = sampling(
            checkpoint.name,
            describe(checkpoint),
            loras=[("style.safetensors", 0.8)],
            quantized="int8_dynamic",
            compiled={"on_failure": "eager"},
            steps=20,
        )
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=arguments[0], args=["--no-sandbox", "--disable-background-networking"]
            )
            page = browser.new_page(viewport={"width": 2100, "height": 620})
            page.goto(server.url)
            page.wait_for_function("window.app?.graph && window.app.canvas", timeout=60_000)
            page.wait_for_timeout(3000)
            page.keyboard.press("Escape")
            page.evaluate(ARRANGE, [workflow, PLACES])
            page.evaluate("window.app.queuePrompt(0)")
            page.wait_for_timeout(2000)
            while any(server.get("/queue").values()):
                page.wait_for_timeout(500)
            page.screenshot(path=PICTURE, clip={"x": 66, "y": 126, "width": 1670, "height": 285})
            browser.close()
    return 0


if __name__ == "__main__":
    run_tool(main)
