"""Remakes what users open and add, in a real ComfyUI and browser: the example workflows with thumbnails, of their
API-format twins, and the blueprint.

Names of workflows as arguments remake these alone. Needs Playwright's Python package and a Chromium.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from .browser import Canvas, canvas, chromium
from .cli import comfyui_folder, run_tool
from .examples import BLUEPRINT, EXAMPLES, MODELS, SITE, save_stand_ins, twins
from .server import HostServer
from .workflows import Workflow

# What the note of a workflow says beside the files.
NOTES = {
    "Flux text to image": "Flux.1 dev with its blocks compiled. The first image takes some seconds longer. After that "
    "another size, prompt or LoRA compiles nothing again. With PyTorch 2.11 or newer, the next start doesn't either.",
    "Flux with LoRA": "A LoRA goes before **Compile Repeated Blocks**. Take another one, change its strength or bypass "
    "it: nothing is compiled again. This one makes an image in 8 steps; with others set *steps* back to 20.",
    "Flux in 8 bits": "**Quantize Repeated Blocks** halves the memory of the model and multiplies in 8 bits. It wants "
    "the full-precision file with *weight_dtype* at *default*. Its *format* lists what your machine can run; "
    "*auto* is the first of them.",
    "Flux on 12 GB": "**Offload Repeated Blocks** keeps on the card what fits beside the image and streams the rest "
    "from RAM while the card computes. The image stays the same. RAM must hold the model, 24 GB. With Quantize "
    "Repeated Blocks before it, twice as much of it fits on the card.",
    "Flux Kontext edit": "Load a picture and say what to change in it. The file is in fp8 already, so there is nothing "
    "to quantize. Pictures of other sizes compile nothing again.",
    "Flux 2 text to image": "Flux.2 dev is 35 GB in 8 bits. What doesn't fit on the card is streamed from RAM, which "
    "must hold the model, while the card computes.",
    "Qwen-Image text to image": "Qwen-Image with its blocks compiled. All 60 are alike, so that one graph serves them, "
    "whatever the size and the prompt. The file's weights are in fp8; with the bf16 file, **Quantize Repeated Blocks** "
    "before the compile node does that more accurately.",
    "Z-Image Turbo text to image": "Z-Image Turbo with its blocks compiled, the refiners before them too: two graphs "
    "in all. **Compile Repeated Blocks** comes last on the MODEL line, after *ModelSamplingAuraFlow* and LoRA loaders.",
    "Wan 2.2 text to video": "Wan 2.2 (5B) with its blocks compiled as one graph, for any size, length and prompt. On "
    "a small card **Offload Repeated Blocks** goes before the compile node.",
    "Krea 2 text to image": "Krea 2 Turbo with its blocks compiled, for any size and prompt. LoRA loaders go before "
    "**Compile Repeated Blocks**. The file is in fp8 already, so there is nothing to quantize.",
    "LTX-Video 2 text to video": "LTX-Video 2 makes a video and its sound in the same blocks, which are compiled, for "
    "any size, length and prompt. The length is a multiple of 8 and one more. On a small card **Offload Repeated "
    "Blocks** goes before the compile node.",
    "Flux benchmark": "Measures a step of the model as it is and compiled, in turns, on made-up inputs. No text "
    "encoder and no VAE are needed. Put your own LoRAs and patches between the nodes.",
}
# Columns from left to right, of groups from top to bottom: title, colour, and the nodes in it.
COLUMNS = (
    (("Models", "#3f789e", "Loader|Lora|ModelSampling"),),
    (("HotPath", "#b06634", "^HotPath"), ("Picture", "#8a8", "LoadImage|ImageScale|VAEEncode")),
    (
        (
            "Prompt and size",
            "#8a8",
            "CLIPTextEncode|ReferenceLatent|FluxGuidance|LTXVConditioning|ZeroOut|Empty|ImageToVideoLatent|ConcatAV",
        ),
        ("Steps", "#88a", "Noise|Select|Scheduler"),
    ),
    (("Sampling", "#88a", "KSampler|Guider|SamplerCustom"), ("Result", "#a88", "Separate|VAEDecode|CreateVideo|Save")),
)
_ARRANGE = """
async ([workflow, name, note, columns, models]) => {
    const { app, LiteGraph } = window;
    await app.loadApiJson(workflow, name);
    const graph = app.graph;
    // Nodes 2.0 draws a node up to 32 pixels taller.
    const [gap, margin, title] = [36, 20, 40];
    const sizes = {
        CLIPTextEncode: [400, 180], LoadImage: [300, 340], SaveImage: [300, 360], HotPathBenchmarkModel: [640, 620],
    };
    const sizeOf = (node) => sizes[node.type] ?? [Math.min(node.size[0], 400), node.computeSize()[1]];
    const left = new Set(graph._nodes);
    let x = 0, below = 0;
    for (const groups of columns) {
        let top = 0, widest = 0;
        for (const [name, color, types] of groups) {
            const nodes = [...left].filter((node) => new RegExp(types).test(node.type));
            if (!nodes.length) continue;
            const width = Math.max(x ? 300 : 400, ...nodes.map((node) => sizeOf(node)[0]));
            let y = top + title;
            for (const node of nodes) {
                left.delete(node);
                node.setSize([width, sizeOf(node)[1]]);
                node.pos = [x + margin, y + LiteGraph.NODE_TITLE_HEIGHT];
                // Its panel grows once it runs.
                const grows = node.type.startsWith("HotPath") ? 80 : 0;
                y += LiteGraph.NODE_TITLE_HEIGHT + node.size[1] + grows + gap;
                for (const { value } of node.widgets ?? []) {
                    if (models[value]) (node.properties.models ??= []).push({ name: value, ...models[value] });
                }
            }
            const group = new LiteGraph.LGraphGroup(name);
            group.pos = [x, top];
            group.size = [width + 2 * margin, y - top];
            group.color = color;
            graph.add(group);
            widest = Math.max(widest, group.size[0]);
            top = y + gap;
        }
        below ||= top;
        x += widest && widest + 2 * gap;
    }
    if (left.size) throw new Error(`no group for ${[...left].map((node) => node.type)}`);
    const text = LiteGraph.createNode("MarkdownNote");
    graph.add(text);
    text.title = "About this workflow";
    text.widgets[0].value = note;
    text.pos = [0, below + LiteGraph.NODE_TITLE_HEIGHT];
    text.setSize([440, 320]);
    return JSON.stringify((await app.graphToPrompt()).workflow);
}
"""
# Shows these groups alone, in a square of so many pixels.
_FRAME = """
([titles, pixels]) => {
    const { canvas, graph } = window.app;
    document.querySelector(".workflow-tabs-container").closest("#graph-canvas-container > div").style.display = "none";
    graph._nodes.filter((node) => node.type === "MarkdownNote").forEach((node) => graph.remove(node));
    canvas.show_info = false;
    canvas.min_font_size_for_lod = 0;
    const groups = graph._groups.filter((group) => titles.includes(group.title));
    const ends = [0, 1].map((axis) => Math.max(...groups.map((group) => group.pos[axis] + group.size[axis])));
    const side = Math.max(...ends) + 40;
    canvas.ds.scale = pixels / side;
    canvas.ds.offset = ends.map((end) => (side - end) / 2);
    graph.setDirtyCanvas(true, true);
}
"""
THUMBNAIL = 512
DESCRIPTION = (
    "Makes a Flux MODEL smaller and faster, with a switch for each: 8-bit weights (full-precision models), streaming "
    "of what doesn't fit on the card, compiled blocks. Put it right before the sampler, after LoRA loaders."
)
ALIASES = ["flux speed", "torch compile", "low vram", "quantize", "offload", "hotpath"]
# The switches of the blueprint: name, position at first, and the node, in their order on the MODEL line.
CHOICES = (
    ("8-bit weights", False, "HotPathQuantizeRepeatedBlocks"),
    ("stream what doesn't fit", True, "HotPathOffloadRepeatedBlocks"),
    ("compile", True, "HotPathCompileRepeatedBlocks"),
)
_PUBLISH = """
async ([name, choices]) => {
    const { canvas, graph, extensionManager } = window.app;
    graph.clear();
    const add = (type, x, y) => {
        const node = window.LiteGraph.createNode(type);
        graph.add(node);
        node.pos = [x, y];
        return node;
    };
    const input = (node, name) => node.inputs.findIndex((slot) => slot.name === name);
    // What is linked to something outside becomes a slot.
    let model = add("UNETLoader", -400, 0);
    const inner = [];
    choices.forEach(([label, on, type], index) => {
        const [node, choice] = [add(type, 400 * index, 0), add("ComfySwitchNode", 400 * index, 360)];
        choice.title = label;
        choice.widgets.find((widget) => widget.name === "switch").value = on;
        model.connect(0, node, 0);
        model.connect(0, choice, input(choice, "on_false"));
        node.connect(0, choice, input(choice, "on_true"));
        inner.push(node, choice);
        model = choice;
    });
    model.connect(0, add("ModelSamplingFlux", 400 * choices.length, 0), 0);
    const { subgraph, node } = graph.convertToSubgraph(new Set(inner));
    for (const [label] of choices) {
        const choice = subgraph._nodes.find((node) => node.title === label);
        subgraph.addInput(label, "BOOLEAN").connect(choice.inputs[input(choice, "switch")], choice);
    }
    subgraph.outputs[0].name = node.outputs[0].name = "model";
    subgraph.renameOutput(subgraph.outputs[0], "model");
    subgraph.inputNode.pos = [-300, 300];
    subgraph.outputNode.pos = [400 * choices.length, 300];
    node.title = name;
    node.setSize([300, node.computeSize()[1]]);
    canvas.deselectAll();
    canvas.select(node);
    await extensionManager.command.execute("Comfy.PublishSubgraph", { metadata: { name } });
}
"""


def note(name: str, workflow: Workflow) -> str:
    """The Markdown beside a workflow: what it shows, and which files go where."""
    lines = [f"## {name}", "", NOTES[name], "", "### Files", ""]
    values = [value for node in workflow.values() for value in node["inputs"].values()]
    for file, (folder, address) in MODELS.items():
        if file in values:
            lines.append(f"- [{file}]({SITE}{address}) in *models/{folder}*")
    lines += ["", f"Without a screen: *example_workflows/api/{name}.json* is the same in API format."]
    return "\n".join(lines)


def dump(path: Path, graph: Any) -> None:
    """Write a graph as the frontend saves it, with ids that stay the same when it is made again."""
    ids: dict[str, str] = {}

    def id_of(found: re.Match[str]) -> str:
        return ids.setdefault(found[0], str(uuid5(NAMESPACE_URL, f"hotpath/{path.stem}/{len(ids)}")))

    text = json.dumps(graph, ensure_ascii=False, separators=(",", ":"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(re.sub(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", id_of, text) + "\n", encoding="utf-8")


def make_workflow(shown: Canvas, name: str, workflow: Workflow) -> None:
    """Lay a workflow out, and keep it and a picture of it."""
    models = {file: {"url": SITE + address, "directory": folder} for file, (folder, address) in MODELS.items()}
    graph = json.loads(shown.page.evaluate(_ARRANGE, [workflow, name, note(name, workflow), COLUMNS, models]))
    dump(EXAMPLES / f"{name}.json", graph)
    shown.page.evaluate(_FRAME, [["Models", "HotPath", "Picture"], THUMBNAIL])
    shown.page.wait_for_timeout(1000)
    shown.page.screenshot(
        path=EXAMPLES / f"{name}.jpg",
        type="jpeg",
        quality=85,
        clip={"x": 0, "y": 0, "width": THUMBNAIL, "height": THUMBNAIL},
    )


def make_blueprint(shown: Canvas) -> None:
    """Publish the blueprint as a user would, and keep what was saved."""
    name = BLUEPRINT.stem
    shown.page.evaluate(_PUBLISH, [name, CHOICES])
    graph = shown.server.get(f"/userdata/subgraphs%2F{name}.json")
    graph["definitions"]["subgraphs"][0] |= {"category": "HotPath", "description": DESCRIPTION}
    graph["extra"] = {"BlueprintDescription": DESCRIPTION, "BlueprintSearchAliases": ALIASES}
    dump(BLUEPRINT, graph)


def main(arguments: Sequence[str]) -> int:
    with HostServer(comfyui_folder()) as server, chromium() as browser:
        save_stand_ins(server)
        for name, workflow in twins().items():
            if arguments and name not in arguments:
                continue
            with canvas(browser, server) as shown:
                make_workflow(shown, name, workflow)
        if not arguments:
            with canvas(browser, server) as shown:
                make_blueprint(shown)
    return 0


if __name__ == "__main__":
    run_tool(main)
