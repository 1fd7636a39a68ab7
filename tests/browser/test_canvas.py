"""What a user sees on the canvas, in the classic one and in Nodes 2.0."""

import re

from hotpath_pack.devtools.workflows import sampling

PANEL = ".hotpath-panel"


def workflow(live, **options):
    return sampling(live.checkpoint, live.flux, width=128, height=128, steps=2, **options)


def wait_for(page, state):
    page.page.wait_for_selector(f'{PANEL}[data-state="{state}"]', timeout=60_000, state="attached")
    return page.page.inner_text(f'{PANEL}[data-state="{state}"]')


def test_from_the_search_box_to_compiled(page, live, request):
    # Another seed in each mode, or the host would take the sampler's result from its cache.
    ids = page.load(workflow(live, seed=len(request.node.name)))
    page.page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.page.wait_for_selector("input:focus", timeout=20_000)
    page.page.keyboard.type("Compile Repeated Blocks", delay=10)
    page.page.wait_for_timeout(1500)
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("window.app.graph._nodes.some(node => node.type === 'HotPathCompileRepeatedBlocks')")
    # A click places it in newer frontends.
    page.page.mouse.click(800, 300)
    page.page.wait_for_selector(f'{PANEL}[data-state="idle"]', timeout=20_000, state="attached")
    page.page.evaluate(
        """ids => {
            const graph = window.app.graph;
            const find = id => graph._nodes.find(node => String(node.id) === id);
            const node = graph._nodes.find(node => node.type === "HotPathCompileRepeatedBlocks");
            node.widgets.find(widget => widget.name === "backend").value = "aot_eager";
            node.widgets.find(widget => widget.name === "cache").value = "off";
            find(ids.model).connect(0, node, 0);
            node.connect(0, find(ids.sampler), 0);
        }""",
        ids,
    )
    page.queue()
    text = wait_for(page, "compiled")
    page.wait_for_queue()
    assert re.search(r"2 double, 3 single", text) and re.search(r"Graphs\s+2", text), text
    shown = page.page.inner_text(PANEL)
    assert "Last step" in shown
    prompt = page.page.evaluate("window.app.graphToPrompt()")
    assert "hotpath_status" not in str(prompt["output"])


def test_the_menu_puts_compile_behind_a_model(page, live):
    ids = page.load(workflow(live))
    done = page.page.evaluate(
        """ids => {
            const graph = window.app.graph;
            const find = id => graph._nodes.find(node => String(node.id) === id);
            const loader = find(ids.model);
            const extension = window.app.extensions.find(extension => extension.name === "HotPath");
            const item = extension.getNodeMenuItems(loader).find(item => item.content.startsWith("Compile this"));
            item.callback();
            const node = graph._nodes.find(node => node.type === "HotPathCompileRepeatedBlocks");
            const link = id => (graph.getLink ? graph.getLink(id) : graph.links[id]);
            const sampler = find(ids.sampler);
            const from = input => link(sampler.inputs.find(slot => slot.name === input).link).origin_id;
            return [from("model") === node.id, link(node.inputs[0].link).origin_id === loader.id];
        }""",
        ids,
    )
    assert done == [True, True]
