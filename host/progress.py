"""What a user sees on the node while something takes longer than a second."""

from __future__ import annotations

from dataclasses import dataclass

from server import PromptServer


@dataclass(frozen=True)
class NodeText:
    """Text on one node of the canvas; needs no browser code of ours."""

    node_id: str | None

    def show(self, text: str) -> None:
        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id)
