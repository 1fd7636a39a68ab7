#!/usr/bin/env python3
"""Runs HotPath in a real ComfyUI: demo, tests, benchmark, and the host itself. Needs Python's standard library only.

The first run sets up ComfyUI and its requirements in a cache folder of the user; later runs start at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__:
    from .devtools import environments
else:
    from devtools import environments

ROOT = Path(__file__).resolve().parent
PYTHON = ((3, 10), (3, 13))
TEST_MODULES = ("diffusers", "hypothesis", "playwright", "pytest", "pytest_timeout", "xdist")
COMMANDS = {
    "demo": "compare a Flux eager and compiled; options --model FILE, --steps N, --size WxH, --out DIR, --json FILE",
    "test": "run the tests; options are pytest's; --all: the sweeps too; --matrix: with every ComfyUI and PyTorch "
    "supported, in turn; --host FOLDER: with any ComfyUI, of which a table first tells what would run eager, and why",
    "bench": "compare with other ways to compile; options --blocks D+S, --quick, --rounds N, --json FILE, --plot FILE; "
    "or --model FILE, --soak N, --fuzz SECONDS, --quantize, --memory, --offload, --start",
    "pictures": "remake docs/'s pictures of the canvas; needs a Chromium",
    "serve": "run ComfyUI with this pack for a browser; options --port N, -- ARGUMENTS OF COMFYUI",
    "package": "validate, lint and pack for the Comfy registry, into node.zip",
}
# Like python -m, without the current folder, whose modules could shadow others.
RUN_MODULE = (
    "import runpy, sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_KNOWN_HOSTS = f"{', '.join(setup.name for setup in environments.HOSTS)}, or the folder of any"
MODULES = {
    "demo": "devtools.demo",
    "bench": "benchmarks.bench",
    "pictures": "devtools.pictures",
    "serve": "devtools.serve",
    "canary": "devtools.canary",
}


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status, or does not return where the command replaces this process."""
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        found = platform.python_version()
        print(f"dev.py needs Python 3.10 to 3.13; this is {found}. Run it with another one.", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="dev.py [-h] [--host VERSION|FOLDER] {demo,test,bench,pictures,serve,package} [options]",
        epilog="HOTPATH_CACHE: the cache folder. COMFYUI_PATH: an existing ComfyUI to use instead; it is not changed.",
    )
    parser.add_argument(
        "--host",
        type=host,
        default=environments.HOSTS[0].name,
        help=f"ComfyUI: {_KNOWN_HOSTS} ({environments.HOSTS[0].name})",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    # What follows the command is the command's own, but for the host.
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--host" in own:
        at = own.index("--host")
        arguments = [*arguments[at : at + 2], *arguments[:at], *arguments[at + 2 :]]
    ours = 3 if arguments[:1] == ["--host"] else 1
    given = parser.parse_args(arguments[:ours])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cache = environments.cache_folder(os.environ, sys.platform, Path.home())
        if given.command == "test" and "--matrix" in arguments:
            return run_matrix([argument for argument in arguments[ours:] if argument != "--matrix"], cache)
        if given.command == "package":
            if arguments[ours:]:
                parser.error(f"package takes no {arguments[ours]}")
            print(f"Packed as {package(cache)}")
            return 0
        if isinstance(given.host, Path):
            environment = environments.existing_environment(given.host)
        else:
            environment = environments.find_environment(os.environ, cache, given.host)
        if given.command == "test" and not environment.ours:
            check_test_modules(environment.python)
            if isinstance(given.host, Path):
                line, env = command_line("canary", [], environment, cache)
                subprocess.call(line, env=env)
        return run(given.command, arguments[ours:], environment, cache)
    except environments.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def host(text: str) -> environments.Setup | Path:
    """An argparse type: one of the releases that an environment is made for, or the folder of any ComfyUI."""
    known = next((setup for setup in environments.HOSTS if setup.name == text), None)
    if known is not None:
        return known
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} ({_KNOWN_HOSTS})")
    if not (folder / "main.py").is_file():
        raise argparse.ArgumentTypeError(f"{folder} has no main.py, so it is no ComfyUI.")
    return folder


