"""What a user sees on the canvas, in the classic one and in Nodes 2.0."""

import itertools
import re

import pytest
from hotpath_pack.devtools.workflows import sampling

# Another seed for each prompt, or the host would take the sampler's result from its cache.
SEEDS = itertools.count(1)
COMPILE = "Compile this model's blocks"
EXPLAIN = "Explain this report"

INTO_SUBGRAPH = """
id => {
    const { canvas, graph } = window.app;
    graph.convertToSubgraph(new Set([graph.getNodeById(id)]));
    const outer = graph._nodes.find(node => node.subgraph);
    canvas.openSubgraph(outer.subgraph, outer);
}
"""
ENTER = """
async () => {
    const { canvas } = window.app;
    const outer = () => window.app.rootGraph._nodes.find(node => node.subgraph);
    while (!outer()) await new Promise(requestAnimationFrame);
    canvas.openSubgraph(outer().subgraph, outer());
}
"""
COPY = """
() => {
    const { canvas } = window.app;
    canvas.selectItems([canvas.graph._nodes[0]]);
    canvas.copyToClipboard();
    canvas.pasteFromClipboard();
}
"""
CONTRAST = """
panel => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const text = light(numbers(getComputedStyle(panel).color));
    const behind = light(numbers(getComputedStyle(panel.firstChild).backgroundColor));
    return [(Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05), behind];
}
"""


def workflow(live, **options):
    return sampling(live.checkpoint, live.flux, width=128, height=128, steps=2, seed=next(SEEDS), **options)


def compiled(live, page, patches=(), report=False, **settings):
    settings = {"backend": "aot_eager", "on_failure": "eager", "cache": "off", **fresh(page), **settings}
    return workflow(live, compiled=settings, patches=patches, report=report)


def fresh(page):
    """A setting that gives each mode regions of its own, so that both see them compiled."""
    return {"fullgraph": not page.vue}


def queue(page, sampler):
    page.set(sampler, seed=next(SEEDS))
    page.queue()


@pytest.mark.sweep(keep=["classic"])
def test_from_the_search_box_to_compiled_and_over_a_reload(page, live):
    ids = page.load(workflow(live))
    node = page.add("Compile Repeated Blocks", (760, 500))
    assert page.reads("idle") == "\u25cb\nNot run yet"
    page.connect(ids["model"], 0, node, 0)
    page.connect(node, 0, ids["sampler"], 0)
    assert (page.origin(node), page.origin(ids["sampler"])) == (ids["model"], node)
    page.set(node, backend="hotpath_dev_slow", cache="off", **fresh(page))
    page.watch(node)
    page.queue()
    page.wait_for_queue()
    text = page.reads("compiled")
    assert re.search(r"Blocks\s+2 double, 3 single", text) and re.search(r"Graphs\s+2", text), text
    assert re.search(r"Compiling took\s+\d+\.\d s", text) and re.search(r"Last step\s+\d+ ms", text), text
    assert "Gain" not in text, "no eager step was measured"
    compiling = [shown for state, shown in page.seen() if state == "compiling"]
    assert any(re.search(r"\s1 s\s+Region\s+double block \(1 of 2\)", shown) for shown in compiling), compiling
    assert any("single block (2 of 2)" in shown for shown in compiling)
    assert "hotpath_status" not in str(page.page.evaluate("window.app.graphToPrompt()")["output"])

    # Two at once; the second is the host's when the first one's numbers are shown.
    queue(page, ids["sampler"])
    queue(page, ids["sampler"])
    page.wait_for_queue()
    text = page.reads("compiled")
    assert re.search(r"Graphs\s+2", text) and re.search(r"Last step\s+\d+ ms", text)

    page.open()
    assert page.reads("compiled") == text


@pytest.mark.sweep(keep=["Nodes 2.0"])
def test_what_compiled_again_and_what_avoids_it(page, live):
    ids = page.load(compiled(live, page))
    page.queue()
    page.wait_for_queue()
    page.reads("compiled")
    page.set(ids["empty"], batch_size=2)
    page.queue()
    page.wait_for_queue()
    text = page.reads("recompiled")
    assert text.startswith("\u25cf\nCompiled again")
    assert (
        "batch size changed from 1 to 2. Avoid it: dynamic: 'always' takes all batches of two and more at once." in text
    )
    # The next run compiles nothing.
    queue(page, ids["sampler"])
    page.wait_for_queue()
    assert "batch size" not in page.reads("compiled")
    # Another tab with nodes of the same ids.
    page.load(compiled(live, page))
    page.reads("idle")
    page.queue()
    page.reads("compiled")


@pytest.mark.sweep(keep=["classic"])
def test_eager_with_the_reason_and_a_toast_unless_toasts_are_off(page, live):
    # The newest canvas has it once more, to be read out.
    shown = page.page.locator("[role=alert]:not([aria-label=Notification])")
    toast = shown.filter(has_text="HotPath: runs eager")
    why = "img_attn.proj (Linear) has a forward hook"
    ids = page.load(compiled(live, page, patches=[("forward_hook", 1.5)]))
    page.queue()
    toast.wait_for()
    assert why in toast.inner_text()
    page.wait_for_queue()
    text = page.reads("eager")
    assert text.startswith("\u25b2\nPartly eager") and f"double block 0 eager: {why}" in text
    queue(page, ids["sampler"])
    page.wait_for_queue()
    assert toast.count() <= 1, "the same is told once"

    page.page.evaluate("window.app.extensionManager.setting.set('HotPath.Toasts', false)")
    page.open()
    page.load(compiled(live, page, patches=[("forward_hook", 1.5)]))
    page.queue()
    page.wait_for_queue()
    page.reads("eager")
    assert toast.count() == 0


