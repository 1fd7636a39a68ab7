"""The page of a user whose ComfyUI speaks Chinese, in the classic canvas and in Nodes 2.0."""

import json
import re

import pytest
from hotpath_pack.devtools.browser import PANEL, canvas
from hotpath_pack.devtools.locales import LOCALES, NODE_DEFS
from hotpath_pack.devtools.server import ROOT
from hotpath_pack.devtools.workflows import sampling

OFFLOAD = "HotPathOffloadRepeatedBlocks"
NODE = json.loads((LOCALES / "zh" / NODE_DEFS).read_text(encoding="utf-8"))[OFFLOAD]
SETTING = json.loads((LOCALES / "zh" / "settings.json").read_text(encoding="utf-8"))["HotPath_Toasts"]
TEXTS = json.loads((LOCALES / "zh" / "main.json").read_text(encoding="utf-8"))["HotPath"]
FRENCH = json.loads((LOCALES / "fr" / "main.json").read_text(encoding="utf-8"))["HotPath"]
# As the host tells it when blocks run eager.
EAGER = """
node => window.app.api.dispatchEvent(new CustomEvent("hotpath.status", { detail: {
    workflow: window.app.graph.id, node: String(node), state: "eager", text: "", time: 1, facts: { gain: 2 },
    reasons: [{ reason: "a reason", advice: "an advice" }],
} }))
"""
# Title of a node, and the name of a widget and where on the page it is.
WIDGET = """
([id, name]) => {
    const { canvas, graph } = window.app;
    const node = graph.getNodeById(id);
    const widget = node.widgets.find(widget => widget.name === name);
    const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] + widget.y + 8]);
    const box = canvas.canvas.getBoundingClientRect();
    return [node.title, widget.label, x + box.left, y + box.top];
}
"""


@pytest.fixture(params=[False, True], ids=["classic", "Nodes 2.0"])
def vue(request):
    return request.param


@pytest.fixture
def page(browser, live, vue):
    with canvas(browser, live.server, vue=vue, locale="zh") as shown:
        yield shown
        assert shown.errors == []


@pytest.mark.sweep(keep=["Nodes 2.0"])
def test_a_node_its_tooltips_its_help_and_the_setting_are_in_chinese(page, live, vue):
    shown = page.page
    offload = page.load(sampling(live.checkpoint, live.flux, offload={}), {"offload": (200, 120)})["offload"]
    label = NODE["inputs"]["pin_memory"]["name"]
    if vue:
        shown.get_by_text(NODE["display_name"], exact=True).wait_for()
        shown.get_by_text(label, exact=True).hover()
    else:
        # Drawing a node gives its widgets their places.
        shown.wait_for_function("id => window.app.graph.getNodeById(id).widgets.at(-1).y > 0", arg=offload)
        title, said, x, y = shown.evaluate(WIDGET, [offload, "pin_memory"])
        assert (title, said) == (NODE["display_name"], label)
        shown.mouse.move(x - 2, y)
        shown.mouse.move(x, y)
    # The newest canvas has it once more, to be read out.
    shown.get_by_text(NODE["inputs"]["pin_memory"]["tooltip"]).first.wait_for(timeout=10_000)

    shown.evaluate("id => window.app.canvas.selectNode(window.app.graph.getNodeById(id))", offload)
    shown.get_by_test_id("info-button").click()
    shown.wait_for_selector(".node-help-content table")
    heading, _, first, *_ = (ROOT / "js" / "docs" / OFFLOAD / "zh.md").read_text(encoding="utf-8").splitlines()
    text = shown.inner_text(".node-help-content")
    assert text.startswith(heading.removeprefix("# ")) and first.replace("**", "") in text

    shown.evaluate("window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    shown.get_by_text("HotPath", exact=True).last.click()
    shown.locator("[data-setting-id='HotPath.Toasts']").get_by_text(SETTING["name"]).wait_for()


@pytest.mark.sweep(keep=["classic"])
def test_the_panel_the_message_and_the_menu_are_in_chinese_and_the_panel_in_what_is_chosen_next(page, live):
    shown = page.page
    offload = page.load(sampling(live.checkpoint, live.flux, offload={}), {"offload": (200, 120)})["offload"]
    panel = shown.locator(PANEL)
    panel.get_by_text(TEXTS["idle"], exact=True).wait_for()
    shown.evaluate(EAGER, offload)
    panel.get_by_text(TEXTS["times_as_fast"].replace("...", "2.00"), exact=True).wait_for()
    assert f"a reason. {TEXTS['avoid'].replace('...', 'an advice')}." in panel.inner_text()
    shown.get_by_text(TEXTS["toast"], exact=True).wait_for()
    entries = page.menu(page.place(offload))
    assert {TEXTS["compile_blocks"], TEXTS["explain"]} <= {entry.strip() for entry in entries}
    shown.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'fr')")
    # The newest canvas makes the graph anew, for which the host never told anything.
    panel.get_by_text(re.compile(rf"^({FRENCH['eager']}|{FRENCH['idle']})$")).wait_for()
