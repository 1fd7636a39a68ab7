"""GET /hotpath/report: what was compiled, what it took and what runs eager, as JSON. It changes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from aiohttp import web
from server import PromptServer

from ..hotpath.compiled import Region
from .compile import LATEST, REGIONS


def report() -> dict[str, Any]:
    """Compiled regions of this process, and for each compile node what its last MODEL uses and what runs eager."""
    return {
        "regions": [_region(region) for region in REGIONS],
        "models": [
            {
                "node_id": blocks.text.node_id,
                "summary": blocks.summary(),
                "regions": [_region(region) for region in blocks.regions],
                "compiled_blocks": dict(blocks.compiled),
                "eager": {reason: sorted(names) for reason, names in blocks.eager.items()},
            }
            for blocks in list(LATEST.values())
        ],
    }


def _region(region: Region) -> dict[str, Any]:
    return {"name": region.name, **asdict(region.settings), **asdict(region.stats)}


def add_route() -> None:
    """Register the route with the running server; without one (a script that loads the pack) there is none."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/hotpath/report")
    async def get_report(request: web.Request) -> web.Response:
        return web.json_response(report())
