"""dev.py serve: the host with this pack, for a person with a browser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .checkpoints import flux1, save
from .cli import comfyui_folder, positive, run_tool
from .server import HostServer, cpu_flags


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py serve", description="Run ComfyUI with this pack until Ctrl-C. Arguments after -- go to ComfyUI."
    )
    parser.add_argument("--port", type=positive, default=8188, metavar="N", help="default: 8188")
    parser.add_argument("flags", nargs="*", metavar="-- ARGUMENT", help="ComfyUI's own arguments")
    given = parser.parse_args(arguments)
    comfyui, cache = comfyui_folder(), Path(os.environ["HOTPATH_CACHE"])
    flags = [*cpu_flags(), *given.flags]
    host_is_ours = cache in comfyui.parents
    if not host_is_ours:
        flags += ["--models-directory", str(comfyui / "models")]
    server = HostServer(comfyui, base=cache / "serve", flags=flags, port=given.port, echo=True)
    tiny = server.diffusion_models / "tiny_flux1.safetensors"
    if host_is_ours and not tiny.exists():
        save(tiny, flux1())
    with server, suppress(KeyboardInterrupt):
        print(f"\nOpen {server.url} (Ctrl-C ends it). Models and outputs are in {server.base}.\n", flush=True)
        return server.wait()
    return 0


if __name__ == "__main__":
    run_tool(main)
