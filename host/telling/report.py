"""What was compiled, what it took and what runs eager: as text for a MODEL, and as JSON at GET /hotpath/report."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from server import PromptServer

from ...hotpath.compiled import Region
from ..compiling.compile import LATEST, CompiledBlocks, compiled_blocks
from ..compiling.regions import REGIONS
from ..models import require_model
from ..quantizing.quantize import quantization, quantizations
from ..residency.modulation import LATEST as LATEST_AHEAD
from ..residency.offload import KEY as OFFLOAD_KEY
from ..residency.streaming import LATEST as LATEST_STREAMED
from .progress import statuses

# Term -> what shows that a report speaks of it, and what it means to who reads it.
_TERMS = {
    "region": (
        r"\bregions?\b",
        "All blocks of one kind, which run with the same compiled code. Flux.1 has two kinds, double and single.",
    ),
    "graph": (
        r"\bgraphs?\b",
        "One piece of compiled code. One for each region is the best there is. What differs in kind from before, such "
        "as the first other batch size, makes one more.",
    ),
    "graph break": (
        r"\bgraph breaks [1-9]|\bbroke\b",
        "A place in a block that could not be compiled, so that the block became several graphs. The line of code is "
        "named; with fullgraph on, the block runs eager instead.",
    ),
    "compiled again": (
        r"\bcompiled again\b",
        "An input differed from all before in a way that needs other code. It costs the time of compiling once. The "
        "setting in brackets avoids it.",
    ),
    "eager": (
        r"\beager\b",
        "Without compiled code, as ComfyUI runs the blocks without this node: the same image, not as fast. The reason "
        "is named.",
    ),
    "did not run": (
        r"did not run: ",
        "Another node gave the step's result without these blocks, as a step cache does, or ran something else in "
        "their place. Such steps are not timed.",
    ),
    "cache": (
        r"\bcache\b",
        "Compiled blocks are kept for the next start of ComfyUI. A miss names what differs from when they were kept.",
    ),
    "streamed": (
        r"\bstreamed\b",
        "Weights that stay in RAM and arrive on the GPU one block before they are used.",
    ),
}


def report() -> dict[str, Any]:
    """Compiled regions of this process, for each compile node what its last MODEL uses and what runs eager, what was
    quantized, and for each offload node what modulation was made ahead and which blocks were streamed."""
    return {
        "regions": [_region(region) for region in REGIONS],
        "models": [
            {
                "node_id": blocks.text.node_id,
                "summary": blocks.summary(),
                "regions": [_region(region) for region in blocks.regions],
                "compiled_blocks": dict(blocks.compiled),
                "cuda_graphs": blocks.replays.told(),
                "blocks": blocks.account.counts,
                "eager": {reason: sorted(names) for reason, names in blocks.eager.items()},
                "not_run": {reason: sorted(names) for reason, names in blocks.not_run.items()},
                "calls": blocks.calls,
                "calls_without": blocks.calls_without,
            }
            for blocks in list(LATEST.values())
        ],
        "quantized": [asdict(done) for done in quantizations()],
        "modulation": [
            {
                "node_id": ahead.text.node_id,
                "vectors": ahead.vectors,
                "table_bytes": ahead.table_bytes,
                "in_place": sorted(ahead.in_place),
            }
            for ahead in list(LATEST_AHEAD.values())
        ],
        "streamed": [
            {
                "node_id": blocks.text.node_id,
                "streamed_blocks": len(blocks.residency.streamed),
                "blocks": blocks.residency.blocks,
                "resident_bytes": blocks.residency.resident_bytes,
                "streamed_bytes": blocks.residency.streamed_bytes,
                "bytes_copied": blocks.bytes_copied,
                "calls": blocks.calls,
                "not_streamed": sorted(blocks.not_streamed),
            }
            for blocks in list(LATEST_STREAMED.values())
            if blocks.residency is not None
        ],
    }


def _region(region: Region) -> dict[str, Any]:
    return {"name": region.name, **asdict(region.settings), **asdict(region.stats)}


def describe(model: ModelPatcher) -> str:
    """The report on one MODEL, a line for each thing to know.

    Raises:
        ValueError: it is no MODEL.
    """
    require_model(model)
    quantized = quantization(model)
    lines = [quantized.summary()] if quantized else []
    lines += [ahead.summary() for ahead in model.get_wrappers(WrappersMP.APPLY_MODEL, OFFLOAD_KEY) if ahead.summary()]
    blocks = compiled_blocks(model)
    if blocks is None:
        return "\n".join([*lines, "This MODEL does not pass through Compile Repeated Blocks."])
    return "\n".join([*lines, *_lines(blocks)])


def explain(workflow: str | None, node_id: str) -> dict[str, Any]:
    """What one node of a workflow last did, in lines, and the terms in them with what they mean."""
    status = statuses(workflow).get(node_id)
    if status is None:
        return {"lines": [], "terms": {}}
    blocks = LATEST.get(node_id)
    # A node of another workflow may have the same id.
    known = blocks is not None and blocks.summary() == status["text"]
    lines = _lines(blocks) if blocks is not None and known else status["text"].splitlines()
    text = "\n".join(lines).lower()
    return {"lines": lines, "terms": {term: says for term, (sign, says) in _TERMS.items() if re.search(sign, text)}}


def _lines(blocks: CompiledBlocks) -> list[str]:
    lines = [
        blocks.summary() or "Nothing has been sampled with this MODEL yet. Connect the sampler's output to `after`."
    ]
    if blocks.calls:
        lines.append(f"The last step: {blocks.account.line()}")
    for region in blocks.regions:
        stats = region.stats
        lines.append(
            f"{region.name} region: graphs {stats.graphs}, graph breaks {len(stats.breaks)}, {stats.seconds:.1f} s, "
            f"peak memory raised by {stats.peak_growth / 2**20:.0f} MiB ({region.settings.backend}, "
            f"{region.settings.mode})"
        )
        loaded = f", {stats.loaded} graphs loaded in {stats.load_seconds:.2f} s" if stats.loaded else ""
        lines.append(f"{region.name} region cache: {stats.cache}{loaded}")
        lines += [f"{region.name} region broke: {reason}" for reason in stats.breaks]
        lines += [f"{region.name} region compiled again: {reason}" for reason in stats.recompiles]
        if stats.limit_reached:
            lines.append(f"{region.name} region reached its limit of graphs; what needs another one runs eager")
    return lines


def add_routes() -> None:
    """Register the routes with the running server; none in a script that loads the pack without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/hotpath/report")
    async def get_report(request: web.Request) -> web.Response:
        return web.json_response(report())

    @server.routes.get("/hotpath/explain")
    async def get_explanation(request: web.Request) -> web.Response:
        return web.json_response(explain(request.query.get("workflow"), request.query.get("node", "")))

    @server.routes.get("/hotpath/status")
    async def get_status(request: web.Request) -> web.Response:
        return web.json_response(statuses(request.query.get("workflow")))
