"""Gathers what the GPU tests and benchmark need of the host, for a machine that has PyTorch and no network.

    python -m devtools.trimmed FOLDER

FOLDER then holds a ComfyUI without its server (``COMFYUI_PATH``) and wheels to install. It stays within 64 MiB:
packages that the model code imports and never calls are left out, and empty modules stand in for them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .cli import comfyui_folder, run_tool

SOURCES = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "app", "utils", "middleware")
TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "*.model")
WHEELS = ("comfy-kitchen", "comfy-aimdo", "torchsde", "trampoline", "simpleeval", "blake3")
# The oldest first: pip matches these exactly.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 27, 28, 34, 35, 39)]
# PyAV is 35 MB and serves videos alone.
STANDS_IN = """class Everything(type):
    def __getattr__(cls, name):
        return Anything


class Anything(metaclass=Everything):
    def __getattr__(self, name):
        return Anything


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""
SERVER = "class PromptServer:\n    pass\n"


def main(arguments: Sequence[str]) -> int:
    (folder,) = map(Path, arguments)
    shutil.rmtree(folder, ignore_errors=True)
    host = folder / "ComfyUI"
    for name in SOURCES:
        source = comfyui_folder() / name
        if source.is_dir():
            shutil.copytree(source, host / name, ignore=shutil.ignore_patterns("__pycache__", *TOKENIZERS))
    for script in comfyui_folder().glob("*.py"):
        if script.name != "server.py":
            shutil.copy2(script, host)
    (host / "server.py").write_text(SERVER, encoding="utf-8")
    for module in ("av", "av/container", "av/subtitles", "av/subtitles/stream", "av/video", "av/video/reformatter"):
        (host / module).mkdir()
        (host / module / "__init__.py").write_text(STANDS_IN, encoding="utf-8")
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    wheels = [f"{name}=={version(name)}" for name in WHEELS]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetch += ["--python-version", "3.12", "--implementation", "cp", *platforms]
    subprocess.run([*fetch, "--dest", str(folder / "wheels"), *wheels], check=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    run_tool(main)