@pytest.mark.sweep(keep=["classic"])
def test_split_tells_on_the_node_that_there_is_one_device(page, live):
    ids = page.load(workflow(live))
    node = page.add("Split Repeated Blocks", (760, 500))
    page.connect(ids["model"], 0, node, 0)
    page.connect(node, 0, ids["sampler"], 0)
    # Else one of the two modes would have it from the host's cache.
    page.set(node, devices="0" if page.vue else "all")
    page.queue()
    page.wait_for_queue()
    lines = [line for line in page.reads("one_device").splitlines() if line]
    assert lines == ["\u25b2", "On one device", "one device (cpu): nothing is shared out"]


@pytest.mark.sweep(keep=["Nodes 2.0"])
def test_an_interrupt_while_it_compiles(page, live):
    page.load(compiled(live, page, backend="hotpath_dev_slow", dynamic="always"))
    page.queue()
    page.reads("compiling")
    live.server.interrupt()
    assert page.reads("stopped").split() == ["\u25a0", "Stopped", "stopped:", "interrupted"]


@pytest.mark.sweep(keep=["classic"])
def test_the_menu_of_a_node_puts_compile_behind_its_model(page, live):
    ids = page.load(workflow(live))
    assert COMPILE in page.menu(page.place(ids["model"]))
    page.choose(COMPILE)
    node = page.origin(ids["sampler"])
    assert node not in ids.values() and page.origin(node) == ids["model"]
    page.reads("idle")
    page.undo(node)
    assert page.origin(ids["sampler"]) == ids["model"]


@pytest.mark.sweep(keep=["Nodes 2.0"])
def test_the_report_is_explained(page, live):
    dialog = page.page.locator(".hotpath-report")
    ids = page.load(compiled(live, page, report=True))
    assert COMPILE not in page.menu(page.place(ids["compile"])), "it is compiled already"
    page.choose(EXPLAIN)
    dialog.get_by_text("It has done nothing yet. Queue a prompt.").wait_for()
    dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="detached")
    page.queue()
    page.wait_for_queue()
    for name in ("compile", "report"):
        page.menu(page.place(ids[name]))
        page.choose(EXPLAIN)
        text = dialog.inner_text()
        assert "2 double and 3 single blocks run as 2 regions" in text and "What that means" in text
        assert re.search(r"graph\nOne piece of compiled code", text) and "Without compiled code" not in text
        page.page.keyboard.press("Escape")
        dialog.wait_for(state="detached")


def test_the_menu_of_an_output_in_the_classic_canvas(page, live):
    if page.vue:
        pytest.skip("Nodes 2.0 has no menu of its own for an output")
    ids = page.load(workflow(live))
    assert page.menu(page.place(ids["model"], 0, output=True))[-1] == COMPILE
    page.choose(COMPILE)
    assert page.origin(page.origin(ids["sampler"])) == ids["model"]
    assert COMPILE not in page.menu(page.place(ids["empty"], 0, output=True))


@pytest.mark.sweep(keep=["classic"])
def test_inside_a_subgraph_copied_and_in_another_tab(page, live):
    ids = page.load(compiled(live, page))
    page.page.evaluate(INTO_SUBGRAPH, ids["compile"])
    page.reads("idle")
    page.queue()
    page.wait_for_queue()
    text = page.reads("compiled")
    page.page.evaluate(COPY)
    page.reads("idle")
    assert page.reads("compiled") == text
    for shown in ("Unsaved Workflow", "Flux"):
        page.page.evaluate("window.app.extensionManager.command.execute('Workspace.NextOpenedWorkflow')")
        page.page.wait_for_function(f"window.app.extensionManager.workflow.activeWorkflow.filename === {shown!r}")
    page.page.evaluate(ENTER)
    assert page.reads("compiled") == text


@pytest.mark.sweep(keep=["Nodes 2.0"])
def test_the_command_in_a_subgraph_whose_output_is_the_model(page, live):
    ids = page.load(workflow(live))
    page.page.evaluate(INTO_SUBGRAPH, ids["model"])
    loader = page.page.evaluate("window.app.canvas.graph._nodes[0].id")
    page.menu(page.place(loader))
    page.choose(COMPILE)
    linked = """() => {
        const { graph } = window.app.canvas;
        const [output] = graph.outputs;
        return graph.getNodeById(graph.getLink(output.linkIds[0]).origin_id).type;
    }"""
    assert page.page.evaluate(linked) == "HotPathCompileRepeatedBlocks"


def contrast(page):
    """Of the panel's text against what is behind it, as WCAG counts it, and how light that is."""
    return page.panel().evaluate(CONTRAST)


@pytest.mark.sweep(keep=["classic-classic, light", "Nodes 2.0-Nodes 2.0, light"])
def test_text_can_be_read_in_both_themes(page, light_page, live):
    for shown in (page, light_page):
        shown.load(compiled(live, shown))
        shown.reads("idle")
    assert contrast(page)[0] >= 4.5 and contrast(light_page)[0] >= 4.5
    assert contrast(page)[1] < 0.2 < 0.5 < contrast(light_page)[1], "the two are dark and light"
