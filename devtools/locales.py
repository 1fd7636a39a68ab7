"""Remakes locales/en/nodeDefs.json, from which translations start, of what a real ComfyUI tells of our nodes.

    python -m devtools.locales

A test compares the two, and the other languages with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .cli import comfyui_folder, run_tool
from .server import ROOT, HostServer

LOCALES = ROOT / "locales"
NODE_DEFS = "nodeDefs.json"


def node_defs(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Our nodes of the host's GET /object_info, as the host's page looks translations up."""
    return {name: _node(info) for name, info in object_info.items() if info["python_module"] == "custom_nodes.HotPath"}


def _node(info: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    outputs = zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs.items()},
        # The page translates the name of an output that is called like its type by itself.
        "outputs": {
            str(index): {**({} if name == kind else {"name": name}), "tooltip": tooltip}
            for index, (kind, name, tooltip) in enumerate(outputs)
        },
    }


def main(arguments: Sequence[str]) -> int:
    with HostServer(comfyui_folder()) as server:
        defs = node_defs(server.get("/object_info"))
    text = json.dumps(defs, ensure_ascii=False, indent=2)
    (LOCALES / "en" / NODE_DEFS).write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_tool(main)
