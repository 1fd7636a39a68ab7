"""A Chromium without a screen on the canvas of a development host, in the classic mode or in Nodes 2.0.

Needs Playwright's Python package and a Chromium of the machine. What a person does with the mouse is done with the
mouse.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright
from playwright.sync_api import TimeoutError as NotShown

from .server import HostServer
from .workflows import Workflow

PANEL = ".hotpath-panel"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MENU = ".litecontextmenu .litemenu-entry, [role=menuitem]"
_LOAD = """
async ([workflow, places, scale]) => {
    const app = window.app;
    await app.loadApiJson(workflow, "Flux");
    // As a workflow has that a person made, which the page keeps over a reload.
    app.graph.id = crypto.randomUUID();
    for (const node of app.graph._nodes) {
        // In Nodes 2.0 they are as high as what is in them.
        node.setSize([Math.max(node.size[0], 270), LiteGraph.vueNodesMode ? 0 : node.size[1]]);
        node.pos = places[node.id];
    }
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [20, 40];
    app.canvas.setDirty(true, true);
    // A click finds what was drawn.
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
}
"""
# Of the title without a slot; else of a slot.
_PLACE = """
([id, output, slot]) => {
    const { canvas } = window.app;
    const node = canvas.graph.getNodeById(id);
    const at = slot === null ? [node.pos[0] + 120, node.pos[1] - 15] : node.getConnectionPos(!output, slot);
    const [x, y] = canvas.ds.convertOffsetToCanvas(at);
    const { left, top } = canvas.canvas.getBoundingClientRect();
    return [x + left, y + top];
}
"""
_STATES = """
id => {
    const panel = window.app.graph.getNodeById(id).widgets.find(widget => widget.name === "hotpath_status").element;
    window.hotpathSeen = [];
    const note = () => window.hotpathSeen.push([panel.dataset.state, panel.innerText]);
    new MutationObserver(note).observe(panel, { attributes: true, childList: true, subtree: true });
}
"""


def find_chromium() -> str | None:
    """Path of the machine's Chromium; None without one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass
class Canvas:
    """The canvas of a host in a page, and what went wrong in the page's console."""

    page: Page
    server: HostServer
    vue: bool = False
    errors: list[str] = field(default_factory=list)

    def note(self, message: ConsoleMessage) -> None:
        """Keep an error, unless it is about something that the host's own pages ask for and don't get."""
        known = ("Failed to load resource", "Content Security Policy", "ComfyApp graph accessed before initialization")
        hosts_own = any(text in message.text for text in known)
        if message.type == "error" and not (hosts_own and "hotpath" not in message.location["url"].lower()):
            self.errors.append(message.text)

    def open(self) -> None:
        """Load the page, and wait until the canvas is there."""
        self.page.goto(self.server.url)
        self.page.wait_for_function("window.app?.canvas?.graph && window.app.extensionManager?.setting", timeout=90_000)
        self.page.wait_for_function("!document.querySelector('#splash-loader')", timeout=30_000)

    def load(
        self, workflow: Workflow, places: Mapping[str, tuple[int, int]] | None = None, scale: float = 0.8
    ) -> dict[str, int]:
        """Show an API-format workflow; the ids that its nodes have on the canvas, by their names."""
        ids = {name: number for number, name in enumerate(workflow, 1)}
        numbered: dict[str, Any] = {}
        for name, node in workflow.items():
            inputs = {
                key: [str(ids[value[0]]), value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            }
            numbered[str(ids[name])] = {**node, "inputs": inputs}
        row = {name: (60 + 330 * (place % 5), 160 + 580 * (place // 5)) for place, name in enumerate(workflow)}
        at = {str(ids[name]): place for name, place in {**row, **(places or {})}.items()}
        self.page.evaluate(_LOAD, [numbered, at, scale])
        return ids

    def add(self, name: str, at: tuple[int, int]) -> int:
        """Put a node on the canvas from the search box, by its display name, at a place of the page; its id."""
        before = self.page.evaluate("window.app.graph._nodes.length")
        self.page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        self.page.wait_for_selector("input:focus")
        self.page.keyboard.type(name)
        self.page.get_by_role("option", name=name).first.wait_for()
        self.page.keyboard.press("Enter")
        self.page.wait_for_function("before => window.app.graph._nodes.length > before", arg=before)
        # It hangs at the mouse until a click, the first of which may meet the search box on its way out.
        while self.page.evaluate("window.app.graph._nodes.at(-1).flags.ghost"):
            self.page.mouse.click(*at)
            self.page.wait_for_timeout(50)
        return int(self.page.evaluate("window.app.graph._nodes.at(-1).id"))

    def place(self, node: int, slot: int | None = None, output: bool = False) -> tuple[float, float]:
        """Where the title of a node is on the page, or one of its inputs or outputs."""
        x, y = self.page.evaluate(_PLACE, [node, output, slot])
        return x, y

    def connect(self, node: int, output: int, to: int, slot: int) -> None:
        """Drag a link from an output of ``node`` to an input of another."""
        self.page.mouse.move(*self.place(node, output, output=True))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(to, slot), steps=8)
        self.page.mouse.up()

    def origin(self, node: int, slot: int = 0) -> int:
        """The node from which an input of ``node`` comes."""
        script = "([id, slot]) => Number(window.app.graph.getNodeById(id).getInputNode(slot).id)"
        return self.page.evaluate(script, [node, slot])

    def menu(self, at: tuple[float, float]) -> list[str]:
        """Open the menu of what is at a place of the page with a right click; its entries."""
        menu = self.page.locator(_MENU).first
        for _ in range(10):
            # A canvas that was just loaded may not take the first.
            self.page.mouse.click(*at, button="right")
            with suppress(NotShown):
                menu.wait_for(timeout=1500)
                break
        return self.page.locator(_MENU).all_inner_texts()

    def choose(self, entry: str) -> None:
        """Click an entry of the open menu."""
        self.page.locator(_MENU).get_by_text(entry, exact=True).click()

    def undo(self, node: int) -> None:
        """Undo until a node that was put in is gone."""
        for _ in range(10):
            # A canvas that has not noted the change yet does not take the first.
            self.page.keyboard.press("Control+z")
            with suppress(NotShown):
                self.page.wait_for_function("id => !window.app.graph.getNodeById(id)", arg=node, timeout=1500)
                break

    def set(self, node: int, **values: Any) -> None:
        """Set widgets of a node."""
        self.page.evaluate(
            """([id, values]) => {
                for (const widget of window.app.graph.getNodeById(id).widgets)
                    if (widget.name in values) widget.value = values[widget.name];
            }""",
            [node, values],
        )

    def panel(self, state: str | None = None) -> Locator:
        """The first panel, or the first in a state."""
        return self.page.locator(PANEL if state is None else f'{PANEL}[data-state="{state}"]').first

    def reads(self, state: str, timeout: float = 60) -> str:
        """Wait until a panel is in a state; what it says."""
        self.panel(state).wait_for(timeout=timeout * 1000)
        return self.panel(state).inner_text()

    def watch(self, node: int) -> None:
        """From now on keep what the panel of a node shows, for ``seen``."""
        self.page.evaluate(_STATES, node)

    def seen(self) -> list[tuple[str, str]]:
        """(state, text) of the watched panel, each as often as it changed."""
        return [(state, text) for state, text in self.page.evaluate("window.hotpathSeen")]

    def open_template(self, name: str) -> None:
        """Open an example workflow from the host's template browser, once its thumbnail is shown there."""
        self.page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        # What is chosen before it has its cards is lost. A search would find those of the host's hundreds first.
        self.page.get_by_text("Node graph").first.wait_for()
        pack = self.page.get_by_role("dialog").get_by_text("HotPath", exact=True)
        pack.first.click()
        thumbnail = "name => [...document.images].some((image) => image.alt === name && image.naturalWidth)"
        self.page.wait_for_function(thumbnail, arg=name, timeout=60_000)
        self.page.get_by_alt_text(name, exact=True).click()
        pack.first.wait_for(state="detached")
        opened = "name => window.app.extensionManager.workflow.activeWorkflow?.filename === name"
        self.page.wait_for_function(opened, arg=name)

    def queue(self) -> None:
        """Queue what is shown; the host has it then."""
        with self.page.expect_response(lambda response: response.url.endswith("/prompt")):
            self.page.get_by_test_id("queue-button").click()

    def wait_for_queue(self, timeout: float = 300) -> None:
        """Wait until the host has nothing left to do."""
        for _ in range(int(timeout / 0.1)):
            self.page.wait_for_timeout(100)
            if not any(self.server.get("/queue").values()):
                return
        raise TimeoutError(f"The queue was not empty after {timeout:.0f} s.")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium without a screen.

    Raises:
        FileNotFoundError: the machine has none.
    """
    path = find_chromium()
    if path is None:
        raise FileNotFoundError("No Chromium was found. Install it, on Debian with: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def canvas(
    browser: Browser,
    server: HostServer,
    *,
    vue: bool = False,
    light: bool = False,
    locale: str = "en",
    size: tuple[int, int] = (1600, 900),
    density: float = 1,
) -> Iterator[Canvas]:
    """A page of its own on ``server``; ``vue`` shows Nodes 2.0, ``light`` the light theme, ``locale`` another language,
    in so many dots a pixel."""
    server.set_settings(
        {
            "Comfy.VueNodes.Enabled": vue,
            "Comfy.ColorPalette": "light" if light else "dark",
            "Comfy.Locale": locale,
            "Comfy.TutorialCompleted": True,
            "Comfy.NodeSearchBoxImpl": "default",
            "Comfy.Minimap.Visible": False,
            "HotPath.Toasts": True,
        }
    )
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, device_scale_factor=density)
    try:
        shown = Canvas(context.new_page(), server, vue)
        shown.page.set_default_timeout(30_000)
        shown.page.on("pageerror", lambda error: shown.errors.append(str(error)))
        shown.page.on("console", shown.note)
        shown.open()
        yield shown
    finally:
        context.close()