def check_test_modules(python: Path) -> None:
    """Raise SetupError when ``python``, which is the user's, can't run the tests."""
    if subprocess.call([str(python), "-c", f"import {', '.join(TEST_MODULES)}"], stderr=subprocess.DEVNULL):
        files = " ".join(f'-r "{path}"' for path in environments.REQUIREMENTS)
        command = f'"{python}" -m pip install {files}'
        raise environments.SetupError(
            f"The Python of COMFYUI_PATH lacks what the tests need. Install it with {command}"
        )


def run_matrix(arguments: Sequence[str], cache: Path) -> int:
    """Run each setup's tests and tell at the end how each went; environments made for it are removed after.

    Raises:
        SetupError: an environment can't be had.
    """
    results = {}
    for setup in environments.MATRIX:
        folder = cache / environments.environment_key(setup)
        kept = (folder / "complete").exists()
        environment = environments.find_environment({}, cache, setup)
        line, env = command_line("test", [*setup.tests, *arguments], environment, cache)
        print(f"\n{setup.name}: {', '.join(setup.packages)}", flush=True)
        results[setup.name] = subprocess.call(line, env=env)
        os.chdir(ROOT)
        if not kept:
            shutil.rmtree(folder)
    print()
    for setup in environments.MATRIX:
        outcome = "passed" if results[setup.name] == 0 else f"FAILED (status {results[setup.name]})"
        what = "the pack refuses to load" if setup.tests is environments.REFUSED else ", ".join(setup.tests)
        print(f"{setup.name:<14} {setup.packages[0]:<16} {what:<38}  {outcome}")
    return max(results.values())


def package(cache: Path) -> Path:
    """Validate, lint and pack as the registry does; returns the archive of what git tracks less ``.comfyignore``.

    Raises:
        SetupError: the tools can't be had, or one of them failed or warned.
    """
    python = environments.find_environment({}, cache, environments.TOOLS).python
    node = ("comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node")
    for tool in ((*node, "validate"), ("comfy_test", "lint", "--strict"), (*node, "pack")):
        # Isolated, as our packages would shadow others of their names.
        line = [str(python), "-I", "-X", "utf8", "-m", *tool]
        env = {**os.environ, "DO_NOT_TRACK": "1"}
        done = subprocess.run(line, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True)
        # Not every console can print its signs.
        said = (done.stdout + done.stderr).decode("ascii", errors="ignore").strip()
        # What validate only warns of, the registry drops.
        if done.returncode or (tool[-1] == "validate" and "warning" in said.lower()):
            raise environments.SetupError(f"{' '.join(tool)} ended with status {done.returncode} and said:\n{said}")
        print(said, flush=True)
    return ROOT / "node.zip"


def command_line(
    command: str, arguments: Sequence[str], environment: environments.Environment, cache: Path
) -> tuple[list[str], dict[str, str]]:
    """What runs a command under the environment's interpreter, and its variables; changes the current folder for it."""
    line = [str(environment.python)]
    if command == "test":
        arguments = [absolute(argument) for argument in arguments]
        # From the root, our ``nodes`` would shadow the host's.
        os.chdir(ROOT / "tests")
        line += ["-m", "pytest", "-c", "pytest.ini", *arguments]
    else:
        line += ["-c", RUN_MODULE, str(ROOT), MODULES[command], *arguments]
    return line, {**os.environ, "COMFYUI_PATH": str(environment.comfyui), "HOTPATH_CACHE": str(cache)}


def run(command: str, arguments: Sequence[str], environment: environments.Environment, cache: Path) -> int:
    """Run a command under the environment's interpreter; on POSIX it takes this process's place."""
    line, env = command_line(command, arguments, environment, cache)
    sys.stdout.flush()
    if sys.platform != "win32":
        os.execve(line[0], line, env)
    with subprocess.Popen(line, env=env) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The console has told the child too, which ends by itself.
                continue


def absolute(argument: str) -> str:
    """An argument that names an existing path, with ``::test`` after it or not, for use in another folder."""
    path, separator, test = argument.partition("::")
    return f"{os.path.abspath(path)}{separator}{test}" if path and os.path.exists(path) else argument


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
