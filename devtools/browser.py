"""A Chromium without a screen on the canvas of a development host, in the classic mode or in Nodes 2.0.

Needs Playwright's Python package and a Chromium of the machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from .server import HostServer
from .workflows import Workflow

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_LOAD = """
async ([workflow, places, scale]) => {
    const app = window.app;
    await app.loadApiJson(workflow, "Flux");
    const names = Object.keys(workflow);
    const ids = {};
    app.graph._nodes.forEach((node, index) => {
        const [x, y] = places[names[index]] ?? [60 + index * 330, 700];
        node.setSize([Math.max(node.size[0], 270), node.size[1]]);
        node.pos = [x, y];
        ids[names[index]] = String(node.id);
    });
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [20, 40];
    app.graph.setDirtyCanvas(true, true);
    return ids;
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
        self, workflow: Workflow, places: dict[str, tuple[int, int]] | None = None, scale: float = 1.0
    ) -> dict[str, str]:
        """Show an API-format workflow; the ids that its nodes have on the canvas, by their names."""
        return self.page.evaluate(_LOAD, [workflow, places or {}, scale])

    def add_by_search(self, name: str) -> None:
        """Add a node by its display name, as a user does."""
        before = self.page.evaluate("window.app.graph._nodes.length")
        self.page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        self.page.wait_for_selector("input:focus", timeout=20_000)
        self.page.keyboard.type(name, delay=10)
        # The search waits for a pause in typing.
        self.page.wait_for_timeout(1500)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function("before => window.app.graph._nodes.length > before", arg=before)
        # A click places it in newer frontends.
        self.page.mouse.click(800, 300)

    def open_template(self, name: str) -> None:
        """Open an example workflow from the host's template browser, once its thumbnail is shown there."""
        self.page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        # What is typed before it has its cards is lost.
        self.page.get_by_text("Node graph").first.wait_for()
        search = self.page.get_by_placeholder("Search ...")
        search.fill(name)
        thumbnail = "name => [...document.images].some((image) => image.alt === name && image.naturalWidth)"
        self.page.wait_for_function(thumbnail, arg=name, timeout=60_000)
        self.page.get_by_alt_text(name, exact=True).click()
        search.wait_for(state="detached")
        opened = "name => window.app.extensionManager.workflow.activeWorkflow?.filename === name"
        self.page.wait_for_function(opened, arg=name)

    def queue(self) -> None:
        """Queue what is shown."""
        self.page.evaluate("window.app.queuePrompt(0)")

    def wait_for_queue(self, timeout: float = 300) -> None:
        """Wait until the host has nothing left to do."""
        for _ in range(int(timeout / 0.25)):
            self.page.wait_for_timeout(250)
            if not any(self.server.get("/queue").values()):
                return
        raise TimeoutError(f"The queue was not empty after {timeout:.0f} s.")


@contextmanager
def canvas(
    server: HostServer,
    *,
    vue: bool = False,
    light: bool = False,
    locale: str = "en",
    width: int = 1600,
    height: int = 900,
) -> Iterator[Canvas]:
    """A page on ``server``; ``vue`` shows Nodes 2.0, ``light`` the light theme, ``locale`` another language.

    Raises:
        FileNotFoundError: the machine has no Chromium.
    """
    chromium = find_chromium()
    if chromium is None:
        raise FileNotFoundError("No Chromium was found. Install it, on Debian with: apt-get install chromium")
    server.set_settings(
        {
            "Comfy.VueNodes.Enabled": vue,
            "Comfy.ColorPalette": "light" if light else "dark",
            "Comfy.Locale": locale,
            "Comfy.TutorialCompleted": True,
            "Comfy.NodeSearchBoxImpl": "default",
        }
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        try:
            shown = Canvas(browser.new_page(viewport={"width": width, "height": height}), server)
            shown.page.on("pageerror", lambda error: shown.errors.append(str(error)))
            shown.page.on("console", shown.note)
            shown.open()
            yield shown
        finally:
            browser.close()
